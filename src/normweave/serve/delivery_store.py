"""How far each output has delivered the inspections of its line, and what its counterpart has refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from normweave.serve.database import Database
from normweave.serve.records import Inspection
from normweave.serve.tables import DEAD_LETTERS, DELIVERIES, INSPECTIONS, to_inspection

_DELIVERY = DELIVERIES.c
_LETTER = DEAD_LETTERS.c
_INSPECTION = INSPECTIONS.c


@dataclass(kw_only=True)
class Delivery:
    """How far an output is."""

    name: str
    last_id: int
    """All inspections of the line up to this id are delivered."""
    attempts: int = 0
    """Failed attempts since the last success."""
    last_error: str | None = None
    """Why the last attempt failed; None: it succeeded."""
    last_success_at: datetime | None = None
    removed: int = 0
    """Inspections that retention removed before they were delivered."""


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """A message that the counterpart of an output has refused for good."""

    id: int
    output: str
    inspection: int
    """Id of the inspection, which retention may have removed."""
    at: datetime
    reason: str
    message: dict[str, Any]
    """JSON values."""
    again: bool
    """Whether it is to be sent again."""


class DeliveryStore:
    """The deliveries of the outputs of one line.

    Methods are thread-safe, each is one transaction, and all of them raise StoreError when the database fails.
    """

    def __init__(self, database: Database, *, line: str) -> None:
        self._database = database
        self._line = line

    def begin(self, name: str, *, oldest: bool) -> Delivery:
        """Return how far an output is. A new one begins after the newest inspection, or with the oldest one."""
        with self._database.writing() as connection:
            row = connection.execute(select(DELIVERIES).where(*self._of(name))).one_or_none()
            if row is not None:
                return Delivery(**{key: value for key, value in row._mapping.items() if key != "line"})
            newest = connection.execute(select(func.max(_INSPECTION.id))).scalar_one() or 0
            delivery = Delivery(name=name, last_id=0 if oldest else newest)
            connection.execute(insert(DELIVERIES).values(line=self._line, **vars(delivery)))
            return delivery

    def save(self, deliveries: Sequence[Delivery]) -> None:
        """Store how far outputs are. Their counts of removed inspections are those of the retention."""
        with self._database.writing() as connection:
            for one in deliveries:
                values = {name: value for name, value in vars(one).items() if name not in ("name", "removed")}
                connection.execute(update(DELIVERIES).where(*self._of(one.name)).values(values))

    def removed(self, name: str) -> int:
        """Return the number of inspections that retention removed before an output has delivered them."""
        with self._database.reading() as connection:
            return int(connection.execute(select(_DELIVERY.removed).where(*self._of(name))).scalar_one())

    def after(self, last_id: int, *, limit: int) -> list[Inspection]:
        """Return the next inspections of the line, in the order of their ids."""
        query = select(INSPECTIONS).where(*self._after(last_id)).order_by(_INSPECTION.id).limit(limit)
        with self._database.reading() as connection:
            return [to_inspection(row) for row in connection.execute(query)]

    def behind(self, last_id: int) -> int:
        """Return the number of inspections of the line with higher ids."""
        query = select(func.count()).select_from(INSPECTIONS).where(*self._after(last_id))
        with self._database.reading() as connection:
            return connection.execute(query).scalar_one()

    def _after(self, last_id: int) -> tuple[ColumnElement[bool], ...]:
        return _INSPECTION.id > last_id, _INSPECTION.line == self._line

    def _of(self, name: str) -> tuple[ColumnElement[bool], ...]:
        return _DELIVERY.line == self._line, _DELIVERY.name == name

    # ── dead letters ─────────────────────────────────────────────────────────────────────────────────────────────

    def _to(self, output: str) -> tuple[ColumnElement[bool], ...]:
        return _LETTER.line == self._line, _LETTER.output == output

    def add_dead_letter(self, output: str, *, inspection: int, reason: str, message: dict[str, Any]) -> None:
        """Keep a message that was refused for good."""
        values = {"line": self._line, "output": output, "inspection": inspection, "reason": reason, "message": message}
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


def count_removed(connection: Connection, ids: Sequence[int]) -> None:
    """Count, for each output, those of these inspections that it has not delivered; they are about to be removed."""
    undelivered = select(func.count()).where(
        _INSPECTION.id.in_(ids), _INSPECTION.line == _DELIVERY.line, _INSPECTION.id > _DELIVERY.last_id
    )
    connection.execute(update(DELIVERIES).values(removed=_DELIVERY.removed + undelivered.scalar_subquery()))
