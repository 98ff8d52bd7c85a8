"""Authentication of every request, by a token or by the session cookie of a login."""

from __future__ import annotations

import asyncio
import ipaddress
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normweave.serve import login, problems
from normweave.serve.access import Access
from normweave.serve.database import StoreError
from normweave.serve.records import Token

OPEN = ("/healthz", "/readyz")
"""Routes that need no token."""
ANONYMOUS = Token(name="anyone", role="engineer", digest="", created_at=datetime.fromtimestamp(0, UTC))
"""Token of every request to a server without tokens."""
_EVENT = "42"
"""Start of a message of socket.io in which a person does something, unlike the answer to a ping."""


class _RefusedError(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class AuthenticationMiddleware:
    """ASGI middleware that refuses requests without a valid token, and sets `request.state.token` and `.login`.

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
        try:
            if access is not None and scope["type"] == "http" and scope["path"] in (login.LOGIN, login.LOGOUT):
                _check_origin(scope, headers)
                await login.answer(scope, receive, send, access=access)
                return
            authenticated = await _authenticate(access, scope, headers, use=scope["type"] == "http")
        except _RefusedError as error:
            with_token = "authorization" in headers
            if access is not None and with_token:
                await asyncio.to_thread(access.failed_logins.add, login.client_address(scope))
            if access is not None and error.status == 401 and not with_token and login.is_page_request(scope, headers):
                await login.page(status=401, line=access.line)(scope, receive, send)
            else:
                await _refuse(scope, receive, send, error)
            return
        scope.setdefault("state", {}).update(authenticated._asdict())
        if access is not None and scope["type"] == "websocket":
            receive, send = _while_logged_in(access, scope, receive, send)
        await self._app(scope, receive, send)


class Authenticated(NamedTuple):
    """Who sends a request; `request.state` has these attributes."""

    token: Token
    login: str
    """Identifies the session, or the token of a request without a session."""


async def _authenticate(access: Access | None, scope: Scope, headers: Headers, *, use: bool) -> Authenticated:
    """Return who sends a request.

    Args:
        use: a person does something, which extends the session.

    Raises:
        _RefusedError: nobody who may.
    """
    if access is None:
        return Authenticated(_anonymous(scope, headers), "")
    authorization = headers.get("authorization")
    if authorization is not None:
        return Authenticated(await _by_token(access, authorization), authorization)
    cookie = login.session_cookie(headers, line=access.line)
    return Authenticated(await _by_session(access, cookie, scope, headers, use=use), cookie or "")


def _while_logged_in(access: Access, scope: Scope, receive: Receive, send: Send) -> tuple[Receive, Send]:
    """Return functions that close a websocket with the first message, in either direction, after its login ended."""
    headers = Headers(scope=scope)
    closed = False

    async def refused(*, use: bool = False) -> bool:
        nonlocal closed
        if not closed:
            try:
                await _authenticate(access, scope, headers, use=use)
            except (_RefusedError, StoreError) as error:
                closed = True
                status = error.status if isinstance(error, _RefusedError) else 503
                await send({"type": "websocket.close", "code": 4000 + status, "reason": "No valid login."})
        return closed

    async def bound_receive() -> Message:
        message = await receive()
        if message["type"] == "websocket.receive":
            event = (message.get("text") or "").startswith(_EVENT)
            if await refused(use=event):
                return {"type": "websocket.disconnect", "code": 1008}
        return message

    async def bound_send(message: Message) -> None:
        if message["type"] != "websocket.send" or not await refused():
            await send(message)

    return bound_receive, bound_send


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


async def _by_session(access: Access, cookie: str | None, scope: Scope, headers: Headers, *, use: bool) -> Token:
    token = await asyncio.to_thread(access.authenticate_session, cookie, use=use) if cookie else None
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
