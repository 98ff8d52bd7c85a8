"""Connections to SQLite or PostgreSQL, transactions, locks of several servers, and migrations."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, Engine, create_engine, event, func, make_url, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from normweave.errors import ConfigError, DataError, MissingError, NormweaveError

MIGRATIONS = Path(__file__).parent / "migrations"
TIMEOUT_SECONDS = 10
"""Longest wait for a connection to PostgreSQL, or for another writer of an SQLite file."""
IDLE_SECONDS = 60
"""PostgreSQL ends a transaction that does nothing for so long, since it may hold locks that others wait for."""
LOST_SECONDS = 15
"""After about this time PostgreSQL and the server notice that the other machine is gone."""
_MIGRATION_LOCK = 0x6E6F726D
"""The advisory lock of PostgreSQL that a migration holds."""
LockName = Literal["inspections", "files", "tokens", "models", "line", "images", "leader", "watch"]
"""What an advisory lock of PostgreSQL protects. inspections, files, tokens: of the database; the others: of a line."""
_alembic = threading.Lock()
"""Alembic keeps its current migration in a global variable."""
_URL_CURE = "Write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE, with %40 for an @ in the password."


class StoreError(NormweaveError):
    """The database or the disk failed; the records of the call may not be stored."""


class Database:
    """A connection pool. Use `Database.open`.

    After a failure, the next transaction connects again.

    Attributes:
        name: its URL without a password.
    """

    def __init__(self, engine: Engine, *, name: str) -> None:
        self._engine = engine
        self.name = name

    @classmethod
    def open(cls, where: str | Path, *, migrate: bool = True) -> Database:
        """Connect, and migrate the tables to the current revision.

        Args:
            where: an SQLite file, or a URL: sqlite:///FILE, or postgresql://USER:PASSWORD@HOST/DATABASE with options
                of libpq after a `?`.
            migrate: whether tables of an older version are migrated; else they are refused, since a server may use
                them.

        Raises:
            ConfigError: the URL is not valid.
            MissingError: psycopg is not installed.
            StoreError: the database does not answer.
            DataError: it was written by a newer normweave, its encoding is not UTF-8, or it is not migrated.
        """
        url = URL.create("sqlite", database=str(where)) if isinstance(where, Path) else _read_url(where)
        hidden = {key: "***" for key in url.query if "password" in key}
        name = url.update_query_dict(hidden).render_as_string(hide_password=True)
        if not migrate and url.database and url.drivername == "sqlite" and not Path(url.database).is_file():
            raise DataError(
                f"There is no database {url.database}. Give that of a server, or the folder of serve --data."
            )
        database = cls(make_engine(url), name=name)
        try:
            with database.writing() as connection:
                database._migrate(connection, allowed=migrate)
        except BaseException:
            database.close()
            raise
        return database

    def _migrate(self, connection: Connection, *, allowed: bool) -> None:
        from alembic import command  # the import takes a third of a second, and is needed here only
        from alembic.config import Config
        from alembic.migration import MigrationContext
        from alembic.script import ScriptDirectory

        if connection.dialect.name == "postgresql":
            encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
            if encoding != "UTF8":
                raise DataError(
                    f"The database {self.name} is in {encoding}, which cannot hold every name. Make one in UTF-8: "
                    "createdb --encoding=UTF8 --template=template0 NAME"
                )
            # Only one of several starting servers migrates; with SQLite, the start of a transaction has this effect.
            connection.exec_driver_sql("SET LOCAL lock_timeout = 0")  # a migration of many rows takes its time
            connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        current = set(MigrationContext.configure(connection).get_current_heads())
        if foreign := current - known:
            raise DataError(
                f"The database {self.name} is at revision {', '.join(sorted(foreign))}, and this normweave knows up "
                f"to {max(known)}. Upgrade with: pip install -U normweave"
            )
        if not allowed and current != {max(known)}:
            raise DataError(
                f"The database {self.name} is at revision {', '.join(sorted(current)) or 'none'}, and this normweave "
                f"reads {max(known)}. Start the server of this version once, or use the version of the server."
            )
        with _alembic:
            command.upgrade(config, "head")

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @property
    def is_shared(self) -> bool:
        """Whether several servers can use it: PostgreSQL. An SQLite file has one writer at a time, and one server."""
        return self._engine.dialect.name == "postgresql"

    @property
    def path(self) -> Path:
        """File of an SQLite database."""
        return Path(str(self._engine.url.database))

    def lock(self, connection: Connection, name: LockName, *of: str, shared: bool = False) -> None:
        """Wait for a lock that is held until the end of the transaction; without effect for SQLite.

        Args:
            of: what it belongs to, such as the name of a line.
            shared: several transactions can hold it like this, but none beside one that does not share it.
        """
        if self.is_shared:
            take = func.pg_advisory_xact_lock_shared if shared else func.pg_advisory_xact_lock
            connection.execute(select(take(lock_key(name, *of))))

    @contextmanager
    def locked(self, name: LockName, *of: str) -> Iterator[None]:
        """Hold a lock apart from other transactions; see `lock`. Without effect for SQLite."""
        if not self.is_shared:
            yield
            return
        with self.writing() as connection:
            self.lock(connection, name, *of)
            yield

    def dedicated(self) -> Any:
        """Return a psycopg connection outside the pool, in autocommit mode; the caller closes it. PostgreSQL only.

        Raises:
            StoreError: the database failed.
        """
        with self._errors():
            raw = self._engine.raw_connection()
            raw.detach()
            connection: Any = raw.dbapi_connection
            connection.autocommit = True
            return connection

    def reading(self) -> AbstractContextManager[Connection]:
        """Return a transaction that only reads.

        Raises:
            StoreError: the database failed.
        """
        return self._transaction(writes=False)

    def writing(self) -> AbstractContextManager[Connection]:
        """Return a transaction that may write. SQLite needs to know this at its start.

        Raises:
            StoreError: the database failed.
            IntegrityError: a constraint of a table is violated.
        """
        return self._transaction(writes=True)

    @contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Connection]:
        with self._errors(), self._engine.connect() as connection:
            connection.execution_options(normweave_writes=writes)
            with connection.begin():
                yield connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except (DBAPIError, PoolTimeoutError) as error:
            reason = " ".join(str(error.orig if isinstance(error, DBAPIError) else error).split())
            cure = (
                "that its folder exists, is writable and not full, and that no other program holds it"
                if self._engine.dialect.name == "sqlite"
                else "that it runs, that this machine may reach it, and its name and password"
            )
            raise StoreError(f"The database {self.name} failed: {reason}. Check {cure}.") from error


def lock_key(name: LockName, *of: str) -> int:
    """Return the number of an advisory lock of PostgreSQL."""
    digest = hashlib.sha256("\0".join(("normweave", name, *of)).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _read_url(url: str) -> URL:
    """Parse the URL and set the driver. No error message contains the URL, which may contain a password."""
    try:
        read = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(f"The URL of the database cannot be read. {_URL_CURE}") from error
    if read.drivername == "sqlite":
        if read.database in (None, "", ":memory:"):
            raise ConfigError(f"A database in memory loses everything when the server stops. {_URL_CURE}")
        return read
    if read.drivername not in ("postgresql", "postgresql+psycopg"):
        raise ConfigError(f"Databases of type {read.drivername!r} are not supported. {_URL_CURE}")
    if "@" in (read.host or "") or not read.database:
        raise ConfigError(f"The URL of the database has no database name, or its host contains an @. {_URL_CURE}")
    try:
        import psycopg  # noqa: F401 - SQLAlchemy imports it by name
    except ImportError as error:
        raise MissingError(
            'A PostgreSQL database needs psycopg, which is not installed. pip install "normweave[postgres]"'
        ) from error
    return read.set(drivername="postgresql+psycopg")


def make_engine(url: URL) -> Engine:
    """Return an engine that tests a connection before using it and, for SQLite, writes through to the disk."""
    if url.drivername != "sqlite":
        return _make_postgres_engine(url)

    engine = create_engine(url, pool_pre_ping=True, hide_parameters=True, connect_args={"timeout": TIMEOUT_SECONDS})

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the BEGIN of the driver comes too late; `_begin` sends it
        _enable_wal(connection)
        for setting in ("synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {setting}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that reads first and then writes fails at once if another one wrote in between: so wait here.
        writes = connection.get_execution_options()["normweave_writes"]
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _make_postgres_engine(url: URL) -> Engine:
    """Return an engine whose connections end soon if the other machine is gone, and wait for no lock for ever."""
    limits = {
        "connect_timeout": TIMEOUT_SECONDS,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": (LOST_SECONDS - 5) // 2,
        "tcp_user_timeout": 1000 * LOST_SECONDS,
    }
    given = {name: value for name, value in limits.items() if name not in url.query}
    engine = create_engine(url, pool_pre_ping=True, hide_parameters=True, connect_args=given)

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        settings = {
            "lock_timeout": f"{TIMEOUT_SECONDS}s",
            "idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s",
            "tcp_keepalives_idle": "5",
            "tcp_keepalives_interval": "2",
            "tcp_keepalives_count": str(limits["keepalives_count"]),
        }
        with connection.cursor() as cursor:
            cursor.execute("; ".join(f"SET {name} = '{value}'" for name, value in settings.items()))
        connection.commit()

    return engine


def _enable_wal(connection: Any) -> None:
    """Set the journal mode to WAL; retry, since SQLite ignores the timeout of the driver for this statement."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").close()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return
