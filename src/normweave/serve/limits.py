"""How much may arrive, and what every answer tells the browser."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normweave.serve.config import ServeConfig

RETRY_SECONDS = 1
_SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    # The page compiles its templates in the browser and styles elements one by one; nothing comes from elsewhere.
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
        b"base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    ),
)


class _TooMuchError(Exception):
    """A body beyond what is taken; the answer that says so."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class LimitsMiddleware:
    """ASGI: bounds the bytes of a request, those of all requests together, and the time that a body takes to come.

    Bytes count from their arrival until the request is answered, since so long someone may hold them.
    """

    def __init__(self, app: ASGIApp, *, config: ServeConfig) -> None:
        self._app = app
        self._config = config
        self._arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, as far as it goes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = 0
        begun = whole = False
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
                    f"The request has more than {limit:,} bytes, which is the most that this server takes. "
                    "Send fewer images at a time.",
                )
            if self._arriving + count > self._config.max_arriving_bytes:
                raise refuse(429, "Too many requests arrive at once. Send this one again in a moment.")
            held += count
            self._arriving += count

        async def limited() -> Message:
            nonlocal whole
            if whole:  # what comes now is the end of the connection, for which an answer may wait for long
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
                whole = not message.get("more_body", False)
            return message

        async def safe(message: Message) -> None:
            nonlocal begun
            if refused is not None and not begun:
                return  # whatever the application makes of it: the answer is given below
            if message["type"] == "http.response.start":
                begun = True
                there = {name for name, _ in message.get("headers", [])}
                more: list[Any] = [pair for pair in _SAFE if pair[0] not in there]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        try:
            if (length := _length(scope)) is not None and length > self._config.max_request_bytes:
                take(length)
            await self._app(scope, limited, safe)
        except Exception:
            if refused is None or begun:
                raise
        finally:
            self._arriving -= held
        if refused is not None and not begun:
            begun = True
            headers = {"Connection": "close"} | (
                {"Retry-After": str(RETRY_SECONDS)} if refused.status == 429 else {}
            )
            answer = JSONResponse({"error": str(refused)}, status_code=refused.status, headers=headers)
            await answer(scope, receive, safe)


def _length(scope: Scope) -> int | None:
    """What the request says of the length of its body."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and len(value) < 20:
            return int(value)
    return None
