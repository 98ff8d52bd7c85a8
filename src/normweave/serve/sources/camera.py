"""Cameras: streams over RTSP or another protocol that FFmpeg reads, and USB cameras of Linux (V4L2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import Field

from normweave.serve.line_config import secret
from normweave.serve.source import Frames, SourceConfig
from normweave.serve.stream import decoded
from normweave.validation import check, checked

SCHEMES = ("rtsp", "rtsps", "http", "https", "tcp", "udp", "rtp", "srt")
"""Schemes of `url`."""


@checked
class Config(SourceConfig):
    """A camera."""

    type: Literal["camera"]
    url: str = ""
    """Address of a stream, without a password: rtsp://192.168.0.10/stream1."""
    device: Annotated[str, Field(pattern=r"^(/dev/video[0-9]+)?$")] = ""
    """USB camera, in the place of `url`: /dev/video0."""
    transport: Literal["tcp", "udp"] = "tcp"
    """Of RTSP. udp loses packets on a busy network, and shows them as damaged images."""
    size: Annotated[str, Field(pattern=r"^([0-9]+x[0-9]+)?$")] = ""
    """WIDTHxHEIGHT of a USB camera; empty: its default."""
    username: str = ""
    password_env: str = ""
    """Environment variable of the password."""
    password_file: str = ""
    """File of the password."""

    def __post_init__(self) -> None:
        scheme = urlsplit(self.url).scheme
        check(
            ((self.url == "") != (self.device == ""), "url, or device of a USB camera: give one of them"),
            (not self.url or scheme in SCHEMES, f"url must begin with one of {', '.join(SCHEMES)}, got {scheme!r}"),
            ("@" not in urlsplit(self.url).netloc, "url must have no password: give username, password_env"),
        )


def frames(config: Config, *, max_bytes: int, on_drop: Callable[[int], None]) -> Frames:
    """Yield the frames of the camera."""
    if config.device:
        options = {"video_size": config.size} if config.size else {}
        yield from decoded(config.device, options, live=True, format="v4l2")
        return
    password = secret("password", env=config.password_env, file=config.password_file)
    parts = urlsplit(config.url)
    if config.username:
        user = quote(config.username, safe="") + (f":{quote(password, safe='')}" if password else "")
        parts = parts._replace(netloc=f"{user}@{parts.netloc}")
    options = {"rtsp_transport": config.transport} if parts.scheme.startswith("rtsp") else {}
    yield from decoded(urlunsplit(parts), options, live=True, shown=config.url)
