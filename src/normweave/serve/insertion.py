"""Insertion of inspections by several servers: each once, with ids that become visible in their order."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, func, insert, select

from normweave.serve.database import Database
from normweave.serve.records import Inspection
from normweave.serve.tables import INSPECTIONS, to_inspection, to_row

CHANNEL = "normweave_inspections"
"""Channel on which PostgreSQL notifies all servers of new inspections; the payload is the `Store.server`."""
_INSPECTION = INSPECTIONS.c
_Place = tuple[int | None, str, int]
"""Token, key and place of an image that came in a request with a key."""


def insert_inspections(
    database: Database, connection: Connection, inspections: Sequence[Inspection], *, server: str
) -> list[Inspection]:
    """Store inspections within a transaction, and return them as stored.

    Of a place of a request with a key that is stored already, the stored inspection is returned.

    Args:
        server: payload of the notification.
    """
    # Who reads on from the last id misses no inspection, since one server at a time draws ids, until the end of its
    # transaction. SQLite has one writer at a time.
    database.lock(connection, "inspections")
    earlier = _stored_places(connection, inspections)
    new = [one for one in inspections if _place(one) not in earlier]
    ids: list[int] = []
    if new:
        query = insert(INSPECTIONS).returning(_INSPECTION.id, sort_by_parameter_order=True)
        ids = list(connection.scalars(query, [to_row(one) for one in new]))
        if database.is_shared:
            connection.execute(select(func.pg_notify(CHANNEL, server)))
    rows = connection.execute(select(INSPECTIONS).where(_INSPECTION.id.in_([*ids, *earlier.values()])))
    stored = {row.id: to_inspection(row) for row in rows}
    drawn = iter(ids)
    return [stored[next(drawn) if (id := earlier.get(_place(one))) is None else id] for one in inspections]


def _place(one: Inspection) -> _Place | None:
    return None if one.request is None else (one.token, one.request.key, one.request.place)


def _stored_places(connection: Connection, inspections: Sequence[Inspection]) -> dict[_Place | None, int]:
    """Map the places that are stored already to the ids of their inspections."""
    keys = {one.request.key for one in inspections if one.request is not None}
    if not keys:
        return {}
    columns = (_INSPECTION.token, _INSPECTION.request_key, _INSPECTION.request_place, _INSPECTION.id)
    rows = connection.execute(select(*columns).where(_INSPECTION.request_key.in_(keys)))
    return {(row.token, row.request_key, row.request_place): row.id for row in rows}
