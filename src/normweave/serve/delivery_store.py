"""How far each output has delivered what its line has stored, and what its counterpart has refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

from sqlalchemy import ColumnElement, Connection, Row, Table, delete, func, insert, select, update

from normweave.serve.database import Database
from normweave.serve.message import DriftMessage, InspectionMessage, Message, PartMessage
from normweave.serve.records import SERVER, AuditEntry, DriftAlarm, Inspection, PartRecord, Subject
from normweave.serve.tables import (
    CURSORS,
    DEAD_LETTERS,
    DELIVERIES,
    DRIFT_ALARMS,
    INSPECTIONS,
    PARTS,
    add_entry,
    to_alarm,
    to_inspection,
    to_part,
)

_DELIVERY = DELIVERIES.c
_CURSOR = CURSORS.c
_LETTER = DEAD_LETTERS.c
_PART = PARTS.c
STATE = ("attempts", "last_error", "last_success_at")
"""Columns of a `Delivery` besides its name."""


class _Stored(NamedTuple):
    """Where the records of a subject are stored."""

    table: Table
    time: str
    """Column of the time of a record."""
    read: Callable[[Row[Any]], Any]


STORED: dict[Subject, _Stored] = {
    "inspections": _Stored(INSPECTIONS, "received_at", to_inspection),
    "parts": _Stored(PARTS, "at", to_part),
    "drift": _Stored(DRIFT_ALARMS, "time", to_alarm),
}


class Item(NamedTuple):
    """A record that is to be delivered."""

    subject: Subject
    id: int
    time: datetime
    record: Inspection | PartRecord | DriftAlarm


@dataclass(kw_only=True)
class Delivery:
    """How far an output is."""

    name: str
    last_ids: dict[Subject, int]
    """Of each subject that it delivers: all of the line up to this id is delivered. Is replaced, not changed."""
    attempts: int = 0
    """Failed attempts since the last success."""
    last_error: str | None = None
    """Why the last attempt failed; None: it succeeded."""
    last_success_at: datetime | None = None

    def advance(self, item: Item) -> None:
        """Note that this item, and so all before it, is delivered."""
        self.last_ids = self.last_ids | {item.subject: item.id}


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """A message that the counterpart of an output has refused for good."""

    id: int
    output: str
    at: datetime
    reason: str
    message: dict[str, Any] = field(default_factory=dict)
    """JSON values."""
    again: bool
    """Whether it is to be sent again."""

    @property
    def inspection(self) -> int | None:
        """Id of the inspection, which retention may have removed; None: the message is of another subject."""
        return int(self.message["data"]["id"]) if self.message["type"] == "inspection.stored" else None


class DeliveryStore:
    """The deliveries of the outputs of one line.

    Methods are thread-safe, each is one transaction, and all of them raise StoreError when the database fails.
    """

    def __init__(self, database: Database, *, line: str) -> None:
        self._database = database
        self._line = line

    def begin(self, name: str, *, oldest: bool, subjects: Iterable[Subject] = ("inspections",)) -> Delivery:
        """Return how far an output is. What is new begins after the newest record, or with the oldest one.

        Args:
            subjects: what the output delivers. How far it was with others is forgotten.
        """
        with self._database.writing() as connection:
            found = select(*(_DELIVERY[column] for column in STATE)).where(*self._of(DELIVERIES, name))
            row = connection.execute(found).one_or_none()
            if row is None:
                connection.execute(insert(DELIVERIES).values(line=self._line, name=name, attempts=0))
            chosen = tuple(subjects)
            cursors = self._of(CURSORS, name)
            connection.execute(delete(CURSORS).where(*cursors, _CURSOR.subject.not_in(chosen)))
            query = select(_CURSOR.subject, _CURSOR.last_id).where(*cursors)
            last_ids = {cast("Subject", one.subject): int(one.last_id) for one in connection.execute(query)}
            for subject in chosen:
                if subject not in last_ids:
                    newest = connection.execute(select(func.max(STORED[subject].table.c.id))).scalar_one() or 0
                    last_ids[subject] = 0 if oldest else newest
                    values = {"name": name, "subject": subject, "last_id": last_ids[subject], "removed": 0}
                    connection.execute(insert(CURSORS).values(line=self._line, **values))
        state = {} if row is None else {column: row._mapping[column] for column in STATE}
        return Delivery(name=name, last_ids=last_ids, **state)

    def read(self, name: str) -> Delivery | None:
        """Return how far an output is, or None if it never began."""
        with self._database.reading() as connection:
            found = select(*(_DELIVERY[column] for column in STATE)).where(*self._of(DELIVERIES, name))
            row = connection.execute(found).one_or_none()
            query = select(_CURSOR.subject, _CURSOR.last_id).where(*self._of(CURSORS, name))
            last_ids = {cast("Subject", one.subject): int(one.last_id) for one in connection.execute(query)}
        return None if row is None else Delivery(name=name, last_ids=last_ids, **row._mapping)

    def save(self, deliveries: Sequence[Delivery]) -> None:
        """Store how far outputs are."""
        with self._database.writing() as connection:
            for one in deliveries:
                values = {column: getattr(one, column) for column in STATE}
                connection.execute(update(DELIVERIES).where(*self._of(DELIVERIES, one.name)).values(values))
                for subject, last_id in one.last_ids.items():
                    chosen = (*self._of(CURSORS, one.name), _CURSOR.subject == subject)
                    connection.execute(update(CURSORS).where(*chosen).values(last_id=last_id))

    def removed(self, name: str) -> int:
        """Return how much retention removed before an output has delivered it, since this was acknowledged last."""
        query = select(func.sum(_CURSOR.removed)).where(*self._of(CURSORS, name))
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one() or 0)

    def acknowledge_removed(self, name: str, *, actor: str, token: int | None) -> int:
        """Count what retention removes from zero again, with an entry in the audit; return the count until now."""
        chosen = self._of(CURSORS, name)
        with self._database.writing() as connection:
            count = int(connection.execute(select(func.sum(_CURSOR.removed)).where(*chosen)).scalar_one() or 0)
            if count:
                connection.execute(update(CURSORS).where(*chosen).values(removed=0))
                entry = AuditEntry(
                    at=datetime.now(UTC), event="delivery_loss_acknowledged", actor=actor, token=token, line=self._line,
                    detail={"output": name, "removed": count},
                )  # fmt: skip
                add_entry(connection, entry)
        return count

    def after(self, subject: Subject, last_id: int, *, limit: int) -> list[Item]:
        """Return the next records of the line, in the order of their ids."""
        stored = STORED[subject]
        query = select(stored.table).where(*self._after(subject, last_id)).order_by(stored.table.c.id).limit(limit)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return [Item(subject, row.id, row._mapping[stored.time], stored.read(row)) for row in rows]

    def message(self, item: Item) -> Message:
        """Return the message for a record, with what is known now of later corrections."""
        record = item.record
        if isinstance(record, Inspection):
            return InspectionMessage.of(record)
        if isinstance(record, DriftAlarm):
            return DriftMessage.of(record)
        corrections = select(func.count()).select_from(PARTS).where(_PART.corrects == record.root)
        with self._database.reading() as connection:
            before = connection.execute(corrections.where(_PART.id < record.id)).scalar_one()
            later = connection.execute(corrections.where(_PART.id > record.id)).scalar_one()
        revision = 1 if record.corrects is None else 2 + before
        return PartMessage.of(record, revision=revision, corrected=later > 0)

    def behind(self, last_ids: dict[Subject, int]) -> int:
        """Return the number of records of the line with higher ids."""
        count = 0
        with self._database.reading() as connection:
            for subject, last_id in last_ids.items():
                query = select(func.count()).select_from(STORED[subject].table).where(*self._after(subject, last_id))
                count += connection.execute(query).scalar_one()
        return count

    def _after(self, subject: Subject, last_id: int) -> tuple[ColumnElement[bool], ...]:
        columns = STORED[subject].table.c
        return columns.id > last_id, columns.line == self._line

    def _of(self, table: Table, name: str) -> tuple[ColumnElement[bool], ...]:
        return table.c.line == self._line, table.c.name == name

    # ── alarms of drift ──────────────────────────────────────────────────────────────────────────────────────────

    def add_alarm(self, alarm: DriftAlarm, *, newest: datetime) -> bool:
        """Store an alarm of drift, and return whether it is new.

        It is not if the same one was stored after the newest of its inspections: then these are tested once more, as
        after a roll back to their bundle.

        Args:
            newest: when the newest inspection that was tested was received.
        """
        values = {name: value for name, value in vars(alarm).items() if name != "id"}
        same = [DRIFT_ALARMS.c[name] == values[name] for name in ("line", "bundle_hash", "cause", "subclass")]
        with self._database.writing() as connection:
            stored = connection.execute(
                select(DRIFT_ALARMS.c.id).where(*same, DRIFT_ALARMS.c.time >= newest).limit(1)
            ).first()
            if stored is None:
                connection.execute(insert(DRIFT_ALARMS).values(values))
        return stored is None

    # ── dead letters ─────────────────────────────────────────────────────────────────────────────────────────────

    def _to(self, output: str) -> tuple[ColumnElement[bool], ...]:
        return _LETTER.line == self._line, _LETTER.output == output

    def add_dead_letter(self, output: str, *, reason: str, message: dict[str, Any]) -> None:
        """Keep a message that was refused for good."""
        values = {"line": self._line, "output": output, "reason": reason, "message": message}
        with self._database.writing() as connection:
            connection.execute(insert(DEAD_LETTERS).values(**values, at=datetime.now(UTC), again=False))

    def dead_letters(self, output: str, *, limit: int, again: bool | None = None) -> list[DeadLetter]:
        """Return messages of an output that were refused, oldest first.

        Args:
            again: only those that are to be sent again, or only the others; None: all.
        """
        columns = [column for column in _LETTER if column.name != "line"]
        query = select(*columns).where(*self._to(output)).order_by(_LETTER.id).limit(limit)
        if again is not None:
            query = query.where(_LETTER.again == again)
        with self._database.reading() as connection:
            return [DeadLetter(**row._mapping) for row in connection.execute(query)]

    def count_dead_letters(self, output: str) -> int:
        """Return the number of messages of an output that were refused."""
        query = select(func.count()).select_from(DEAD_LETTERS).where(*self._to(output))
        with self._database.reading() as connection:
            return connection.execute(query).scalar_one()

    def mark_again(self, output: str) -> int:
        """Mark all refused messages of an output to be sent again, and return their number."""
        with self._database.writing() as connection:
            return connection.execute(update(DEAD_LETTERS).where(*self._to(output)).values(again=True)).rowcount

    def keep_dead_letter(self, id: int, *, reason: str) -> None:
        """Keep a message that was refused again."""
        values = {"reason": reason, "at": datetime.now(UTC), "again": False}
        with self._database.writing() as connection:
            connection.execute(update(DEAD_LETTERS).where(_LETTER.id == id).values(values))

    def remove_dead_letter(self, id: int) -> None:
        """Remove a message that was taken."""
        with self._database.writing() as connection:
            connection.execute(delete(DEAD_LETTERS).where(_LETTER.id == id))


def count_removed(connection: Connection, subject: Subject, chosen: ColumnElement[bool]) -> None:
    """Count, for each output, those of the chosen records that it has not delivered; they are about to be removed.

    The first loss since a person acknowledged the one before has an entry in the audit; further ones are only counted.
    """
    columns = STORED[subject].table.c
    undelivered = select(func.count()).where(chosen, columns.line == _CURSOR.line, columns.id > _CURSOR.last_id)
    lost = undelivered.scalar_subquery()
    query = select(_CURSOR.line, _CURSOR.name, lost.label("lost")).where(_CURSOR.subject == subject, lost > 0)
    for row in connection.execute(query).all():
        output = _CURSOR.line == row.line, _CURSOR.name == row.name
        before = connection.execute(select(func.sum(_CURSOR.removed)).where(*output)).scalar_one()
        counted = update(CURSORS).where(*output, _CURSOR.subject == subject)
        connection.execute(counted.values(removed=_CURSOR.removed + row.lost))
        if not before:
            detail = {"output": row.name, "subject": subject, "removed": row.lost}
            at = datetime.now(UTC)
            add_entry(connection, AuditEntry(at=at, event="delivery_lost", actor=SERVER, detail=detail, line=row.line))
