"""Queries over the active bundle and the candidates of a line, and over the outcomes of the candidates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, Select, func, insert, select, update

from normweave.serve.library import ModelError
from normweave.serve.records import SERVER, AuditEntry, AuditEvent, Inspection
from normweave.serve.store import Store
from normweave.serve.tables import (
    ACTIVATIONS,
    INSPECTIONS,
    SHADOW_OUTCOME,
    SHADOW_OUTCOMES,
    SHADOWS,
    add_entry,
    to_inspection,
)
from normweave.types import Outcome, Tile

_JUDGED = SHADOW_OUTCOMES.c
_INSPECTION = INSPECTIONS.c
_LISTS = {column.name: column.type for column in Outcome.columns() if column.is_list}


class Actor(NamedTuple):
    """Who changes the models of a line."""

    name: str
    token: int | None = None
    """Id of the token."""


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A bundle that inspects, or did."""

    id: int
    at: datetime
    bundle_hash: str
    before: int | None
    """Id of the activation that a roll back returns to."""
    actor: str


@dataclass(frozen=True, kw_only=True)
class ShadowRun:
    """A candidate in the shadow."""

    id: int
    bundle_hash: str
    active_hash: str
    """The bundle that was active at its start."""
    started_at: datetime
    ended_at: datetime | None
    """None: it runs."""
    actor: str
    failure: str | None
    """Why the server switched it off."""
    skipped: int
    """Images that it did not judge, since its queue was full or they were no longer stored."""


@dataclass(frozen=True, kw_only=True)
class ShadowOutcome:
    """What a candidate computed for a stored inspection. The fields of the map are kept if the verdicts differ."""

    inspection: int
    """Id of the inspection."""
    outcome: Outcome
    """Only the fields of `SHADOW_OUTCOME`."""
    tiles: tuple[Tile, ...] = ()
    smoothing: float | None = None
    map_threshold: float | None = None
    grids: bytes | None = None
    """An .npy file: the patch scores of each tile, (n, h, w) float32."""


class Difference(NamedTuple):
    """An inspection on which active bundle and candidate have different verdicts."""

    inspection: Inspection
    candidate: ShadowOutcome


class Pair(NamedTuple):
    """Number of images of a subclass with these verdicts; the verdict None: the image could not be scored."""

    category: str | None
    subclass: str | None
    active: str | None
    candidate: str | None
    decision: str | None
    """Reviewer decision; None: not reviewed."""
    n: int


class ModelStore:
    """The models of one line. As those of `Store`, methods are thread-safe, one transaction, and raise StoreError."""

    def __init__(self, store: Store) -> None:
        self._database = store.database
        self.line = store.line

    def _audit(self, connection: Connection, event: AuditEvent, actor: Actor, **detail: Any) -> None:
        entry = AuditEntry(
            at=datetime.now(UTC), event=event, line=self.line, actor=actor.name, token=actor.token, detail=detail
        )
        add_entry(connection, entry)

    @contextmanager
    def _changing(self) -> Iterator[Connection]:
        """Yield a transaction that changes what is active or in the shadow, one server of the line at a time."""
        with self._database.writing() as connection:
            self._database.lock(connection, "models", self.line)
            yield connection

    # ── the active bundle ────────────────────────────────────────────────────────────────────────────────────────────

    def active(self) -> Activation | None:
        """Return the active bundle of the line, or None if none was chosen yet."""
        with self._database.reading() as connection:
            return self._active(connection)

    def _active(self, connection: Connection) -> Activation | None:
        query = select(ACTIVATIONS).where(ACTIVATIONS.c.line == self.line).order_by(ACTIVATIONS.c.id.desc()).limit(1)
        return _activation(connection.execute(query).one_or_none())

    def before(self, activation: Activation) -> Activation | None:
        """Return the activation that a roll back returns to, or None."""
        query = select(ACTIVATIONS).where(ACTIVATIONS.c.id == activation.before)
        with self._database.reading() as connection:
            return _activation(connection.execute(query).one_or_none())

    def choose(self, bundle_hash: str) -> None:
        """Make a bundle active at the start of the server; the audit has its loading."""
        with self._database.writing() as connection:
            active = self._active(connection)
            self._activate(connection, bundle_hash, before=None if active is None else active.id, actor=Actor(SERVER))

    def promote(self, bundle_hash: str, actor: Actor) -> None:
        """Make the candidate active, end its run, and add this to the audit.

        Raises:
            ModelError: another server has done it.
        """
        with self._changing() as connection:
            active = self._active(connection)
            assert active is not None  # a server with a library has an active bundle
            if active.bundle_hash == bundle_hash:
                raise ModelError(f"The bundle {bundle_hash[:12]}… is active already.", code="already_active")
            self._activate(connection, bundle_hash, before=active.id, actor=actor)
            self._end(connection)
            self._audit(connection, "model_promoted", actor, bundle_hash=bundle_hash, before=active.bundle_hash)

    def roll_back(self, to: Activation, actor: Actor) -> None:
        """Make an earlier bundle active again, end its run if it is the candidate, and add this to the audit.

        Raises:
            ModelError: another server has changed what is active.
        """
        with self._changing() as connection:
            active = self._active(connection)
            assert active is not None  # `to` came before it
            if active.before != to.id:
                raise ModelError(
                    "Another bundle has just become active. Look at the models again, then roll back.",
                    code="nothing_to_roll_back_to",
                )
            self._activate(connection, to.bundle_hash, before=to.before, actor=actor)
            self._end(connection, SHADOWS.c.bundle_hash == to.bundle_hash)
            detail = {"bundle_hash": to.bundle_hash, "before": active.bundle_hash}
            self._audit(connection, "model_rolled_back", actor, **detail)

    def _activate(self, connection: Connection, bundle_hash: str, *, before: int | None, actor: Actor) -> None:
        values = {"line": self.line, "at": datetime.now(UTC), "bundle_hash": bundle_hash, "before": before}
        connection.execute(insert(ACTIVATIONS).values(**values, actor=actor.name))

    # ── the candidate ────────────────────────────────────────────────────────────────────────────────────────────────

    def last_shadow(self) -> ShadowRun | None:
        """Return the newest run of the line, which may have ended."""
        query = select(SHADOWS).where(SHADOWS.c.line == self.line).order_by(SHADOWS.c.id.desc()).limit(1)
        with self._database.reading() as connection:
            return _run(connection.execute(query).one_or_none())

    def shadow(self) -> ShadowRun | None:
        """Return the run of the present candidate, or None."""
        last = self.last_shadow()
        return None if last is None or last.ended_at is not None else last

    def start_shadow(self, bundle_hash: str, *, active_hash: str, actor: Actor) -> ShadowRun:
        """Begin a run, which ends an earlier one, and add this to the audit."""
        values = {"line": self.line, "bundle_hash": bundle_hash, "active_hash": active_hash}
        started = {"started_at": datetime.now(UTC), "actor": actor.name, "skipped": 0}
        with self._changing() as connection:
            for ended in self._end(connection):
                self._audit(connection, "shadow_stopped", actor, bundle_hash=ended)
            row = connection.execute(insert(SHADOWS).values(**values, **started).returning(SHADOWS)).one()
            self._audit(connection, "shadow_started", actor, bundle_hash=bundle_hash)
        run = _run(row)
        assert run is not None
        return run

    def stop_shadow(self, actor: Actor) -> None:
        """End the run of the present candidate, and add this to the audit."""
        with self._database.writing() as connection:
            for bundle_hash in self._end(connection):
                self._audit(connection, "shadow_stopped", actor, bundle_hash=bundle_hash)

    def fail_shadow(self, run: int, reason: str) -> None:
        """End a run with the reason why the server switched it off, and add this to the audit."""
        with self._database.writing() as connection:
            for bundle_hash in self._end(connection, SHADOWS.c.id == run, failure=reason):
                self._audit(connection, "shadow_failed", Actor(SERVER), bundle_hash=bundle_hash, reason=reason)

    def _end(self, connection: Connection, *chosen: ColumnElement[bool], failure: str | None = None) -> list[str]:
        """End the present run, if there is one that is chosen, and return the hash of its bundle."""
        query = update(SHADOWS).where(SHADOWS.c.line == self.line, SHADOWS.c.ended_at.is_(None), *chosen)
        values = {"ended_at": datetime.now(UTC), "failure": failure}
        return list(connection.scalars(query.values(values).returning(SHADOWS.c.bundle_hash)))

    # ── outcomes of candidates ───────────────────────────────────────────────────────────────────────────────────────

    def add_outcomes(self, run: int, outcomes: Sequence[ShadowOutcome], *, skipped: int) -> None:
        """Store outcomes, and count images that were skipped. Inspections that retention has removed are left out."""
        with self._database.writing() as connection:
            query = update(SHADOWS).where(SHADOWS.c.id == run).values(skipped=SHADOWS.c.skipped + skipped)
            connection.execute(query)
            ids = [one.inspection for one in outcomes]
            # A locked row is not removed before the end of the transaction; SQLite has one writer at a time.
            rows = select(_INSPECTION.id).where(_INSPECTION.id.in_(ids)).with_for_update(read=True)
            kept = set(connection.scalars(rows))
            if values := [self._row(one) for one in outcomes if one.inspection in kept]:
                connection.execute(insert(SHADOW_OUTCOMES), values)

    def _row(self, one: ShadowOutcome) -> dict[str, Any]:
        names = [field.name for field in fields(one) if field.name != "outcome"]
        outcome = {name: getattr(one.outcome, name) for name in SHADOW_OUTCOME}
        return {"line": self.line} | {name: getattr(one, name) for name in names} | outcome

    def outcome(self, inspection: int, bundle_hash: str) -> ShadowOutcome | None:
        """Return the outcome of a candidate for an inspection, or None."""
        query = select(SHADOW_OUTCOMES).where(_JUDGED.inspection == inspection, _JUDGED.bundle_hash == bundle_hash)
        with self._database.reading() as connection:
            row = connection.execute(query.order_by(_JUDGED.id.desc()).limit(1)).one_or_none()
        return None if row is None else _shadow_outcome(row)

    def pairs(self, comparison: Comparison) -> list[Pair]:
        """Count the images that both bundles judged, by subclass, both verdicts and reviewer decision."""
        columns = (_INSPECTION.category, _INSPECTION.subclass, _INSPECTION.verdict, _JUDGED.verdict.label("candidate"))
        grouped = (*columns, _INSPECTION.decision)
        query = self._both(select(*grouped, func.count().label("n")), comparison).group_by(*grouped)
        with self._database.reading() as connection:
            pairs = [Pair._make(row) for row in connection.execute(query)]
        return sorted(pairs, key=lambda one: tuple(value or "" for value in one[:-1]))

    def differences(self, comparison: Comparison, *, before: int | None = None, limit: int) -> list[Difference]:
        """Return inspections with different verdicts, newest first.

        Args:
            before: only inspections with lower ids.
            limit: at least 1.
        """
        query = self._both(select(INSPECTIONS, _JUDGED.id.label("judged")), comparison)
        query = query.where(_differ()).order_by(_INSPECTION.id.desc()).limit(limit)
        if before is not None:
            query = query.where(_INSPECTION.id < before)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
            numbers = [row.judged for row in rows]
            found = connection.execute(select(SHADOW_OUTCOMES).where(_JUDGED.id.in_(numbers)))
            judged = {row.id: _shadow_outcome(row) for row in found}
        return [Difference(to_inspection(row), judged[row.judged]) for row in rows]

    def _both(self, query: Select[Any], comparison: Comparison) -> Select[Any]:
        """Restrict a query to the images of this line that both bundles judged."""
        query = query.join_from(INSPECTIONS, SHADOW_OUTCOMES, _JUDGED.inspection == _INSPECTION.id).where(
            _JUDGED.line == self.line,
            _JUDGED.bundle_hash == comparison.candidate,
            _INSPECTION.bundle_hash == comparison.active,
        )
        if comparison.since is not None:
            query = query.where(_INSPECTION.received_at >= comparison.since)
        if comparison.category is not None:
            query = query.where(_INSPECTION.category == comparison.category)
        if comparison.subclass is not None:
            query = query.where(_INSPECTION.subclass == comparison.subclass)
        return query


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two bundles and the inspections on which they are compared."""

    active: str
    """Hash of the bundle that inspected."""
    candidate: str
    since: datetime | None = None
    category: str | None = None
    subclass: str | None = None


def _differ() -> ColumnElement[bool]:
    """Return the condition that the verdicts differ, NULL being one of its own."""
    return _INSPECTION.verdict.is_distinct_from(_JUDGED.verdict)


def _activation(row: Row[Any] | None) -> Activation | None:
    return None if row is None else Activation(**{field.name: getattr(row, field.name) for field in fields(Activation)})


def _run(row: Row[Any] | None) -> ShadowRun | None:
    return None if row is None else ShadowRun(**{field.name: getattr(row, field.name) for field in fields(ShadowRun)})


def _shadow_outcome(row: Row[Any]) -> ShadowOutcome:
    values = dict(row._mapping)
    lists = {name: tuple(item(*one) for one in values[name]) for name, item in _LISTS.items() if name in values}
    return ShadowOutcome(
        inspection=row.inspection,
        outcome=Outcome(image_path=None, **{name: values[name] for name in SHADOW_OUTCOME} | lists),
        tiles=tuple(Tile(*tile) for tile in row.tiles or ()),
        smoothing=row.smoothing,
        map_threshold=row.map_threshold,
        grids=row.grids,
    )
