"""Every inspection, review, token and change of the line, in SQLite or PostgreSQL.

Both keep the same tables: moments as microseconds since 1970 (UTC), so that spans of time are sums of whole
numbers, and what is only shown as JSON text, so that it comes back as it was. Text from outside is cut to the
length of its column, and characters that PostgreSQL refuses (NUL, lone surrogates) become U+FFFD; a filter is
treated alike, so that it finds what it was asked for. Images lie elsewhere: `files.Files`.
"""

from __future__ import annotations

import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    TypeDecorator,
    create_engine,
    delete,
    event,
    func,
    insert,
    make_url,
    select,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from normweave.errors import ConfigError, DataError, MissingError, NormweaveError
from normweave.serve.records import (
    Bucket,
    Count,
    Filter,
    Inspection,
    RateChange,
    Review,
    ScoredImage,
    StoredImage,
    Token,
)
from normweave.types import DefectBox, Outcome, Tile

MIGRATIONS = Path(__file__).parent / "migrations"
SHORT, LONG = 255, 4000
"""Characters that are kept of a name, and of a comment or an error."""
CHUNK = 500
"""Inspections read or removed in one go."""
PATIENCE_SECONDS = 10
"""To wait for a connection to PostgreSQL, or for another writer of an SQLite file."""
_MIGRATING = 0x6E6F726D
"""The advisory lock of PostgreSQL that a migration holds."""
_alembic = threading.Lock()
"""Alembic keeps the migration that it is at in a global variable."""
_BIGGEST = 2**63 - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SINCE_YEAR_1 = (_EPOCH - datetime.min.replace(tzinfo=UTC)) // timedelta(microseconds=1)
"""From the first Monday of the calendar, 0001-01-01, so that weeks begin on Mondays."""
_WIDTHS = {"hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(weeks=1)}
_HOW_URL = (
    "Write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE, with %40 for an @ in the password."
)


class StoreError(NormweaveError):
    """The database does not do what it should, or not now; what was to be kept may not be kept."""


class Words(TypeDecorator[str]):
    """Text from outside, cut to `length` characters."""

    impl = String
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """What every database can hold of it."""
        return None if value is None else re.sub("[\0\ud800-\udfff]", "\ufffd", value)[: self.length]


class Moment(TypeDecorator[datetime]):
    """A moment with its time zone, as whole microseconds since 1970 (UTC)."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Microseconds; a moment without time zone raises TypeError."""
        return None if value is None else (value - _EPOCH) // timedelta(microseconds=1)

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        """The moment in UTC."""
        return None if value is None else _EPOCH + timedelta(microseconds=value)


class Json(TypeDecorator[Any]):
    """Lists as JSON text, ASCII only; databases' own JSON types change numbers and refuse characters."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Its JSON."""
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """Lists again."""
        return None if value is None else json.loads(value)


def _number() -> Column[int]:
    """A primary key that is never given twice (AUTOINCREMENT, by the migrations); SQLite counts only in INTEGER."""
    return Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True)


METADATA = MetaData()
INSPECTIONS = Table(
    "inspections",
    METADATA,
    _number(),
    Column("received_at", Moment, nullable=False),
    Column("name", Words(SHORT), nullable=False),
    Column("source", Words(SHORT), nullable=False),
    Column("actor", Words(SHORT), nullable=False),
    Column("routed", Integer),
    # the outcome
    Column("image_path", Words(SHORT)),
    Column("verdict", Words(SHORT)),
    Column("pred_score", Float(53)),
    Column("p_value", Float(53)),
    Column("threshold", Float(53)),
    Column("false_alarm_rate", Float(53)),
    Column("category", Words(SHORT)),
    Column("subclass", Words(SHORT)),
    Column("subclass_distance", Float(53)),
    Column("subclass_p_value", Float(53)),
    Column("unseen", Boolean, nullable=False),
    Column("experts", Json, nullable=False),
    Column("adapted", Boolean, nullable=False),
    Column("boxes", Json, nullable=False),
    Column("height", Integer),
    Column("width", Integer),
    Column("latency_ms", Float(53)),
    Column("model", Words(SHORT)),
    Column("bundle_hash", Words(SHORT)),
    Column("error", Words(LONG)),
    # the picture; all empty without one
    Column("image_hash", Words(64)),
    Column("image_type", Words(SHORT)),
    Column("image_bytes", BigInteger),
    Column("grids_hash", Words(64)),
    Column("grids_bytes", BigInteger),
    Column("tiles", Json),
    Column("smoothing", Float(53)),
    Column("map_threshold", Float(53)),
    # the review that stands, so that no list has to look for it among all of them
    Column("decision", Words(SHORT)),
    Column("reviewed_at", Moment),
    Column("reviewer", Words(SHORT)),
    Column("comment", Words(LONG)),
    Index("inspections_received_at", "received_at"),
    Index("inspections_verdict", "verdict", "id"),
    Index("inspections_name", "name", "id"),
    Index("inspections_decision", "decision", "id"),
    Index("inspections_bundle_hash", "bundle_hash", "id"),
    Index("inspections_image_hash", "image_hash", "id", "image_bytes"),
    Index("inspections_grids_hash", "grids_hash", "id", "grids_bytes"),
)
REVIEWS = Table(
    "reviews",
    METADATA,
    _number(),
    Column("inspection", ForeignKey("inspections.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("at", Moment, nullable=False),
    Column("decision", Words(SHORT), nullable=False),
    Column("reviewer", Words(SHORT), nullable=False),
    Column("comment", Words(LONG), nullable=False),
)
TOKENS = Table(
    "tokens",
    METADATA,
    _number(),
    Column("name", Words(SHORT), nullable=False),
    Column("role", Words(SHORT), nullable=False),
    Column("digest", Words(64), nullable=False, unique=True),
    Column("created_at", Moment, nullable=False),
    Column("expires_at", Moment),
    Column("revoked_at", Moment),
)
RATES = Table(
    "rates",
    METADATA,
    _number(),
    Column("at", Moment, nullable=False),
    Column("bundle_hash", Words(SHORT), nullable=False),
    Column("false_alarm_rate", Float(53), nullable=False),
    Column("actor", Words(SHORT), nullable=False),
)


class Store:
    """The tables at work. A method may be called from any thread, and is one transaction unless it says otherwise.

    Every method raises StoreError when the database fails, and the next call connects anew.
    """

    def __init__(self, engine: Engine, *, name: str) -> None:
        self._engine = engine
        self._name = name

    @classmethod
    def open(cls, where: str | Path) -> Store:
        """Connect, and bring the tables to what this version of normweave needs.

        Args:
            where: an SQLite file, or a URL: sqlite:///FILE, or postgresql://USER:PASSWORD@HOST/DATABASE with what
                libpq takes behind a `?`.

        Raises:
            ConfigError: this is no such URL.
            MissingError: psycopg is not installed.
            StoreError: the database does not answer.
            DataError: it was written by a newer normweave, or cannot hold every character.
        """
        url = URL.create("sqlite", database=str(where)) if isinstance(where, Path) else _read_url(where)
        hidden = {key: "***" for key in url.query if "password" in key}
        store = cls(
            _make_engine(url),
            name=url.update_query_dict(hidden).render_as_string(hide_password=True),
        )
        try:
            with store._writing() as connection:
                store._migrate(connection)
        except BaseException:
            store.close()
            raise
        return store

    def _migrate(self, connection: Connection) -> None:
        from alembic import command  # takes a third of a second, and nothing else needs it
        from alembic.config import Config
        from alembic.migration import MigrationContext
        from alembic.script import ScriptDirectory

        if connection.dialect.name == "postgresql":
            encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
            if encoding != "UTF8":
                raise DataError(
                    f"The database {self._name} is in {encoding}, which cannot hold every name. Make one in UTF-8: "
                    "createdb --encoding=UTF8 --template=template0 NAME"
                )
            # Servers that start at once wait here for the first; SQLite waits at the beginning of the transaction.
            connection.execute(select(func.pg_advisory_xact_lock(_MIGRATING)))
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if foreign := set(MigrationContext.configure(connection).get_current_heads()) - known:
            raise DataError(
                f"The database {self._name} is at revision {', '.join(sorted(foreign))}, and this normweave knows up "
                f"to {max(known)}. Upgrade with: pip install -U normweave"
            )
        with _alembic:
            command.upgrade(config, "head")

    def close(self) -> None:
        """Let go of every connection."""
        self._engine.dispose()

    def ping(self) -> None:
        """Ask the database for an answer."""
        with self._reading() as connection:
            connection.execute(select(1))

    @contextmanager
    def _reading(self, *, writes: bool = False) -> Iterator[Connection]:
        """A transaction; those that write say so, since SQLite has to know when it begins."""
        try:
            with self._engine.connect() as connection:
                connection.execution_options(normweave_writes=writes)
                with connection.begin():
                    yield connection
        except IntegrityError:
            raise
        except (DBAPIError, PoolTimeoutError) as error:
            reason = " ".join(str(error.orig if isinstance(error, DBAPIError) else error).split())
            cure = (
                "that its folder is there, may be written and is not full, and that no other program holds it"
                if self._engine.dialect.name == "sqlite"
                else "that it runs, that this machine may reach it, and its name and password"
            )
            raise StoreError(f"The database {self._name} failed: {reason}. Check {cure}.") from error

    def _writing(self) -> AbstractContextManager[Connection]:
        return self._reading(writes=True)

    # ── inspections ──────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, inspections: Sequence[Inspection]) -> list[Inspection]:
        """Keep inspections, all or none, and return them as they are kept, with ids that rise in this order.

        They are on disk when this returns.
        """
        if wrong := [one for one in inspections if one.id or one.review]:
            raise ValueError(f"An inspection is kept once and reviewed afterwards, got {wrong[0]}.")
        if not inspections:
            return []
        with self._writing() as connection:
            ids = connection.scalars(
                insert(INSPECTIONS).returning(INSPECTIONS.c.id, sort_by_parameter_order=True),
                [_row(one) for one in inspections],
            ).all()
            rows = connection.execute(select(INSPECTIONS).where(INSPECTIONS.c.id.in_(ids)))
            kept = {row.id: _inspection(row) for row in rows}
        return [kept[id] for id in ids]

    def inspection(self, id: int) -> Inspection | None:
        """The inspection of this number, if there is one."""
        with self._reading() as connection:
            row = connection.execute(select(INSPECTIONS).where(_is(INSPECTIONS, id))).one_or_none()
        return None if row is None else _inspection(row)

    def inspections(self, chosen: Filter, *, before: int | None = None, limit: int) -> list[Inspection]:
        """A page of inspections, newest first.

        Args:
            before: only those with lower ids: the last id of the page before.
            limit: at least 1.
        """
        query = select(INSPECTIONS).where(*_clauses(chosen)).order_by(INSPECTIONS.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(INSPECTIONS.c.id < _bounded(before))
        with self._reading() as connection:
            return [_inspection(row) for row in connection.execute(query)]

    def iter_inspections(self, chosen: Filter) -> Iterator[Inspection]:
        """Inspections oldest first, a few at a time and a transaction for each few, up to the newest of now."""
        ids = select(INSPECTIONS.c.id).where(*_clauses(chosen)).order_by(INSPECTIONS.c.id.desc()).limit(1)
        with self._reading() as connection:
            first, last = 1, connection.scalar(ids) or 0
        while first <= last:
            query = select(INSPECTIONS).where(*_clauses(chosen), INSPECTIONS.c.id.between(first, last))
            with self._reading() as connection:
                rows = connection.execute(query.order_by(INSPECTIONS.c.id).limit(CHUNK)).all()
            yield from map(_inspection, rows)
            if len(rows) < CHUNK:
                return
            first = rows[-1].id + 1

    def scored_images(self, bundle_hash: str, *, newest: int) -> list[ScoredImage]:
        """The newest inspections by this bundle, but for images that could not be read, in the few numbers of each."""
        table = INSPECTIONS.c
        columns = (table.verdict, table.pred_score, table.subclass_distance, table.routed, table.unseen)
        query = select(*columns).where(table.bundle_hash == bundle_hash, table.error.is_(None))
        with self._reading() as connection:
            rows = connection.execute(query.order_by(table.id.desc()).limit(newest))
            return [ScoredImage(*row) for row in rows]

    def count(self, chosen: Filter) -> int:
        """How many there are."""
        with self._reading() as connection:
            query = select(func.count()).select_from(INSPECTIONS).where(*_clauses(chosen))
            return connection.execute(query).scalar_one()

    def counts(self, chosen: Filter, *, bucket: Bucket) -> list[Count]:
        """Inspections per span of time (UTC, weeks from Monday), category and subclass, oldest first.

        Spans without any do not appear.
        """
        table = INSPECTIONS.c
        received = type_coerce(table.received_at, BigInteger)
        width = _WIDTHS[bucket] // timedelta(microseconds=1)
        start = type_coerce(received - (received + _SINCE_YEAR_1) % width, Moment)
        tallies = {
            "normal": table.verdict == "normal",
            "anomalous": table.verdict == "anomalous",
            "unknown": table.verdict == "unknown",
            "unreadable": table.error.is_not(None),
            "accepted": table.decision == "accept",
            "rejected": table.decision == "reject",
        }
        query = (
            select(
                start.label("start"),
                table.category,
                table.subclass,
                *(func.count().filter(which).label(name) for name, which in tallies.items()),
            )
            .where(*_clauses(chosen))
            .group_by("start", table.category, table.subclass)
        )
        with self._reading() as connection:
            found = [Count(**row._mapping) for row in connection.execute(query)]
        # Not in SQL, where the order of words and of empty ones depends on the database.
        return sorted(found, key=lambda one: (one.start, one.category or "", one.subclass or ""))

    # ── reviews ──────────────────────────────────────────────────────────────────────────────────────────────────

    def review(self, id: int, review: Review) -> Inspection:
        """Add what a person said; `undo` withdraws the standing review and brings no earlier one back.

        Raises:
            LookupError: there is no such inspection.
        """
        withdrawn = review.decision == "undo"
        standing = {
            "decision": None if withdrawn else review.decision,
            "reviewed_at": None if withdrawn else review.at,
            "reviewer": None if withdrawn else review.reviewer,
            "comment": None if withdrawn else review.comment,
        }
        with self._writing() as connection:
            # First, since it locks the row: reviews of two at once are added in the order in which they stood.
            query = update(INSPECTIONS).where(_is(INSPECTIONS, id)).values(standing).returning(INSPECTIONS)
            row = connection.execute(query).one_or_none()
            if row is None:
                raise LookupError(f"There is no inspection {id}, or retention has removed it.")
            connection.execute(insert(REVIEWS).values(inspection=id, **vars(review)))
            return _inspection(row)

    def reviews(self, id: int) -> list[Review]:
        """Everything that was said of an inspection, in that order, also what was withdrawn."""
        query = select(REVIEWS).where(REVIEWS.c.inspection == _bounded(id)).order_by(REVIEWS.c.id)
        with self._reading() as connection:
            return [
                Review(at=row.at, decision=row.decision, reviewer=row.reviewer, comment=row.comment)
                for row in connection.execute(query)
            ]

    # ── rates and tokens ─────────────────────────────────────────────────────────────────────────────────────────

    def add_rate(self, change: RateChange) -> None:
        """Keep that somebody moved the line."""
        with self._writing() as connection:
            connection.execute(insert(RATES).values(**vars(change)))

    def rate(self, bundle_hash: str) -> RateChange | None:
        """Where the line of a bundle was put last, if it was ever moved."""
        query = select(RATES).where(RATES.c.bundle_hash == bundle_hash).order_by(RATES.c.id.desc()).limit(1)
        with self._reading() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _rate(row)

    def rates(self) -> list[RateChange]:
        """Every move, oldest first."""
        with self._reading() as connection:
            return [_rate(row) for row in connection.execute(select(RATES).order_by(RATES.c.id))]

    def add_token(self, token: Token) -> Token:
        """Keep a token and return it with its id.

        Raises:
            DataError: there is one of the same digest.
        """
        given = {name: value for name, value in vars(token).items() if name != "id"}
        try:
            with self._writing() as connection:
                return _token(connection.execute(insert(TOKENS).values(given).returning(TOKENS)).one())
        except IntegrityError as error:
            raise DataError(
                f"The secret of the token {token.name!r} is that of another token. Draw a new one."
            ) from error

    def token(self, digest: str) -> Token | None:
        """The token of this digest, also if it was revoked or is out of date: look at it."""
        with self._reading() as connection:
            row = connection.execute(select(TOKENS).where(TOKENS.c.digest == digest)).one_or_none()
        return None if row is None else _token(row)

    def tokens(self) -> list[Token]:
        """Every token there ever was, oldest first."""
        with self._reading() as connection:
            return [_token(row) for row in connection.execute(select(TOKENS).order_by(TOKENS.c.id))]

    def revoke(self, id: int, at: datetime) -> Token | None:
        """End a token, if there is one of this number; one that was ended before keeps its moment."""
        ended = func.coalesce(TOKENS.c.revoked_at, type_coerce(at, Moment))
        with self._writing() as connection:
            query = update(TOKENS).where(_is(TOKENS, id)).values(revoked_at=ended).returning(TOKENS)
            row = connection.execute(query).one_or_none()
        return None if row is None else _token(row)

    # ── retention ────────────────────────────────────────────────────────────────────────────────────────────────

    def expire(self, *, before: datetime) -> Iterator[str]:
        """Remove inspections that came before this moment, and yield the hashes that nothing refers to any more.

        A transaction for each few, whose hashes are yielded before the next. One thread at a time.
        """
        table = INSPECTIONS.c
        old = select(table.id, table.image_hash, table.grids_hash).where(table.received_at < before)
        while True:
            with self._writing() as connection:
                rows = connection.execute(old.order_by(table.received_at).limit(CHUNK)).all()
                connection.execute(delete(INSPECTIONS).where(table.id.in_([row.id for row in rows])))
                hashes = _hashes(rows)
                free = sorted(hashes - _last_references(connection, hashes).keys())
            yield from free
            if len(rows) < CHUNK:
                return

    def shrink(self, *, max_bytes: int) -> Iterator[str]:
        """Forget pictures, oldest first, until at most so many bytes remain; yield what nothing refers to any more.

        No more pictures than needed. A transaction for each few, whose hashes are yielded before the next. One
        thread at a time.
        """
        table = INSPECTIONS.c
        used = self.bytes_used()
        columns = (table.id, table.image_hash, table.image_bytes, table.grids_hash, table.grids_bytes)
        oldest = select(*columns).where(table.image_hash.is_not(None)).order_by(table.id).limit(CHUNK)
        nothing = dict.fromkeys(_STORED_IMAGE)
        while used > max_bytes:
            with self._writing() as connection:
                rows = connection.execute(oldest).all()
                last = _last_references(connection, _hashes(rows))
                free: dict[str, int] = {}
                forgotten: list[int] = []
                for row in rows:
                    if used - sum(free.values()) <= max_bytes:
                        break
                    forgotten.append(row.id)
                    # A content goes with the last that refers to it.
                    contents = ((row.image_hash, row.image_bytes), (row.grids_hash, row.grids_bytes))
                    free |= {digest: size for digest, size in contents if last[digest] == row.id}
                query = update(INSPECTIONS).where(table.id.in_(forgotten)).values(nothing)
                connection.execute(query)
            yield from free
            used -= sum(free.values())
            if len(rows) < CHUNK:
                return

    def is_referenced(self, digest: str) -> bool:
        """Whether an inspection refers to this content."""
        with self._reading() as connection:
            return bool(_last_references(connection, {digest}))

    def bytes_used(self) -> int:
        """Of all contents together, each counted once however many refer to it; goes through the whole index."""
        table = INSPECTIONS.c
        contents = union_all(
            select(table.image_hash.label("digest"), table.image_bytes.label("size")),
            select(table.grids_hash, table.grids_bytes),
        ).subquery()
        sizes = select(func.max(contents.c.size).label("size")).where(contents.c.digest.is_not(None))
        each = sizes.group_by(contents.c.digest).subquery()
        with self._reading() as connection:
            return int(connection.scalar(select(func.sum(each.c.size))) or 0)


# ── the database ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_url(url: str) -> URL:
    """The URL taken apart, with the driver that is used. No message holds the URL, which may hold a password."""
    try:
        read = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(f"The store's URL cannot be read. {_HOW_URL}") from error
    if read.drivername == "sqlite":
        if read.database in (None, "", ":memory:"):
            raise ConfigError(f"A store in memory would lose everything with the server. {_HOW_URL}")
        return read
    if read.drivername not in ("postgresql", "postgresql+psycopg"):
        raise ConfigError(f"A store of the kind {read.drivername!r} is not known. {_HOW_URL}")
    if "@" in (read.host or "") or not read.database:
        raise ConfigError(f"The store's URL names no database, or its host holds an @. {_HOW_URL}")
    try:
        import psycopg  # noqa: F401 - SQLAlchemy asks for it by name
    except ImportError as error:
        raise MissingError(
            'A store in PostgreSQL needs psycopg, which is not installed. pip install "normweave[postgres]"'
        ) from error
    return read.set(drivername="postgresql+psycopg")


def _make_engine(url: URL) -> Engine:
    """Connections that are asked whether they still live before they are used."""
    if url.drivername != "sqlite":
        waiting = {} if "connect_timeout" in url.query else {"connect_timeout": PATIENCE_SECONDS}
        return create_engine(url, pool_pre_ping=True, hide_parameters=True, connect_args=waiting)

    engine = create_engine(
        url, pool_pre_ping=True, hide_parameters=True, connect_args={"timeout": PATIENCE_SECONDS}
    )

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver's own BEGIN comes too late; ours is below
        _keep_a_wal(connection)
        for setting in ("synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {setting}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Who reads first and writes then is refused at once if another wrote between; so wait at the beginning.
        writes = connection.get_execution_options()["normweave_writes"]
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _keep_a_wal(connection: Any) -> None:
    """Of two that turn a new file to WAL at once SQLite refuses one there and then, without the driver's time-out."""
    patience = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").close()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > patience:
                raise
            time.sleep(0.02)
        else:
            return


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_OUTCOME = [field.name for field in fields(Outcome) if field.name != "anomaly_map"]
_STORED_IMAGE = [field.name for field in fields(StoredImage)]


def _row(inspection: Inspection) -> dict[str, Any]:
    """The columns of a new inspection."""
    row = {name: getattr(inspection, name) for name in ("received_at", "name", "source", "actor", "routed")}
    row |= {name: getattr(inspection.outcome, name) for name in _OUTCOME}
    return row | {name: getattr(inspection.image, name, None) for name in _STORED_IMAGE}


def _inspection(row: Row[Any]) -> Inspection:
    """A row of `inspections`."""
    said = {name: getattr(row, name) for name in _OUTCOME}
    said["experts"] = tuple((name, weight) for name, weight in row.experts)
    said["boxes"] = tuple(DefectBox(*box) for box in row.boxes)
    image = review = None
    if row.image_hash is not None:
        image = StoredImage(**{name: getattr(row, name) for name in _STORED_IMAGE})
        image = replace(image, tiles=tuple(Tile(*tile) for tile in row.tiles))
    if row.decision is not None:
        review = Review(at=row.reviewed_at, decision=row.decision, reviewer=row.reviewer, comment=row.comment)
    return Inspection(
        id=row.id,
        received_at=row.received_at,
        name=row.name,
        source=row.source,
        actor=row.actor,
        outcome=Outcome(**said),
        routed=row.routed,
        image=image,
        review=review,
    )


def _token(row: Row[Any]) -> Token:
    return Token(**row._mapping)


def _rate(row: Row[Any]) -> RateChange:
    return RateChange(**{name: value for name, value in row._mapping.items() if name != "id"})


def _bounded(id: int) -> int:
    """A number that the database can compare; no id lies outside."""
    return max(0, min(id, _BIGGEST))


def _is(table: Table, id: int) -> ColumnElement[bool]:
    return table.c.id == _bounded(id)


def _clauses(chosen: Filter) -> list[ColumnElement[bool]]:
    """What `chosen` asks for, all of which must hold."""
    table = INSPECTIONS.c
    clauses = [
        table[name] == value
        for name in ("category", "subclass", "name", "source", "bundle_hash", "decision")
        if (value := getattr(chosen, name)) is not None
    ]
    if chosen.since is not None:
        clauses.append(table.received_at >= chosen.since)
    if chosen.until is not None:
        clauses.append(table.received_at < chosen.until)
    if chosen.verdicts:
        clauses.append(table.verdict.in_(chosen.verdicts))
    if chosen.unreadable is not None:
        clauses.append(table.error.is_not(None) if chosen.unreadable else table.error.is_(None))
    if chosen.reviewed is not None:
        clauses.append(table.decision.is_not(None) if chosen.reviewed else table.decision.is_(None))
    if chosen.p_value_below is not None:
        clauses.append(table.p_value <= chosen.p_value_below)
    return clauses


def _hashes(rows: Sequence[Any]) -> set[str]:
    """Of all their pictures."""
    return {digest for row in rows for digest in (row.image_hash, row.grids_hash) if digest is not None}


def _last_references(connection: Connection, hashes: set[str]) -> dict[str, int]:
    """The newest inspection that refers to each of these contents; those that none refers to are not in it."""
    last: dict[str, int] = {}
    for column in (INSPECTIONS.c.image_hash, INSPECTIONS.c.grids_hash):
        query = select(column, func.max(INSPECTIONS.c.id)).where(column.in_(hashes)).group_by(column)
        for digest, id in connection.execute(query):
            last[digest] = max(id, last.get(digest, 0))
    return last
