"""Who may do what: tokens, logins of the page, and the gate that every request passes.

A program sends its token with each request (`Authorization: Bearer …`). A person gives it once at /login and gets a
cookie, which says which token it stands for and until when, signed with a key that only this server has. The server
keeps no secret: of a token its SHA-256, of a login nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import os
import secrets
import threading
import time
from datetime import UTC, datetime, timedelta
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normweave.errors import DataError
from normweave.serve import login
from normweave.serve.records import NotThereError, Role, Token
from normweave.serve.store import Store

OPEN = ("/healthz", "/readyz")
"""Routes that ask for no token."""

PREFIX = "nw_"
"""Of every token, so that one that lies about can be told for what it is."""
FRESH_SECONDS = 5.0
"""A token that another process revokes is refused after this at the latest."""
ANYONE = Token(name="anyone", role="engineer", digest="", created_at=datetime.fromtimestamp(0, UTC))
"""Who everyone is where no token is asked for."""
_KEY_BYTES = 32


class Made(NamedTuple):
    """A new token, and the only time that its secret is seen."""

    token: Token
    secret: str


class Access:
    """The tokens of a server.

    Args:
        folder: where the key of the logins lies; it is made at the first start.
        session_hours: how long a login lasts after its last use.
    """

    def __init__(self, store: Store, *, folder: Path, session_hours: float) -> None:
        self._store = store
        self._key = _key(folder / "session.key")
        self.session_seconds = session_hours * 3600
        self._lock = threading.Lock()
        self._known: dict[str, Token] = {}
        self._known_at = -FRESH_SECONDS

    def first_tokens(self) -> list[Made]:
        """One for each role, if there are none yet."""
        if self._store.tokens():
            return []
        return [self.make(name=role, role=role) for role in ("engineer", "operator")]

    def make(self, *, name: str, role: Role, days: float | None = None) -> Made:
        """A new token.

        Args:
            days: until it expires; None: never.
        """
        secret = PREFIX + secrets.token_urlsafe(_KEY_BYTES)
        now = datetime.now(UTC)
        token = self._store.add_token(
            Token(
                name=name,
                role=role,
                digest=_digest(secret),
                created_at=now,
                expires_at=None if days is None else now + timedelta(days=days),
            )
        )
        self._forget()
        return Made(token, secret)

    def all(self) -> list[Token]:
        """Every token that was ever made."""
        return self._store.tokens()

    def revoke(self, id: int) -> Token:
        """Make a token worthless, and the logins by it.

        Raises:
            NotThereError: there is none.
        """
        token = self._store.revoke(id, datetime.now(UTC))
        self._forget()
        if token is None:
            raise NotThereError(f"There is no token {id}. See GET /v1/tokens for those there are.")
        return token

    def holder(self, secret: str) -> Token | None:
        """Whose token this is; None of one that is unknown, expired or revoked."""
        return self._valid(self._tokens().get(_digest(secret)))

    def login(self, token: Token) -> str:
        """A cookie's value that stands for a token."""
        return self._signed(token, int(time.time() + self.session_seconds))

    def session(self, value: str) -> Token | None:
        """Whose login a cookie is; None of one that is none, has run out, or whose token is no longer good."""
        number, _, rest = value.partition(".")
        until, _, _ = rest.partition(".")
        if not (number.isascii() and number.isdigit() and until.isascii() and until.isdigit()):
            return None
        if len(until) > 12 or int(until) < time.time():
            return None
        token = next((token for token in self._tokens().values() if str(token.id) == number), None)
        if token is None or not hmac.compare_digest(self._signed(token, int(until)), value):
            return None
        return self._valid(token)

    def half_over(self, value: str) -> bool:
        """Whether a good login should be renewed."""
        return int(value.split(".")[1]) - time.time() < self.session_seconds / 2

    def _signed(self, token: Token, until: int) -> str:
        what = f"{token.id}.{until}"
        proof = hmac.new(self._key, f"{what}.{token.digest}".encode(), hashlib.sha256).hexdigest()
        return f"{what}.{proof}"

    def _valid(self, token: Token | None) -> Token | None:
        if token is None or token.revoked_at is not None:
            return None
        return None if token.expires_at is not None and token.expires_at <= datetime.now(UTC) else token

    def _tokens(self) -> dict[str, Token]:
        with self._lock:
            if time.monotonic() - self._known_at >= FRESH_SECONDS:
                self._known = {token.digest: token for token in self._store.tokens()}
                self._known_at = time.monotonic()
            return self._known

    def _forget(self) -> None:
        with self._lock:
            self._known_at = -FRESH_SECONDS


class Gate:
    """ASGI: lets nobody past who may not, and says who it is in `request.state.token`.

    A cookie is worth less than a token: it reads, and works the page, but only from the page's own origin.

    Args:
        access: None: everyone is let in, as `ANYONE`, who speaks to this machine by one of its own names: else a page
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
            state["token"] = ANYONE
            await self._app(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"] in (login.LOGIN, login.LOGOUT):
            await login.answer(scope, receive, send, access=self._access)
            return
        given = headers.get("authorization")
        if given is not None:
            kind, _, secret = given.partition(" ")
            token = await asyncio.to_thread(self._access.holder, secret.strip())
            if kind.lower() != "bearer" or token is None:
                await _refuse(scope, receive, send, 401, "The token is unknown, expired or revoked.")
                return
            state["token"] = token
            await self._app(scope, receive, send)
            return
        cookie = cookie_of(headers)
        token = await asyncio.to_thread(self._access.session, cookie) if cookie else None
        if token is None or cookie is None:
            if login.wanted(scope, headers):
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
        if self._access.half_over(cookie):
            renewed = login.set_cookie(
                self._access.login(token),
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


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _key(path: Path) -> bytes:
    """The key that is kept there, made if there is none; nobody else may read it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise DataError(
                f"{path} has {len(key)} bytes, but a key has {_KEY_BYTES}. Remove it: a new one is made, and everyone "
                "has to log in again."
            ) from None
        return key
    key = secrets.token_bytes(_KEY_BYTES)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    return key
