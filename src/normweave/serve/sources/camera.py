"""Cameras: streams over RTSP or another protocol that FFmpeg reads, and USB cameras of Linux (V4L2)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Literal
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import AfterValidator

from normweave.serve.line_config import login_rules, secret
from normweave.serve.source import Frames, SourceConfig
from normweave.serve.stream import decoded
from normweave.validation import check, checked, unused

SCHEMES = ("rtsp", "rtsps", "http", "https", "tcp", "udp", "rtp", "srt")
"""Schemes of `url`."""


def _device(value: str) -> str:
    check((bool(re.fullmatch("(/dev/video[0-9]+)?", value)), f"must be a device like /dev/video0, got {value!r:.80}"))
    return value


def _size(value: str) -> str:
    check((bool(re.fullmatch("([0-9]+x[0-9]+)?", value)), f"must be WIDTHxHEIGHT like 1280x720, got {value!r:.80}"))
    return value


@checked
class Config(SourceConfig):
    """A camera."""

    type: Literal["camera"]
    url: str = ""
    """Address of a stream, without a password: rtsp://192.168.0.10/stream1."""
    device: Annotated[str, AfterValidator(_device)] = ""
    """USB camera, in the place of `url`: /dev/video0."""
    transport: Literal["tcp", "udp"] = "tcp"
    """Of RTSP. udp loses packets on a busy network, and shows them as damaged images."""
    size: Annotated[str, AfterValidator(_size)] = ""
    """WIDTHxHEIGHT of a USB camera; empty: its default."""
    username: str = ""
    password_env: str = ""
    """Environment variable of the password."""
    password_file: str = ""
    """File of the password."""

    def rules(self) -> list[tuple[bool, str]]:
        """Return that there is one address, and that no setting is without effect."""
        scheme, others = urlsplit(self.url).scheme, list[tuple[bool, str]]()
        if self.device:
            others = unused(self, "transport username", why="device, which is a USB camera")
        elif self.url:
            others = unused(self, "size", why="url: a stream has its own size")
            if not scheme.startswith("rtsp"):
                others += unused(self, "transport", why="a url that is not rtsp")
        return [
            *super().rules(),
            *login_rules(self),
            ((self.url == "") != (self.device == ""), "url, or device of a USB camera: give one of them"),
            (not self.url or scheme in SCHEMES, f"url must begin with one of {', '.join(SCHEMES)}, got {scheme!r}"),
            ("@" not in urlsplit(self.url).netloc, "url must have no password: give username, password_env"),
            *others,
        ]


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
