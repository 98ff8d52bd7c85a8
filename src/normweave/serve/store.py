"""Queries over inspections, reviews, tokens, rate changes and the audit. The image files are in `files.Files`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Executable,
    Row,
    Table,
    delete,
    func,
    insert,
    select,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.exc import IntegrityError

from normweave.errors import DataError
from normweave.serve.database import Database
from normweave.serve.delivery_store import count_removed
from normweave.serve.insertion import insert_inspections
from normweave.serve.records import (
    SERVER,
    AuditEntry,
    AuditEvent,
    Bucket,
    Count,
    Filter,
    Inspection,
    LastTokenError,
    RateChange,
    Review,
    ScoredImage,
    Session,
    Token,
)
from normweave.serve.tables import (
    AUDIT,
    EPOCH,
    IDENTITY,
    INSPECTIONS,
    PROBE,
    RATES,
    REVIEW,
    REVIEWS,
    SESSIONS,
    STORED_IMAGE,
    TOKENS,
    Timestamp,
    add_entry,
    to_inspection,
)

DATABASE = "store.sqlite"
"""SQLite file, inside the data folder of a server."""
CHUNK = 500
"""Maximum number of inspections read or removed in one transaction."""
_MAX_ID = 2**63 - 1
_SINCE_YEAR_1 = (EPOCH - datetime.min.replace(tzinfo=EPOCH.tzinfo)) // timedelta(microseconds=1)
"""From Monday 0001-01-01, so that weeks begin on Mondays."""
_WIDTHS = {"hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(weeks=1)}
_INSPECTION = INSPECTIONS.c


class Store:
    """The records of a server.

    Methods are thread-safe, and each is one transaction unless its docstring differs. All of them raise StoreError
    when the database fails.

    Attributes:
        server: identifies this server among those that use the database, in its notifications of new inspections.
    """

    def __init__(self, database: Database, *, line: str = "") -> None:
        self.database = database
        self.line = line
        self.server = uuid.uuid4().hex

    @classmethod
    def open(cls, where: str | Path, *, line: str = "", migrate: bool = True) -> Store:
        """Connect to an SQLite file or a database URL; arguments and errors are those of `Database.open`.

        Args:
            line: the name of the line, which the entries of the audit get.
        """
        return cls(Database.open(where, migrate=migrate), line=line)

    def close(self) -> None:
        """Close all connections."""
        self.database.close()

    def identity(self) -> str:
        """Return what identifies the database; one that is restored from a backup has the same."""
        return str(self._read(select(IDENTITY.c.id))[0].id)

    def check_writable(self) -> None:
        """Raise StoreError if the database does not answer, or a record could not be stored now."""
        with self.database.writing() as connection:
            connection.execute(update(PROBE).values(at=datetime.now(UTC)))

    def _read(self, query: Executable) -> Sequence[Row[Any]]:
        with self.database.reading() as connection:
            return connection.execute(query).all()

    def _read_one(self, query: Executable) -> Row[Any] | None:
        rows = self._read(query)
        return rows[0] if rows else None

    # ── inspections ──────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, inspections: Sequence[Inspection]) -> list[Inspection]:
        """Store all inspections or none, and return them as stored, with ascending ids.

        They are on disk when this method returns. If another server has stored the same place of the same request with
        a key in the meantime, that inspection is returned instead.
        """
        with self.adding() as add:
            return add(inspections)

    @contextmanager
    def adding(self) -> Iterator[Callable[[Sequence[Inspection]], list[Inspection]]]:
        """Yield a function like `add`, to be called once. No server removes a file that was put in the meantime."""
        if not self.database.is_shared:
            yield self._add
            return
        with self.database.writing() as connection:
            self.database.lock(connection, "files", shared=True)
            yield lambda inspections: self._add(inspections, connection)

    def removing(self) -> AbstractContextManager[None]:
        """Return a context in which no server is between putting a file and storing the inspection that refers to it.

        A server with SQLite has `Files.write_lock` for this.
        """
        return self.database.locked("files")

    def _add(self, inspections: Sequence[Inspection], connection: Connection | None = None) -> list[Inspection]:
        if wrong := [one for one in inspections if one.id or one.review]:
            raise ValueError(f"An inspection is stored once and reviewed afterwards, got {wrong[0]}.")
        if not inspections:
            return []
        if connection is None:
            with self.database.writing() as connection:
                return insert_inspections(self.database, connection, inspections, server=self.server)
        return insert_inspections(self.database, connection, inspections, server=self.server)

    def inspection(self, id: int) -> Inspection | None:
        """Return the inspection with this id, or None."""
        row = self._read_one(select(INSPECTIONS).where(_has_id(INSPECTIONS, id)))
        return None if row is None else to_inspection(row)

    def inspections(
        self, chosen: Filter, *, before: int | None = None, after: int | None = None, limit: int
    ) -> list[Inspection]:
        """Return a page of inspections, newest first; with `after`, oldest first.

        Args:
            before: only inspections with lower ids; the last id of the page before.
            after: only inspections with higher ids; the last id of the page before.
            limit: at least 1.
        """
        order = _INSPECTION.id.desc() if after is None else _INSPECTION.id
        query = select(INSPECTIONS).where(*_conditions(chosen)).order_by(order).limit(limit)
        if after is not None:
            query = query.where(_INSPECTION.id > _bounded(after))
        if before is not None:
            query = query.where(_INSPECTION.id < _bounded(before))
        return [to_inspection(row) for row in self._read(query)]

    def of_request(self, key: str, *, token: int | None) -> list[Inspection]:
        """Return the inspections of the request that came with this Idempotency-Key and token."""
        same = _INSPECTION.token.is_(None) if token is None else _INSPECTION.token == token
        query = select(INSPECTIONS).where(_INSPECTION.request_key == key, same)
        return [to_inspection(row) for row in self._read(query)]

    def iter_inspections(self, chosen: Filter) -> Iterator[Inspection]:
        """Yield inspections up to the newest at the time of the call, oldest first; one transaction for each chunk."""
        conditions = _conditions(chosen)
        newest = self._read_one(select(_INSPECTION.id).where(*conditions).order_by(_INSPECTION.id.desc()).limit(1))
        first, last = 1, 0 if newest is None else newest.id
        while first <= last:
            query = select(INSPECTIONS).where(*conditions, _INSPECTION.id.between(first, last))
            rows = self._read(query.order_by(_INSPECTION.id).limit(CHUNK))
            yield from map(to_inspection, rows)
            if len(rows) < CHUNK:
                return
            first = rows[-1].id + 1

    def scored_images(self, bundle_hash: str, *, newest: int) -> list[ScoredImage]:
        """Return the scores of the newest readable images that this bundle classified, newest first."""
        columns = (
            _INSPECTION.verdict,
            _INSPECTION.pred_score,
            _INSPECTION.subclass_distance,
            _INSPECTION.routed,
            _INSPECTION.unseen,
        )
        query = select(*columns).where(_INSPECTION.bundle_hash == bundle_hash, _INSPECTION.error.is_(None))
        return [ScoredImage._make(row) for row in self._read(query.order_by(_INSPECTION.id.desc()).limit(newest))]

    def count(self, chosen: Filter) -> int:
        """Return the number of inspections."""
        (row,) = self._read(select(func.count()).select_from(INSPECTIONS).where(*_conditions(chosen)))
        return int(row[0])

    def counts(self, chosen: Filter, *, bucket: Bucket) -> list[Count]:
        """Count inspections for each time span (UTC; weeks from Monday), category and subclass, oldest first.

        Spans without inspections are left out.
        """
        received = type_coerce(_INSPECTION.received_at, BigInteger)
        width = _WIDTHS[bucket] // timedelta(microseconds=1)
        start = type_coerce(received - (received + _SINCE_YEAR_1) % width, Timestamp)
        conditions = {
            "normal": _INSPECTION.verdict == "normal",
            "anomalous": _INSPECTION.verdict == "anomalous",
            "unknown": _INSPECTION.verdict == "unknown",
            "unreadable": _INSPECTION.error.is_not(None),
            "accepted": _INSPECTION.decision == "accept",
            "rejected": _INSPECTION.decision == "reject",
        }
        query = (
            select(
                start.label("start"),
                _INSPECTION.category,
                _INSPECTION.subclass,
                *(func.count().filter(condition).label(name) for name, condition in conditions.items()),
            )
            .where(*_conditions(chosen))
            .group_by("start", _INSPECTION.category, _INSPECTION.subclass)
        )
        counts = [Count(**row._mapping) for row in self._read(query)]
        # Sorted here, since the order of text and NULL depends on the database.
        return sorted(counts, key=lambda one: (one.start, one.category or "", one.subclass or ""))

    # ── reviews ──────────────────────────────────────────────────────────────────────────────────────────────────

    def review(self, id: int, review: Review) -> Inspection:
        """Add a reviewer decision and return the inspection.

        `undo` withdraws the current decision; earlier decisions stay withdrawn.

        Raises:
            LookupError: no inspection has this id.
        """
        values = vars(review)
        current = {REVIEW[name]: value for name, value in values.items()}
        if review.decision == "undo":
            current = dict.fromkeys(current)
        with self.database.writing() as connection:
            # The update comes first: it locks the row, so that concurrent reviews are added in this order.
            query = update(INSPECTIONS).where(_has_id(INSPECTIONS, id)).values(current).returning(INSPECTIONS)
            row = connection.execute(query).one_or_none()
            if row is None:
                raise LookupError(f"There is no inspection {id}, or retention has removed it.")
            connection.execute(insert(REVIEWS).values(inspection=id, **values))
            return to_inspection(row)

    def reviews(self, id: int) -> list[Review]:
        """Return all reviewer decisions on an inspection, oldest first, including withdrawn ones."""
        columns = [REVIEWS.c[name] for name in REVIEW]
        query = select(*columns).where(REVIEWS.c.inspection == _bounded(id)).order_by(REVIEWS.c.id)
        return [Review(**row._mapping) for row in self._read(query)]

    def decided(self, reviewer: str, *, since: datetime, limit: int) -> list[int]:
        """Return the ids of the inspections whose current decision is of this reviewer, the last decision first."""
        query = (
            select(REVIEWS.c.inspection)
            .join(INSPECTIONS, _INSPECTION.id == REVIEWS.c.inspection)
            .where(
                REVIEWS.c.reviewer == reviewer,
                REVIEWS.c.at >= since,
                _INSPECTION.reviewer == REVIEWS.c.reviewer,
                _INSPECTION.reviewed_at == REVIEWS.c.at,
            )
            .order_by(REVIEWS.c.id.desc())
            .limit(limit)
        )
        return [row.inspection for row in self._read(query)]

    # ── rates and tokens ─────────────────────────────────────────────────────────────────────────────────────────

    def add_rate(self, change: RateChange, *, token: int | None = None) -> None:
        """Store a change of the false-alarm rate, also in the audit.

        Args:
            token: id of the token of the actor.
        """
        detail = {"bundle_hash": change.bundle_hash, "false_alarm_rate": change.false_alarm_rate}
        with self.database.writing() as connection:
            connection.execute(insert(RATES).values(**vars(change)))
            self._audit(connection, "rate_changed", actor=change.actor, token=token, detail=detail)

    def rate(self, bundle_hash: str) -> RateChange | None:
        """Return the last change of the rate of a bundle, or None."""
        query = select(RATES).where(RATES.c.bundle_hash == bundle_hash).order_by(RATES.c.id.desc()).limit(1)
        row = self._read_one(query)
        return None if row is None else _rate(row)

    def rates(self) -> list[RateChange]:
        """Return all rate changes, oldest first."""
        return [_rate(row) for row in self._read(select(RATES).order_by(RATES.c.id))]

    def add_token(self, token: Token, *, actor: str = SERVER, by: int | None = None) -> Token:
        """Store a token, also in the audit, and return it with its id.

        Args:
            actor: who creates it.
            by: id of the token of the actor.

        Raises:
            DataError: another token has the same digest.
        """
        values = {name: value for name, value in vars(token).items() if name != "id"}
        try:
            with self.database.writing() as connection:
                stored = Token(**connection.execute(insert(TOKENS).values(values).returning(TOKENS)).one()._mapping)
                self._audit(connection, "token_created", actor=actor, token=by, detail=_token_detail(stored))
        except IntegrityError as error:
            raise DataError(
                f"The secret of the token {token.name!r} is that of another token. Draw a new one."
            ) from error
        return stored

    def token(self, digest: str) -> Token | None:
        """Return the token with this digest, or None. It may be expired or revoked."""
        row = self._read_one(select(TOKENS).where(TOKENS.c.digest == digest))
        return None if row is None else Token(**row._mapping)

    def tokens(self) -> list[Token]:
        """Return all tokens, including expired and revoked ones, oldest first."""
        return [Token(**row._mapping) for row in self._read(select(TOKENS).order_by(TOKENS.c.id))]

    def revoke(self, id: int, at: datetime, *, actor: str = SERVER, by: int | None = None) -> Token | None:
        """Revoke the token with this id, also in the audit, and return it, or None.

        A revoked token keeps its time of revocation.

        Args:
            actor: who revokes it.
            by: id of the token of the actor.

        Raises:
            LastTokenError: it is the last valid token of an engineer, or the last one that does not expire.
        """
        with self.database.writing() as connection:
            if connection.dialect.name == "postgresql":  # SQLite has one writer at a time
                connection.exec_driver_sql("LOCK TABLE tokens IN SHARE ROW EXCLUSIVE MODE")
            tokens = {row.id: Token(**row._mapping) for row in connection.execute(select(TOKENS))}
            token = tokens.get(id)
            if token is None or token.revoked_at is not None:
                return token
            engineers = {one.id: one for one in tokens.values() if one.role == "engineer" and one.is_valid(at)}
            if token.expires_at is None:  # others that expire would leave no engineer soon
                engineers = {one.id: one for one in engineers.values() if one.expires_at is None}
            if list(engineers) == [id]:
                lasting = " that does not expire" if token.expires_at is None else ""
                raise LastTokenError(
                    f"The token {id} ({token.name!r}) is the last valid one of an engineer{lasting}, so it cannot be "
                    f"revoked. First create another token with the role engineer{lasting}, or start the server with "
                    "--new-token engineer."
                )
            query = update(TOKENS).where(TOKENS.c.id == id).values(revoked_at=at).returning(TOKENS)
            revoked = Token(**connection.execute(query).one()._mapping)
            self._audit(connection, "token_revoked", actor=actor, token=by, detail=_token_detail(revoked))
        return revoked

    # ── sessions ─────────────────────────────────────────────────────────────────────────────────────────────────

    def add_session(
        self, session: Session, *, actor: str, address: str, created_before: datetime, used_before: datetime
    ) -> None:
        """Store a session, also in the audit, and remove the ended ones.

        Args:
            actor: name of its token.
            created_before: sessions created before this time have ended.
            used_before: sessions last used before this time have ended.
        """
        ended = (SESSIONS.c.created_at < created_before) | (SESSIONS.c.used_at < used_before)
        with self.database.writing() as connection:
            connection.execute(delete(SESSIONS).where(ended))
            connection.execute(insert(SESSIONS).values(**vars(session)))
            self._audit(connection, "login", actor=actor, token=session.token, address=address)

    def session(self, digest: str) -> Session | None:
        """Return the session with this digest, or None. It may have expired."""
        columns = [SESSIONS.c[name] for name in ("digest", "token", "created_at", "used_at")]
        row = self._read_one(select(*columns).where(SESSIONS.c.digest == digest))
        return None if row is None else Session(**row._mapping)

    def use_session(self, digest: str, at: datetime) -> None:
        """Store the time of the last use of a session."""
        with self.database.writing() as connection:
            connection.execute(update(SESSIONS).where(SESSIONS.c.digest == digest).values(used_at=at))

    def end_session(self, digest: str, *, actor: str, token: int, address: str) -> None:
        """Remove a session, and add its end to the audit.

        Args:
            actor: name of its token.
            token: id of its token.
        """
        with self.database.writing() as connection:
            if connection.execute(delete(SESSIONS).where(SESSIONS.c.digest == digest)).rowcount:
                self._audit(connection, "logout", actor=actor, token=token, address=address)

    # ── audit ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _audit(self, connection: Connection, event: AuditEvent, **given: Any) -> None:
        add_entry(connection, AuditEntry(at=datetime.now(UTC), event=event, line=self.line, **given))

    def add_audit(
        self,
        event: AuditEvent,
        *,
        actor: str = "",
        token: int | None = None,
        address: str = "",
        detail: dict[str, Any] | None = None,
    ) -> None:
        """Add an entry to the audit; arguments are the fields of `AuditEntry`."""
        with self.database.writing() as connection:
            self._audit(connection, event, actor=actor, token=token, address=address, detail=detail or {})

    def audit(
        self, *, event: AuditEvent | None = None, line: str | None = None, before: int | None = None, limit: int
    ) -> list[AuditEntry]:
        """Return a page of the audit, newest first.

        Args:
            event: only entries of this event.
            line: only entries of this line.
            before: only entries with lower ids; the last id of the page before.
            limit: at least 1.
        """
        query = select(AUDIT).order_by(AUDIT.c.id.desc()).limit(limit)
        if event is not None:
            query = query.where(AUDIT.c.event == event)
        if line is not None:
            query = query.where(AUDIT.c.line == line)
        if before is not None:
            query = query.where(AUDIT.c.id < _bounded(before))
        return [AuditEntry(**row._mapping) for row in self._read(query)]

    # ── retention ────────────────────────────────────────────────────────────────────────────────────────────────

    def expire(self, *, before: datetime) -> Iterator[str]:
        """Remove inspections received before this time, and yield the hashes that are no longer referenced.

        One transaction for each chunk, whose hashes are yielded before the next one. Not thread-safe.
        """
        columns = (_INSPECTION.id, _INSPECTION.image_hash, _INSPECTION.grids_hash)
        old = select(*columns).where(_INSPECTION.received_at < before).order_by(_INSPECTION.received_at)
        while True:
            with self.database.writing() as connection:
                rows = connection.execute(old.limit(CHUNK)).all()
                ids = [row.id for row in rows]
                count_removed(connection, "inspections", _INSPECTION.id.in_(ids))
                connection.execute(delete(INSPECTIONS).where(_INSPECTION.id.in_(ids)))
                hashes = _hashes(rows)
                free = sorted(hashes - _last_references(connection, hashes).keys())
            yield from free
            if len(rows) < CHUNK:
                return

    def shrink(self, *, max_bytes: int) -> Iterator[str]:
        """Remove images, oldest first, until at most `max_bytes` remain; yield hashes that are no longer referenced.

        Removes no more images than needed; the inspections remain. One transaction for each chunk, whose hashes
        are yielded before the next one. Not thread-safe.
        """
        used = self.bytes_used()
        columns = (
            _INSPECTION.id,
            _INSPECTION.image_hash,
            _INSPECTION.image_bytes,
            _INSPECTION.grids_hash,
            _INSPECTION.grids_bytes,
        )
        oldest = select(*columns).where(_INSPECTION.image_hash.is_not(None)).order_by(_INSPECTION.id)
        while used > max_bytes:
            with self.database.writing() as connection:
                rows = connection.execute(oldest.limit(CHUNK)).all()
                last = _last_references(connection, _hashes(rows))
                free: dict[str, int] = {}
                removed: list[int] = []
                for row in rows:
                    if used - sum(free.values()) <= max_bytes:
                        break
                    removed.append(row.id)
                    # A file is removed with the last inspection that refers to it.
                    files = ((row.image_hash, row.image_bytes), (row.grids_hash, row.grids_bytes))
                    free |= {digest: size for digest, size in files if last[digest] == row.id}
                query = update(INSPECTIONS).where(_INSPECTION.id.in_(removed))
                connection.execute(query.values(dict.fromkeys(STORED_IMAGE)))
            yield from free
            used -= sum(free.values())
            if len(rows) < CHUNK:
                return

    def unreferenced(self, hashes: set[str]) -> set[str]:
        """Return those of these hashes that no inspection refers to."""
        with self.database.reading() as connection:
            return hashes - _last_references(connection, hashes).keys()

    def bytes_used(self) -> int:
        """Return the total size of all files, each counted once. Scans two indexes."""
        files = union_all(
            select(_INSPECTION.image_hash.label("digest"), _INSPECTION.image_bytes.label("size")),
            select(_INSPECTION.grids_hash, _INSPECTION.grids_bytes),
        ).subquery()
        sizes = select(func.max(files.c.size).label("size")).where(files.c.digest.is_not(None))
        (row,) = self._read(select(func.sum(sizes.group_by(files.c.digest).subquery().c.size)))
        return int(row[0] or 0)


def _rate(row: Row[Any]) -> RateChange:
    return RateChange(**{name: value for name, value in row._mapping.items() if name != "id"})


def _token_detail(token: Token) -> dict[str, Any]:
    expires_at = None if token.expires_at is None else token.expires_at.isoformat()
    return {"id": token.id, "name": token.name, "role": token.role, "expires_at": expires_at}


def _bounded(id: int) -> int:
    """Return an id that the database can compare; no stored id is outside of these bounds."""
    return max(0, min(id, _MAX_ID))


def _has_id(table: Table, id: int) -> ColumnElement[bool]:
    return table.c.id == _bounded(id)


def _conditions(chosen: Filter) -> list[ColumnElement[bool]]:
    conditions = [
        _INSPECTION[name] == value
        for name in ("category", "subclass", "name", "source", "line", "bundle_hash", "decision")
        if (value := getattr(chosen, name)) is not None
    ]
    if chosen.name_contains is not None:
        conditions.append(_INSPECTION.name.icontains(chosen.name_contains, autoescape=True))
    if chosen.since is not None:
        conditions.append(_INSPECTION.received_at >= chosen.since)
    if chosen.until is not None:
        conditions.append(_INSPECTION.received_at < chosen.until)
    if chosen.verdicts:
        conditions.append(_INSPECTION.verdict.in_(chosen.verdicts))
    for present, column in ((chosen.unreadable, _INSPECTION.error), (chosen.reviewed, _INSPECTION.decision)):
        if present is not None:
            conditions.append(column.is_not(None) if present else column.is_(None))
    if chosen.p_value_within is not None:
        conditions.append(_INSPECTION.p_value <= chosen.p_value_within * _INSPECTION.false_alarm_rate)
    return conditions


def _hashes(rows: Sequence[Any]) -> set[str]:
    return {digest for row in rows for digest in (row.image_hash, row.grids_hash) if digest is not None}


def _last_references(connection: Connection, hashes: set[str]) -> dict[str, int]:
    """Map each hash that inspections refer to to the newest of their ids."""
    last: dict[str, int] = {}
    for column in (_INSPECTION.image_hash, _INSPECTION.grids_hash):
        query = select(column, func.max(_INSPECTION.id)).where(column.in_(hashes)).group_by(column)
        for digest, id in connection.execute(query):
            last[digest] = max(id, last.get(digest, 0))
    return last
