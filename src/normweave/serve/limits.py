"""Limits of request sizes and times, and security headers of every answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normweave.errors import NormweaveError
from normweave.serve import handlers, problems
from normweave.serve.config import ServeConfig

log = logging.getLogger(__name__)
PART_BYTES = 256 * 2**10
_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),  # a browser names no origin with a form under no-referrer
    # NiceGUI compiles templates in the browser and sets inline styles; nothing is loaded from other hosts.
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
        b"base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    ),
)


class _TooMuchError(Exception):
    """The request exceeds a limit; the answer has this status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class LimitsMiddleware:
    """ASGI middleware that limits the bytes of a request, of all requests together, and the time to receive a body.

    Bytes count from their arrival until the request is answered, since they may be in memory until then.
    """

    def __init__(self, app: ASGIApp, *, config: ServeConfig) -> None:
        self._app = app
        self._config = config
        self._arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application with limits, and answer 408, 413 or 429 if a limit is exceeded."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = 0
        started = complete = False
        refused: _TooMuchError | None = None
        deadline = asyncio.get_running_loop().time() + self._config.receive_seconds

        def refuse(status: int, reason: str) -> _TooMuchError:
            nonlocal refused
            refused = _TooMuchError(status, reason)
            return refused

        def take(count: int) -> None:
            nonlocal held
            limit = self._config.max_request_bytes
            if held + count > limit:
                raise refuse(
                    413,
                    f"The request has more than {limit:,} bytes, the maximum of this server. Send fewer images.",
                )
            if self._arriving + count > self._config.max_arriving_bytes:
                raise refuse(429, "Too many requests arrive at once. Send this request again in a moment.")
            held += count
            self._arriving += count

        async def limited_receive() -> Message:
            nonlocal complete
            if complete:  # the next message is the end of the connection, which may come much later
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise refuse(
                    408,
                    f"The request had not arrived after {self._config.receive_seconds:g} s. Send it again.",
                ) from None
            if message["type"] == "http.request":
                take(len(message.get("body", b"")))
                complete = not message.get("more_body", False)
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if refused is not None and not started:
                return  # dropped: the answer below replaces that of the application
            if message["type"] == "http.response.start":
                started = True
                headers: list[Any] = list(message.get("headers", []))
                names = {name for name, _ in headers}
                headers += [pair for pair in _SECURITY_HEADERS if pair[0] not in names]
                message = {**message, "headers": headers}
            for part in _parts(message):
                await send(part)

        try:
            if (length := _length(scope)) is not None and length > self._config.max_request_bytes:
                take(length)
            await self._app(scope, limited_receive, send_with_headers)
        except NormweaveError as error:  # of the authentication; those of routes are answered there
            if refused is None and not started:
                log.warning("A request could not be authenticated: %s", error)
                await handlers.unavailable(scope)(scope, receive, send_with_headers)
        except ClientDisconnect:
            log.debug("The client of %s closed the connection before its request had arrived.", scope["path"])
        except Exception:
            if refused is None or started:
                raise
        finally:
            self._arriving -= held
        if refused is not None and not started:
            started = True
            answer = problems.answer(refused.status, str(refused), headers={"Connection": "close"})
            await answer(scope, receive, send_with_headers)


def _parts(message: Message) -> Iterator[Message]:
    """Yield a message, its body in parts: the server waits for a slow client between them, not within one."""
    body = message.get("body", b"")
    for start in range(0, len(body) - PART_BYTES, PART_BYTES):
        yield {**message, "body": body[start : start + PART_BYTES], "more_body": True}
    rest = (len(body) - 1) // PART_BYTES * PART_BYTES if body else 0
    yield {**message, "body": body[rest:]} if rest else message


def _length(scope: Scope) -> int | None:
    """Return the value of the Content-Length header; None if it is missing or malformed."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and len(value) < 20:
            return int(value)
    return None
