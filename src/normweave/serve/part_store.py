"""Queries over parts of several views: their open views, the verdicts on closed parts, and the corrections."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, delete, func, insert, select, update

from normweave.outcome.parts import PartView
from normweave.serve.database import StoreError
from normweave.serve.delivery_store import count_removed
from normweave.serve.records import Inspection, PartRecord
from normweave.serve.store import Store
from normweave.serve.tables import INSPECTIONS, PARTS, to_inspection, to_part
from normweave.types import PartVerdict

_INSPECTION = INSPECTIONS.c
_PART = PARTS.c
_VIEW = (_INSPECTION.id, _INSPECTION.view, _INSPECTION.verdict, _INSPECTION.image_hash)


class OpenView(NamedTuple):
    """A stored image of a part that has not been counted in a closed part yet."""

    part_id: str
    image: PartView


class Marks(NamedTuple):
    """What happened to a closed part later.

    Attributes:
        last_correction: id of the last correction of its verdict; 0: there is none.
        decisions: of reviewers on its images, without those that were undone: accept, reject.
    """

    last_correction: int = 0
    decisions: tuple[str, ...] = ()


class TakenError(StoreError):
    """An image of the part is counted in a closed part already: another server has the same line and database."""


class PartStore:
    """The parts of one line. As those of `Store`, methods are thread-safe, one transaction, and raise StoreError."""

    def __init__(self, store: Store) -> None:
        self._database = store.database
        self.line = store.line

    def open_views(self, *, after: int, limit: int) -> list[OpenView]:
        """Return images of parts that are not closed, and late images of closed ones, in the order of storage.

        Args:
            after: only inspections with higher ids.
        """
        columns = (*_VIEW, _INSPECTION.part_id)
        query = select(*columns).where(
            _INSPECTION.part_id.is_not(None), _INSPECTION.part.is_(None), _INSPECTION.line == self.line
        )
        with self._database.reading() as connection:
            rows = connection.execute(query.where(_INSPECTION.id > after).order_by(_INSPECTION.id).limit(limit)).all()
        return [OpenView(row.part_id, _view(row)) for row in rows]

    def close(self, record: PartRecord, inspections: Sequence[int]) -> PartRecord | None:
        """Store a closed part with its images, and return it with its id; None: retention has removed the images.

        Raises:
            TakenError: another server has closed the part.
        """
        with self._database.writing() as connection:
            stored = _add(connection, record)
            if _count_in(connection, stored.id, inspections):
                return stored
            connection.execute(delete(PARTS).where(_PART.id == stored.id))
            return None

    def last(self, part_id: str, *, since: datetime) -> PartRecord | None:
        """Return the last verdict on this part, a correction if there is one; None: it was not closed since then."""
        query = select(PARTS).where(_PART.part_id == part_id, _PART.line == self.line).order_by(_PART.id.desc())
        with self._database.reading() as connection:
            row = connection.execute(query.limit(1)).one_or_none()
            if row is None:
                return None
            root = row.at if row.corrects is None else _closed_at(connection, row.corrects)
        return None if root is None or root < since else to_part(row)

    def views(self, root: int, *, limit: int) -> list[PartView]:
        """Return the images that belong to a closed part, in the order of storage."""
        with self._database.reading() as connection:
            query = select(*_VIEW).where(_INSPECTION.part == root).order_by(_INSPECTION.id).limit(limit)
            return [_view(row) for row in connection.execute(query)]

    def add_late(self, root: int, inspection: int, *, correction: PartRecord | None) -> PartRecord | None:
        """Add a late image to a closed part, with the correction of its verdict, if any, which is returned.

        Raises:
            TakenError: another server has done it.
        """
        with self._database.writing() as connection:
            _count_in(connection, root, [inspection])
            return None if correction is None else _add(connection, correction)

    def inspections(self, root: int, *, limit: int) -> list[Inspection]:
        """Return the inspections that belong to a closed part, in the order of storage."""
        query = select(INSPECTIONS).where(_INSPECTION.part == root).order_by(_INSPECTION.id).limit(limit)
        with self._database.reading() as connection:
            return [to_inspection(row) for row in connection.execute(query)]

    def record(self, id: int) -> PartRecord | None:
        """Return the record with this id, of any line, or None."""
        with self._database.reading() as connection:
            row = connection.execute(select(PARTS).where(_PART.id == id)).one_or_none()
        return None if row is None else to_part(row)

    def of(self, root: int) -> list[PartRecord]:
        """Return the record of a closed part and its corrections, oldest first."""
        query = select(PARTS).where((_PART.id == root) | (_PART.corrects == root)).order_by(_PART.id)
        with self._database.reading() as connection:
            return [to_part(row) for row in connection.execute(query)]

    def marks(self, roots: Collection[int]) -> dict[int, Marks]:
        """Return what happened to closed parts later, by the id of their first verdict."""
        last = select(_PART.corrects, func.max(_PART.id)).where(_PART.corrects.in_(roots)).group_by(_PART.corrects)
        columns = (_INSPECTION.part, _INSPECTION.decision)
        decided = select(*columns).where(_INSPECTION.part.in_(roots), _INSPECTION.decision.is_not(None)).distinct()
        with self._database.reading() as connection:
            corrections: dict[int, int] = {row[0]: row[1] for row in connection.execute(last)}
            decisions: dict[int, list[str]] = {}
            for root, decision in connection.execute(decided.order_by(*columns)):
                decisions.setdefault(root, []).append(decision)
        return {root: Marks(corrections.get(root, 0), tuple(decisions.get(root, ()))) for root in roots}

    def records(
        self,
        *,
        part_id: str | None = None,
        verdicts: Sequence[PartVerdict] = (),
        line: str | None = None,
        before: int | None = None,
        after: int | None = None,
        limit: int,
    ) -> list[PartRecord]:
        """Return a page of closed parts and corrections, newest first; with `after`, oldest first.

        Args:
            part_id: only of this part.
            verdicts: only with these verdicts; empty: any.
            line: only of this line.
            before: only records with lower ids.
            after: only records with higher ids.
            limit: at least 1.
        """
        query = select(PARTS).order_by(_PART.id.desc() if after is None else _PART.id).limit(limit)
        if part_id is not None:
            query = query.where(_PART.part_id == part_id)
        if verdicts:
            query = query.where(_PART.verdict.in_(verdicts))
        if line is not None:
            query = query.where(_PART.line == line)
        if before is not None:
            query = query.where(_PART.id < before)
        if after is not None:
            query = query.where(_PART.id > after)
        with self._database.reading() as connection:
            return [to_part(row) for row in connection.execute(query)]

    def expire(self, *, before: datetime) -> None:
        """Remove records of parts that were closed or corrected before this time."""
        old = (_PART.at < before) & (_PART.line == self.line)
        with self._database.writing() as connection:
            count_removed(connection, "parts", old)
            connection.execute(delete(PARTS).where(old))


def _closed_at(connection: Connection, root: int) -> datetime | None:
    found: datetime | None = connection.scalar(select(_PART.at).where(_PART.id == root))
    return found


def _add(connection: Connection, record: PartRecord) -> PartRecord:
    values = {name: value for name, value in vars(record).items() if name != "id"}
    id = connection.scalars(insert(PARTS).values(values).returning(_PART.id)).one()
    return replace(record, id=id)


def _count_in(connection: Connection, root: int, inspections: Sequence[int]) -> int:
    """Let these inspections belong to a closed part, and return how many are still stored."""
    chosen = _INSPECTION.id.in_(inspections)
    done = connection.execute(update(INSPECTIONS).where(chosen, _INSPECTION.part.is_(None)).values(part=root)).rowcount
    stored = connection.scalar(select(func.count()).select_from(INSPECTIONS).where(chosen))
    if done != stored:
        raise TakenError(
            "Another server with the same database and the same name of the line closes parts too. Give each its own "
            "--name."
        )
    return done


def _view(row: Any) -> PartView:
    """Return the image of a part; one without a name for its view is a view of its own, but for the same content."""
    name = f"image {row.id}" if row.image_hash is None else f"image {row.image_hash[:8]}"
    return PartView(row.view or name, row.verdict, row.id)
