"""Authentication of every request, by a token or by the session cookie of a login."""

from __future__ import annotations

import asyncio
import ipaddress
from datetime import UTC, datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normweave.serve import login, problems
from normweave.serve.access import Access
from normweave.serve.records import Token

OPEN = ("/healthz", "/readyz")
"""Routes that need no token."""
ANONYMOUS = Token(name="anyone", role="engineer", digest="", created_at=datetime.fromtimestamp(0, UTC))
"""Token of every request to a server without tokens."""


class _RefusedError(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class AuthenticationMiddleware:
    """ASGI middleware that refuses requests without a valid token and sets `request.state.token`.

    A session cookie allows less than a token: pages, and GET requests to the REST interface, from the same origin.

    Args:
        access: None: every request is `ANONYMOUS`, but its Host header must be a loopback name or address. Otherwise a
            website could reach the server through a host name of its own that resolves to this machine.
    """

    def __init__(self, app: ASGIApp, *, access: Access | None) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application, or answer 401 or 403."""
        if scope["type"] not in ("http", "websocket") or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        access, headers = self._access, Headers(scope=scope)
        if access is not None and scope["type"] == "http" and scope["path"] in (login.LOGIN, login.LOGOUT):
            await login.answer(scope, receive, send, access=access)
            return
        authorization, cookie = headers.get("authorization"), None
        try:
            if access is None:
                token = _anonymous(scope, headers)
            elif authorization is not None:
                token = await _by_token(access, authorization)
            else:
                cookie = login.session_cookie(headers)
                token = await _by_session(access, cookie, scope, headers)
        except _RefusedError as error:
            if access is not None and authorization is not None:
                await asyncio.to_thread(access.failed_logins.add, login.client_address(scope))
            if error.status == 401 and authorization is None and login.is_page_request(scope, headers):
                await login.page(status=401)(scope, receive, send)
            else:
                await _refuse(scope, receive, send, error)
            return
        scope.setdefault("state", {})["token"] = token
        if access is not None and cookie is not None and access.needs_renewal(cookie):
            renewed = login.set_cookie(
                access.create_session(token),
                seconds=access.session_seconds,
                secure=scope["scheme"] in ("https", "wss"),
            )
            send = _with_header(send, b"set-cookie", renewed.encode())
        await self._app(scope, receive, send)


def _anonymous(scope: Scope, headers: Headers) -> Token:
    if not is_loopback(_split(f"//{headers.get('host', '')}").hostname or ""):
        raise _RefusedError(403, "A server without tokens answers requests to localhost only.")
    _check_origin(scope, headers)
    return ANONYMOUS


async def _by_token(access: Access, authorization: str) -> Token:
    scheme, _, secret = authorization.partition(" ")
    token = await asyncio.to_thread(access.authenticate, secret.strip())
    if scheme.lower() != "bearer" or token is None:
        raise _RefusedError(401, "The token is unknown, expired or revoked.")
    return token


async def _by_session(access: Access, cookie: str | None, scope: Scope, headers: Headers) -> Token:
    token = await asyncio.to_thread(access.authenticate_session, cookie) if cookie else None
    if token is None:
        raise _RefusedError(401, "A token is needed: send 'Authorization: Bearer TOKEN'.")
    _check_origin(scope, headers)
    if scope["path"].startswith("/v1/") and scope["method"] not in ("GET", "HEAD"):
        raise _RefusedError(403, "A login only allows reading here: send 'Authorization: Bearer TOKEN'.")
    return token


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is a loopback one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _check_origin(scope: Scope, headers: Headers) -> None:
    """Refuse a request that may change something if the browser names another origin."""
    if scope["type"] == "http" and scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return
    origin = headers.get("origin")
    if origin is not None and _split(origin).netloc != headers.get("host"):
        raise _RefusedError(403, "Requests from pages of another origin are not allowed.")


def _split(address: str) -> SplitResult:
    """Parse a URL; all parts are empty if it is malformed."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


async def _refuse(scope: Scope, receive: Receive, send: Send, error: _RefusedError) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 4000 + error.status, "reason": error.reason})
        return
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    await problems.answer(error.status, error.reason, headers=headers)(scope, receive, send)


def _with_header(send: Send, name: bytes, value: bytes) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.accept"):
            headers: list[Any] = list(message.get("headers", []))
            message = {**message, "headers": [*headers, (name, value)]}
        await send(message)

    return wrapped
