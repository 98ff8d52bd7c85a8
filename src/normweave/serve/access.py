"""Access tokens of programs, and login sessions of people.

A program sends its token with each request (`Authorization: Bearer …`). A person enters a token once at /login and gets
a session cookie with a random secret. The server stores no secrets: of a token and of a session the SHA-256.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from normweave.serve.audit import FailedLogins
from normweave.serve.database import StoreError
from normweave.serve.records import SERVER, NotFoundError, Role, Session, Token
from normweave.serve.store import Store

log = logging.getLogger(__name__)

PREFIX = "nw_"
"""Start of every token, by which secret scanners can recognise it."""
CACHE_SECONDS = 5.0
"""Lifetime of cached tokens and sessions: what another process revokes or ends is refused after at most this time."""
UNKNOWN_SECONDS = 0.5
"""A token that is not known is looked for in the store at most so often: another process may have created it."""
USE_SECONDS = 60.0
"""The time of the last use of a session is stored at most once in this time."""
MOST_CACHED = 1000
"""Maximum number of cached sessions."""
_KEY_BYTES = 32


class NewToken(NamedTuple):
    """A new token with its secret, which is not stored."""

    token: Token
    secret: str


class Access:
    """The tokens and sessions of a server.

    Attributes:
        line: the name of the line.

    Args:
        session_hours: lifetime of a session after its last use.
        session_max_hours: lifetime of a session after the login.
    """

    def __init__(self, store: Store, *, session_hours: float, session_max_hours: float = 168.0) -> None:
        self._store = store
        self.line = store.line
        self.failed_logins = FailedLogins(store)
        self._idle, self._longest = timedelta(hours=session_hours), timedelta(hours=session_max_hours)
        self.session_max_seconds = session_max_hours * 3600
        self._lock = threading.Lock()
        self._cache: dict[str, Token] = {}
        self._cached_at = -CACHE_SECONDS
        self._sessions: dict[str, tuple[float, Session | None]] = {}  # by digest, with the time of reading

    def create_first_tokens(self) -> list[NewToken]:
        """Create a token for each role if the store has none; return the new tokens."""
        with self._store.database.locked("tokens"):  # of several servers that start, one does
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
            LastTokenError: it is the last valid token of an engineer, or the last one that does not expire.
        """
        token = self._store.revoke(id, datetime.now(UTC), actor=actor, by=by)
        self._clear_cache()
        if token is None:
            raise NotFoundError(f"There is no token {id}. GET /v1/tokens lists them.")
        return token

    def authenticate(self, secret: str) -> Token | None:
        """Return the token with this secret; None if it is unknown, expired or revoked."""
        digest = _digest(secret)
        found = self._tokens().get(digest) or self._tokens(UNKNOWN_SECONDS).get(digest)
        return _if_valid(found)

    def log_in(self, token: Token, *, address: str) -> str:
        """Start a session, and return the value of its cookie.

        Args:
            address: network address of the browser, for the audit.
        """
        secret = secrets.token_urlsafe(_KEY_BYTES)
        now = datetime.now(UTC)
        session = Session(digest=_digest(secret), token=token.id, created_at=now, used_at=now)
        self._store.add_session(
            session,
            actor=token.name,
            address=address,
            created_before=now - self._longest,
            used_before=now - self._idle,
        )
        return secret

    def log_out(self, cookie: str, *, address: str) -> None:
        """End a session; without effect if it has ended."""
        token = self.authenticate_session(cookie)
        if token is not None:
            self._store.end_session(_digest(cookie), actor=token.name, token=token.id, address=address)
        with self._lock:
            self._sessions.clear()

    def authenticate_session(self, cookie: str, *, use: bool = False) -> Token | None:
        """Return the token of a session; None if the cookie is unknown, the session has ended, or the token is invalid.

        Args:
            use: a person does something, which extends the session.
        """
        digest, now = _digest(cookie), datetime.now(UTC)
        session = self._session(digest)
        if session is None or now >= session.created_at + self._longest or now >= session.used_at + self._idle:
            return None
        if use and now >= session.used_at + min(timedelta(seconds=USE_SECONDS), self._idle / 2):
            try:
                self._store.use_session(digest, now)
            except StoreError as error:  # what is stored can be read all the same
                log.warning("The use of a login is not stored: %s", error)
            with self._lock:
                self._sessions.pop(digest, None)
        return _if_valid(next((token for token in self._tokens().values() if token.id == session.token), None))

    def _session(self, digest: str) -> Session | None:
        with self._lock:
            read_at, session = self._sessions.get(digest, (-CACHE_SECONDS, None))
        now = time.monotonic()
        if now - read_at >= CACHE_SECONDS:
            session = self._store.session(digest)
            with self._lock:
                if len(self._sessions) >= MOST_CACHED:
                    self._sessions.clear()
                self._sessions[digest] = now, session
        return session

    def _tokens(self, seconds: float | None = None) -> dict[str, Token]:
        """Return the tokens as they were at most so long ago; None: `CACHE_SECONDS`."""
        with self._lock:
            if time.monotonic() - self._cached_at >= (CACHE_SECONDS if seconds is None else seconds):
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
