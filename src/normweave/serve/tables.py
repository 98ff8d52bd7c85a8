"""Tables of the store, equal in SQLite and PostgreSQL, and the conversion between rows and records.

Timestamps are microseconds since 1970 (UTC), so that the database can compute with them. Lists are JSON text. Text is
cut to the length of its column, and characters that PostgreSQL refuses (NUL, lone surrogates) become U+FFFD; this also
applies to the text of a filter, so that a filter finds what was stored.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
    Text,
    TypeDecorator,
    insert,
    text,
)

from normweave.serve.records import (
    NAME_LENGTH,
    AuditEntry,
    DriftAlarm,
    Inspection,
    PartRecord,
    RequestPart,
    Review,
    StoredImage,
)
from normweave.types import Outcome, OutcomeColumn, PartReason, Tile

SHORT, LONG = 255, 4000
"""Maximum number of characters of the name of a token, a product or a line, and of a comment."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class BoundedText(TypeDecorator[str]):
    """Text of at most `length` characters; longer text is cut."""

    impl = String
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Return the text that both databases can store."""
        return None if value is None else re.sub("[\0\ud800-\udfff]", "\ufffd", value)[: self.length]


class Timestamp(TypeDecorator[datetime]):
    """A datetime with time zone, stored as whole microseconds since 1970 (UTC)."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Return microseconds; raise TypeError for a datetime without time zone."""
        return None if value is None else (value - EPOCH) // timedelta(microseconds=1)

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        """Return the datetime in UTC."""
        return None if value is None else EPOCH + timedelta(microseconds=value)


class Json(TypeDecorator[Any]):
    """Lists as ASCII JSON text; the JSON types of databases change numbers and refuse characters."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Return the JSON text."""
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """Return the parsed JSON."""
        return None if value is None else json.loads(value)


def outcome_columns(outcome: type[Outcome]) -> list[Column[Any]]:
    """Return a database column for each field of the outcome that is not kept in a file."""

    def type_of(column: OutcomeColumn) -> Any:
        if column.is_list:
            return Json()
        if column.type is str:
            return BoundedText(column.max_length or SHORT)
        return {float: Float(53), int: Integer(), bool: Boolean()}[column.type]

    columns = (column for column in outcome.columns() if not column.in_file)
    return [Column(column.name, type_of(column), nullable=column.optional) for column in columns]


def _id() -> Column[int]:
    """Return a primary key that is never reused (the migrations set AUTOINCREMENT, which SQLite has for INTEGER)."""
    return Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True)


METADATA = MetaData()
_CLOSED_PART = "part IS NOT NULL"
_OPEN_PART = "part_id IS NOT NULL AND part IS NULL"
INSPECTIONS = Table(
    "inspections",
    METADATA,
    _id(),
    Column("received_at", Timestamp, nullable=False),
    Column("name", BoundedText(NAME_LENGTH), nullable=False),
    Column("source", BoundedText(SHORT), nullable=False),
    Column("actor", BoundedText(SHORT), nullable=False),
    Column("token", BigInteger),
    Column("line", BoundedText(SHORT), nullable=False, server_default=""),
    Column("routed", Integer),
    *outcome_columns(Outcome),
    Column("part", BigInteger),  # id in `parts` of the closed part; NULL: it is open, or the image shows none
    # StoredImage; all NULL without one
    Column("image_hash", BoundedText(64)),
    Column("image_type", BoundedText(SHORT)),
    Column("image_bytes", BigInteger),
    Column("grids_hash", BoundedText(64)),
    Column("grids_bytes", BigInteger),
    Column("tiles", Json),
    Column("smoothing", Float(53)),
    Column("map_threshold", Float(53)),
    # RequestPart; all NULL without one
    Column("request_key", BoundedText(SHORT)),
    Column("request_hash", BoundedText(64)),
    Column("request_place", Integer),
    # a copy of the current review, so that lists need no join
    Column("decision", BoundedText(SHORT)),
    Column("reviewed_at", Timestamp),
    Column("reviewer", BoundedText(SHORT)),
    Column("reviewer_token", BigInteger),
    Column("comment", BoundedText(LONG)),
    Column("defect", BoundedText(SHORT)),
    Index("inspections_received_at", "received_at"),
    Index("inspections_verdict", "verdict", "id"),
    Index("inspections_name", "name", "id"),
    Index("inspections_decision", "decision", "id"),
    Index("inspections_bundle_hash", "bundle_hash", "id"),
    Index("inspections_request_key", "request_key", "id"),
    Index("inspections_image_hash", "image_hash", "id", "image_bytes"),
    Index("inspections_grids_hash", "grids_hash", "id", "grids_bytes"),
    Index("inspections_part", "part", "id", sqlite_where=text(_CLOSED_PART), postgresql_where=text(_CLOSED_PART)),
    Index("inspections_open_part", "line", "id", sqlite_where=text(_OPEN_PART), postgresql_where=text(_OPEN_PART)),
)
PARTS = Table(
    "parts",
    METADATA,
    _id(),
    Column("at", Timestamp, nullable=False),
    Column("part_id", BoundedText(NAME_LENGTH), nullable=False),
    Column("line", BoundedText(SHORT), nullable=False),
    Column("verdict", BoundedText(SHORT), nullable=False),
    Column("reasons", Json, nullable=False),
    Column("images", Integer, nullable=False),
    Column("expected", Json),
    Column("corrects", BigInteger),
    Index("parts_part_id", "part_id", "id"),
    Index("parts_corrects", "corrects", "id"),
    Index("parts_at", "at"),
)
"""Closed parts and their corrections. `corrects`: id of the row of the closed part, NULL in this row itself."""
REVIEWS = Table(
    "reviews",
    METADATA,
    _id(),
    Column("inspection", ForeignKey("inspections.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("at", Timestamp, nullable=False),
    Column("decision", BoundedText(SHORT), nullable=False),
    Column("reviewer", BoundedText(SHORT), nullable=False),
    Column("token", BigInteger),
    Column("comment", BoundedText(LONG), nullable=False),
    Column("defect", BoundedText(SHORT), nullable=False, server_default=""),
)
TOKENS = Table(
    "tokens",
    METADATA,
    _id(),
    Column("name", BoundedText(SHORT), nullable=False),
    Column("role", BoundedText(SHORT), nullable=False),
    Column("digest", BoundedText(64), nullable=False, unique=True),
    Column("created_at", Timestamp, nullable=False),
    Column("expires_at", Timestamp),
    Column("revoked_at", Timestamp),
)
RATES = Table(
    "rates",
    METADATA,
    _id(),
    Column("at", Timestamp, nullable=False),
    Column("bundle_hash", BoundedText(SHORT), nullable=False),
    Column("false_alarm_rate", Float(53), nullable=False),
    Column("actor", BoundedText(SHORT), nullable=False),
)
AUDIT = Table(
    "audit",
    METADATA,
    _id(),
    Column("at", Timestamp, nullable=False),
    Column("event", BoundedText(SHORT), nullable=False),
    Column("actor", BoundedText(SHORT), nullable=False),
    Column("token", BigInteger),
    Column("address", BoundedText(SHORT), nullable=False),
    Column("detail", Json, nullable=False),
    Column("line", BoundedText(SHORT), nullable=False),
)
"""Triggers refuse changes and removals."""
SESSIONS = Table(
    "sessions",
    METADATA,
    _id(),
    Column("digest", BoundedText(64), nullable=False, unique=True),
    Column("token", BigInteger, nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("used_at", Timestamp, nullable=False),
)
ACTIVATIONS = Table(
    "activations",
    METADATA,
    _id(),
    Column("line", BoundedText(SHORT), nullable=False),
    Column("at", Timestamp, nullable=False),
    Column("bundle_hash", BoundedText(64), nullable=False),
    Column("before", BigInteger),
    Column("actor", BoundedText(SHORT), nullable=False),
    Index("activations_line", "line", "id"),
)
"""The bundles of each line; the last row is active. `before`: the row that a roll back returns to, or NULL."""
SHADOWS = Table(
    "shadows",
    METADATA,
    _id(),
    Column("line", BoundedText(SHORT), nullable=False),
    Column("bundle_hash", BoundedText(64), nullable=False),
    Column("active_hash", BoundedText(64), nullable=False),
    Column("started_at", Timestamp, nullable=False),
    Column("ended_at", Timestamp),
    Column("actor", BoundedText(SHORT), nullable=False),
    Column("failure", BoundedText(LONG)),
    Column("skipped", BigInteger, nullable=False),
    Index("shadows_line", "line", "id"),
)
"""The candidates of each line; `ended_at` is NULL while one runs. `active_hash`: the bundle that was active before."""
SHADOW_OUTCOME = (
    *("verdict", "pred_score", "p_value", "threshold", "category", "subclass", "unseen"),
    *("boxes", "model", "bundle_hash", "error"),
)
"""Fields of the outcome that are kept of a candidate."""
SHADOW_OUTCOMES = Table(
    "shadow_outcomes",
    METADATA,
    _id(),
    Column("inspection", ForeignKey("inspections.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("line", BoundedText(SHORT), nullable=False),
    *(column for column in outcome_columns(Outcome) if column.name in SHADOW_OUTCOME),
    Column("tiles", Json),
    Column("smoothing", Float(53)),
    Column("map_threshold", Float(53)),
    Column("grids", LargeBinary),
    Index("shadow_outcomes_bundle_hash", "bundle_hash", "inspection"),
)
"""Outcomes of candidates. The last four columns are those of the map, kept if the verdicts differ."""
DELIVERIES = Table(
    "deliveries",
    METADATA,
    Column("line", BoundedText(SHORT), primary_key=True),
    Column("name", BoundedText(SHORT), primary_key=True),
    Column("attempts", Integer, nullable=False),
    Column("last_error", BoundedText(LONG)),
    Column("last_success_at", Timestamp),
)
"""One row for each output of a line."""
CURSORS = Table(
    "delivery_cursors",
    METADATA,
    Column("line", BoundedText(SHORT), primary_key=True),
    Column("name", BoundedText(SHORT), primary_key=True),
    Column("subject", BoundedText(SHORT), primary_key=True),
    Column("last_id", BigInteger, nullable=False),
    Column("removed", BigInteger, nullable=False),
)
"""One row for each output of a line and each subject that it delivers: all of the line up to `last_id` is delivered.
`removed`: how much retention has removed before it was delivered, since a person acknowledged it last."""
DRIFT_ALARMS = Table(
    "drift_alarms",
    METADATA,
    _id(),
    Column("line", BoundedText(SHORT), nullable=False),
    Column("time", Timestamp, nullable=False),
    Column("bundle_hash", BoundedText(64), nullable=False),
    Column("cause", BoundedText(SHORT), nullable=False),
    Column("subclass", BoundedText(2 * SHORT), nullable=False),
    Column("since", BoundedText(SHORT), nullable=False),
    Column("since_inspection", BigInteger, nullable=False),
    Column("evidence", Float(53)),
    Column("effect", BoundedText(LONG), nullable=False),
    Column("advice", BoundedText(LONG), nullable=False),
    Column("inspections", Json, nullable=False),
)
DEAD_LETTERS = Table(
    "dead_letters",
    METADATA,
    _id(),
    Column("line", BoundedText(SHORT), nullable=False),
    Column("output", BoundedText(SHORT), nullable=False),
    Column("at", Timestamp, nullable=False),
    Column("reason", BoundedText(LONG), nullable=False),
    Column("message", Json, nullable=False),
    Column("again", Boolean, nullable=False),
    Index("dead_letters_output", "line", "output", "id"),
)
"""Messages that the counterpart of an output has refused for good. `again`: a person wants it sent again."""
PROBE = Table("probe", METADATA, Column("id", Integer, primary_key=True), Column("at", Timestamp))
"""One row, written to test whether the database can be written."""
IDENTITY = Table("identity", METADATA, Column("id", BoundedText(32), primary_key=True))
"""One row, made with the table; a copy of the database has the same."""

STORED_IMAGE = tuple(field.name for field in fields(StoredImage) if field.name != "size")
"""Columns of a `StoredImage`."""
_OUTCOME = tuple(column for column in Outcome.columns() if not column.in_file)
_ARRIVAL = ("received_at", "name", "source", "actor", "token", "line", "routed")
REVIEW = {
    "at": "reviewed_at",
    "decision": "decision",
    "reviewer": "reviewer",
    "token": "reviewer_token",
    "comment": "comment",
    "defect": "defect",
}
"""Column of the inspection for each field of its current `Review`."""


def to_row(inspection: Inspection) -> dict[str, Any]:
    """Return the columns of a new inspection."""
    return (
        {name: getattr(inspection, name) for name in _ARRIVAL}
        | {column.name: getattr(inspection.outcome, column.name) for column in _OUTCOME}
        | {name: getattr(inspection.image, name, None) for name in STORED_IMAGE}
        | {f"request_{name}": getattr(inspection.request, name, None) for name in RequestPart._fields}
    )


def to_inspection(row: Row[Any]) -> Inspection:
    """Return the inspection of a row."""
    values = row._mapping
    outcome: dict[str, Any] = {
        column.name: tuple(column.type(*item) for item in values[column.name])
        if column.is_list
        else values[column.name]
        for column in _OUTCOME
    }
    image = review = request = None
    if row.image_hash is not None:
        image = StoredImage(**{name: values[name] for name in STORED_IMAGE})
        size = None if row.height is None else (row.height, row.width)
        image = replace(image, tiles=tuple(Tile(*tile) for tile in row.tiles), size=size)
    if row.decision is not None:
        review = Review(**{name: values[column] for name, column in REVIEW.items()})
    if row.request_key is not None:
        request = RequestPart(row.request_key, row.request_hash, row.request_place)
    arrival = {name: values[name] for name in _ARRIVAL}
    return Inspection(id=row.id, outcome=Outcome(**outcome), image=image, review=review, request=request, **arrival)


def to_part(row: Row[Any]) -> PartRecord:
    """Return the verdict on a part of a row."""
    values = dict(row._mapping)
    values["reasons"] = tuple(PartReason._make(item) for item in row.reasons)
    if isinstance(row.expected, list):
        values["expected"] = tuple(row.expected)
    return PartRecord(**values)


def to_alarm(row: Row[Any]) -> DriftAlarm:
    """Return the alarm of drift of a row."""
    return DriftAlarm(**{**row._mapping, "inspections": tuple(row.inspections)})


def add_entry(connection: Connection, entry: AuditEntry) -> None:
    """Add an entry to the audit, within a transaction."""
    values = {name: value for name, value in vars(entry).items() if name != "id"}
    connection.execute(insert(AUDIT).values(values))
