"""Access tokens of programs, and login sessions of people.

A program sends its token with each request (`Authorization: Bearer …`). A person enters a token once at /login and gets
a session cookie with the id of the token and the time of expiry, signed with the key of this server. The server stores
no secrets: of a token its SHA-256, of a session nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from normweave.errors import DataError
from normweave.serve.audit import FailedLogins
from normweave.serve.records import SERVER, NotFoundError, Role, Token
from normweave.serve.store import Store

PREFIX = "nw_"
"""Start of every token, by which secret scanners can recognise it."""
CACHE_SECONDS = 5.0
"""Lifetime of the cached tokens: a token that another process revokes is refused after at most this time."""
_KEY_BYTES = 32


class NewToken(NamedTuple):
    """A new token with its secret, which is not stored."""

    token: Token
    secret: str


class Access:
    """The tokens and sessions of a server.

    Args:
        folder: contains the key that signs sessions; the first start creates it.
        session_hours: lifetime of a session after its last use.
    """

    def __init__(self, store: Store, *, folder: Path, session_hours: float) -> None:
        self._store = store
        self.failed_logins = FailedLogins(store)
        self._key = _read_or_create_key(folder / "session.key")
        self.session_seconds = session_hours * 3600
        self._lock = threading.Lock()
        self._cache: dict[str, Token] = {}
        self._cached_at = -CACHE_SECONDS

    def create_first_tokens(self) -> list[NewToken]:
        """Create a token for each role if the store has none; return the new tokens."""
        if self._store.tokens():
            return []
        return [self.create(name=role, role=role) for role in ("engineer", "operator")]

    def close(self) -> None:
        """Record the failed logins that are not recorded yet."""
        self.failed_logins.close()

    def create(
        self, *, name: str, role: Role, days: float | None = None, actor: str = SERVER, by: int | None = None
    ) -> NewToken:
        """Create a token that expires after `days`; None: never.

        Args:
            actor: who creates it.
            by: id of the token of the actor.
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
            ),
            actor=actor,
            by=by,
        )
        self._clear_cache()
        return NewToken(token, secret)

    def tokens(self) -> list[Token]:
        """Return all tokens, including expired and revoked ones."""
        return self._store.tokens()

    def revoke(self, id: int, *, actor: str = SERVER, by: int | None = None) -> Token:
        """Revoke a token and its sessions.

        Args:
            actor: who revokes it.
            by: id of the token of the actor.

        Raises:
            NotFoundError: no token has this id.
            LastTokenError: it is the last valid token of an engineer.
        """
        token = self._store.revoke(id, datetime.now(UTC), actor=actor, by=by)
        self._clear_cache()
        if token is None:
            raise NotFoundError(f"There is no token {id}. GET /v1/tokens lists them.")
        return token

    def authenticate(self, secret: str) -> Token | None:
        """Return the token with this secret; None if it is unknown, expired or revoked."""
        return _if_valid(self._tokens().get(_digest(secret)))

    def log_in(self, token: Token, *, address: str) -> str:
        """Record a login, and return the value of a session cookie for this token."""
        self._store.add_audit("login", actor=token.name, token=token.id, address=address)
        return self.create_session(token)

    def log_out(self, cookie: str, *, address: str) -> None:
        """Record the end of a session."""
        token = self.authenticate_session(cookie)
        if token is not None:
            self._store.add_audit("logout", actor=token.name, token=token.id, address=address)

    def create_session(self, token: Token, *, expires_at: float | None = None) -> str:
        """Return the value of a session cookie for a token.

        Args:
            expires_at: seconds since 1970; None: after the lifetime of a session.
        """
        return self._signed(token, int(time.time() + self.session_seconds if expires_at is None else expires_at))

    def authenticate_session(self, cookie: str) -> Token | None:
        """Return the token of a session; None if the cookie is malformed, forged or expired, or the token not valid."""
        number, _, rest = cookie.partition(".")
        expiry, _, _ = rest.partition(".")
        if not (number.isascii() and number.isdigit() and expiry.isascii() and expiry.isdigit()):
            return None
        if len(expiry) > 12 or int(expiry) < time.time():
            return None
        token = next((token for token in self._tokens().values() if str(token.id) == number), None)
        if token is None or not hmac.compare_digest(self._signed(token, int(expiry)), cookie):
            return None
        return _if_valid(token)

    def needs_renewal(self, cookie: str) -> bool:
        """Return whether less than half of the lifetime of a valid session remains."""
        return int(cookie.split(".")[1]) - time.time() < self.session_seconds / 2

    def _signed(self, token: Token, expiry: int) -> str:
        text = f"{token.id}.{expiry}"
        signature = hmac.new(self._key, f"{text}.{token.digest}".encode(), hashlib.sha256).hexdigest()
        return f"{text}.{signature}"

    def _tokens(self) -> dict[str, Token]:
        with self._lock:
            if time.monotonic() - self._cached_at >= CACHE_SECONDS:
                self._cache = {token.digest: token for token in self._store.tokens()}
                self._cached_at = time.monotonic()
            return self._cache

    def _clear_cache(self) -> None:
        with self._lock:
            self._cached_at = -CACHE_SECONDS


def _if_valid(token: Token | None) -> Token | None:
    return token if token is not None and token.is_valid(datetime.now(UTC)) else None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _read_or_create_key(path: Path) -> bytes:
    """Return the key in this file, which only its owner may read."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise DataError(
                f"{path} has {len(key)} bytes, but a key has {_KEY_BYTES}. Remove the file: the next start creates a "
                "new key, and everyone has to log in again."
            ) from None
        return key
    key = secrets.token_bytes(_KEY_BYTES)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    return key
