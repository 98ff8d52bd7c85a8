"""Snapshots over HTTP: an address is asked for its image again and again."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable
from http.client import HTTPException, HTTPMessage
from typing import IO, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from normweave.errors import reason
from normweave.serve.line_config import login_rules, secret
from normweave.serve.pictures import frame
from normweave.serve.source import Frames, SourceConfig
from normweave.validation import PositiveFloat, checked

CHUNK = 64 * 2**10
"""Bytes that are read at a time."""


@checked
class Config(SourceConfig):
    """The address of an image that changes."""

    type: Literal["http"]
    url: str
    poll_seconds: PositiveFloat = 1.0
    """Time between two requests."""
    timeout_seconds: PositiveFloat = 5.0
    """Longest time for a request, from its beginning to the last byte of the image."""
    username: str = ""
    password_env: str = ""
    """Environment variable of the password."""
    password_file: str = ""
    """File of the password."""

    def rules(self) -> list[tuple[bool, str]]:
        """Return that the address is one, without a login in it."""
        parts = urlsplit(self.url)
        return [
            *super().rules(),
            *login_rules(self),
            (parts.scheme in ("http", "https") and bool(parts.hostname), f"url must be http(s)://…, got {self.url!r}"),
            ("@" not in parts.netloc, "url must have no password: give username, password_env"),
        ]


class _SlowError(TimeoutError):
    """An image did not come in time."""


class _SameHost(HTTPRedirectHandler):
    """Follows redirects to the same host only, since the image and the password belong to it."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if (before.scheme, before.netloc) != (after.scheme, after.netloc):
            raise ConnectionError(f"{req.full_url} redirects to another host, {after.netloc}. Give its own address.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def frames(config: Config, *, max_bytes: int, on_drop: Callable[[int], None]) -> Frames:
    """Yield the image each time that it has changed, by its ETag and its content."""
    opener = build_opener(ProxyHandler({}), _SameHost())
    headers = {"User-Agent": "normweave", "Accept": "image/*"}
    password = secret("password", env=config.password_env, file=config.password_file)
    if config.username:
        pair = base64.b64encode(f"{config.username}:{password or ''}".encode()).decode()
        headers["Authorization"] = f"Basic {pair}"
    etag, before = "", b""
    due = time.monotonic()
    while True:
        content, etag = _ask(opener, config, headers | ({"If-None-Match": etag} if etag else {}), max_bytes)
        digest = before if content is None else hashlib.sha256(content).digest()
        yield None if content is None or digest == before else frame(content)
        before = digest
        due = max(due + config.poll_seconds, time.monotonic())
        while (left := due - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
            if left > 0.5:
                yield None


def _ask(opener: OpenerDirector, config: Config, headers: dict[str, str], max_bytes: int) -> tuple[bytes | None, str]:
    """Return the image and its ETag; None: it has not changed.

    Raises:
        OSError: there is no image of at most `max_bytes` within the time limit.
    """
    end = time.monotonic() + config.timeout_seconds
    try:
        with opener.open(Request(config.url, headers=headers), timeout=config.timeout_seconds) as answer:
            content = bytearray()
            while piece := answer.read1(CHUNK):
                content += piece
                if len(content) > max_bytes:
                    raise ConnectionError(f"{config.url} sends more than {max_bytes:,} bytes, the most of an image.")
                if time.monotonic() > end:
                    raise _SlowError(
                        f"{config.url} has not sent its image in {config.timeout_seconds:g} s. Raise timeout_seconds, "
                        "or use a faster network."
                    )
            return bytes(content), answer.headers.get("ETag", "")
    except HTTPError as error:
        if error.code == 304:
            return None, headers["If-None-Match"]
        raise ConnectionError(f"{config.url} answers {error.code} {error.reason}. Check it in a browser.") from error
    except (URLError, HTTPException, ConnectionResetError) as error:
        raise ConnectionError(
            f"{config.url} cannot be read: {reason(error)}. Check url, timeout_seconds, and that the device runs."
        ) from error
    except _SlowError:
        raise
    except TimeoutError as error:
        raise TimeoutError(
            f"{config.url} has not answered in {config.timeout_seconds:g} s. Check url, timeout_seconds, and that the "
            "device runs."
        ) from error
