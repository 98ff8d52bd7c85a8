"""Who may do what: tokens of programs and logins of people.

A program sends its token with each request (`Authorization: Bearer …`). A person gives it once at /login and gets a
cookie, which says which token it stands for and until when, signed with a key that only this server has. The server
keeps no secret: of a token its SHA-256, of a login nothing.
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
from normweave.serve.records import NotFoundError, Role, Token
from normweave.serve.store import Store

PREFIX = "nw_"
"""Of every token, so that one that lies about can be told for what it is."""
FRESH_SECONDS = 5.0
"""A token that another process revokes is refused after this at the latest."""
_KEY_BYTES = 32


class NewToken(NamedTuple):
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

    def create_first_tokens(self) -> list[NewToken]:
        """One for each role, if there are none yet."""
        if self._store.tokens():
            return []
        return [self.create(name=role, role=role) for role in ("engineer", "operator")]

    def create(self, *, name: str, role: Role, days: float | None = None) -> NewToken:
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
        return NewToken(token, secret)

    def all(self) -> list[Token]:
        """Every token that was ever made."""
        return self._store.tokens()

    def revoke(self, id: int) -> Token:
        """Make a token worthless, and the logins by it.

        Raises:
            NotFoundError: there is none.
        """
        token = self._store.revoke(id, datetime.now(UTC))
        self._forget()
        if token is None:
            raise NotFoundError(f"There is no token {id}. See GET /v1/tokens for those there are.")
        return token

    def authenticate(self, secret: str) -> Token | None:
        """Whose token this is; None of one that is unknown, expired or revoked."""
        return self._valid(self._tokens().get(_digest(secret)))

    def create_session(self, token: Token) -> str:
        """A cookie's value that stands for a token."""
        return self._signed(token, int(time.time() + self.session_seconds))

    def authenticate_session(self, value: str) -> Token | None:
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

    def needs_renewal(self, value: str) -> bool:
        """Whether a good login should be renewed."""
        return int(value.split(".")[1]) - time.time() < self.session_seconds / 2

    def _signed(self, token: Token, until: int) -> str:
        what = f"{token.id}.{until}"
        proof = hmac.new(self._key, f"{what}.{token.digest}".encode(), hashlib.sha256).hexdigest()
        return f"{what}.{proof}"

    def _valid(self, token: Token | None) -> Token | None:
        return token if token is not None and token.is_valid(datetime.now(UTC)) else None

    def _tokens(self) -> dict[str, Token]:
        with self._lock:
            if time.monotonic() - self._known_at >= FRESH_SECONDS:
                self._known = {token.digest: token for token in self._store.tokens()}
                self._known_at = time.monotonic()
            return self._known

    def _forget(self) -> None:
        with self._lock:
            self._known_at = -FRESH_SECONDS


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
