"""The gate that every request passes: it lets nobody past who may not, and says who it is."""

from __future__ import annotations

import asyncio
import ipaddress
from datetime import UTC, datetime
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normweave.serve import login
from normweave.serve.access import Access
from normweave.serve.records import Token

OPEN = ("/healthz", "/readyz")
"""Routes that ask for no token."""
ANONYMOUS = Token(name="anyone", role="engineer", digest="", created_at=datetime.fromtimestamp(0, UTC))
"""Who everyone is where no token is asked for."""


class AuthenticationMiddleware:
    """ASGI: lets nobody past who may not, and says who it is in `request.state.token`.

    A cookie is worth less than a token: it reads, and works the page, but only from the page's own origin.

    Args:
        access: None: requests to a loopback name or address are let in as `ANONYMOUS`: else a page
            from elsewhere could, by a name of its own that it lets point here.
    """

    def __init__(self, app: ASGIApp, *, access: Access | None) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse or pass on."""
        if scope["type"] not in ("http", "websocket") or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        headers = Headers(scope=scope)
        if self._access is None:
            if not is_loopback(_split(f"//{headers.get('host', '')}").hostname or ""):
                await _refuse(
                    scope, receive, send, 403, "Without tokens this machine answers to localhost only."
                )
                return
            if not _same_origin(scope, headers):
                await _refuse(scope, receive, send, 403, "This page may not be worked from another origin.")
                return
            state["token"] = ANONYMOUS
            await self._app(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"] in (login.LOGIN, login.LOGOUT):
            await login.answer(scope, receive, send, access=self._access)
            return
        given = headers.get("authorization")
        if given is not None:
            kind, _, secret = given.partition(" ")
            token = await asyncio.to_thread(self._access.authenticate, secret.strip())
            if kind.lower() != "bearer" or token is None:
                await _refuse(scope, receive, send, 401, "The token is unknown, expired or revoked.")
                return
            state["token"] = token
            await self._app(scope, receive, send)
            return
        cookie = cookie_of(headers)
        token = await asyncio.to_thread(self._access.authenticate_session, cookie) if cookie else None
        if token is None or cookie is None:
            if login.is_page_request(scope, headers):
                await login.page(status=401)(scope, receive, send)
                return
            await _refuse(scope, receive, send, 401, "A token is needed: send 'Authorization: Bearer TOKEN'.")
            return
        if not _same_origin(scope, headers):
            await _refuse(scope, receive, send, 403, "This page may not be worked from another origin.")
            return
        if scope["path"].startswith("/v1/") and scope["method"] not in ("GET", "HEAD"):
            await _refuse(
                scope, receive, send, 403, "A login only reads here: send 'Authorization: Bearer TOKEN'."
            )
            return
        state["token"] = token
        if self._access.needs_renewal(cookie):
            renewed = login.set_cookie(
                self._access.create_session(token),
                seconds=self._access.session_seconds,
                secure=scope["scheme"] in ("https", "wss"),
            )
            send = _with_header(send, b"set-cookie", renewed.encode())
        await self._app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def cookie_of(headers: Headers) -> str | None:
    """The login that a request brings."""
    try:
        cookies: SimpleCookie = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return None
    morsel = cookies.get(login.COOKIE)
    return None if morsel is None else morsel.value


def _same_origin(scope: Scope, headers: Headers) -> bool:
    """Whether a request that changes something comes from a page of this server, as far as the browser says."""
    if scope["type"] == "http" and scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return True
    origin = headers.get("origin")
    return origin is None or _split(origin).netloc == headers.get("host")


def _split(address: str) -> SplitResult:
    """An address in its parts, which are empty where it is none."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 4401 if status == 401 else 4403, "reason": reason})
        return
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    response: Response = JSONResponse({"error": reason}, status_code=status, headers=headers)
    await response(scope, receive, send)


def _with_header(send: Send, name: bytes, value: bytes) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.accept"):
            headers: list[Any] = list(message.get("headers", []))
            message = {**message, "headers": [*headers, (name, value)]}
        await send(message)

    return wrapped
