"""The messages that outputs send: for an inspection, for the verdict on a part, and for an alarm of drift.

MQTT and webhooks send them as JSON.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from normweave.serve.records import DriftAlarm, Inspection, PartRecord, Subject
from normweave.types import PartVerdict, Verdict


class MessageBox(BaseModel):
    """Rectangle around a defect, in pixels of the image as it was sent."""

    model_config = ConfigDict(from_attributes=True)

    x: int
    y: int
    width: int
    height: int
    peak: Annotated[float, Field(description="Highest value of the anomaly map in the rectangle.")]


class InspectionData(BaseModel):
    """Result for an image."""

    id: Annotated[
        int, Field(description="Id of the inspection. Ids ascend; a message that is repeated has the same id.")
    ]
    time: Annotated[datetime, Field(description="When the image arrived (UTC).")]
    line: Annotated[str, Field(description="Name of the line.")]
    name: Annotated[str, Field(description="Name of the image.")]
    part_id: Annotated[str | None, Field(description="Id of the part; null: the image names none.")]
    view: Annotated[str | None, Field(description="Name of the view of the part; null: it has none.")]
    verdict: Annotated[Verdict | None, Field(description="null: the image could not be read, see `error`.")]
    category: str | None
    subclass: str | None
    score: float | None
    threshold: float | None
    p_value: float | None
    false_alarm_rate: float | None
    boxes: list[MessageBox]
    bundle_hash: str | None
    error: str | None


class PartReason(BaseModel):
    """Why a part is not normal."""

    model_config = ConfigDict(from_attributes=True)

    reason: Literal["anomalous", "unknown", "unreadable", "missing"]
    view: Annotated[str | None, Field(description="Name of the view; null: views are counted, and one is missing.")]
    inspection: Annotated[int | None, Field(description="Id of the inspection of this view; null: it is missing.")]


class PartData(BaseModel):
    """Verdict on a part of several views."""

    id: Annotated[int, Field(description="Id of the verdict. Ids ascend; a message that is repeated has the same id.")]
    time: Annotated[datetime, Field(description="When the part was closed, or its verdict was corrected (UTC).")]
    line: Annotated[str, Field(description="Name of the line.")]
    part_id: Annotated[str, Field(description="Id of the part.")]
    verdict: PartVerdict
    reasons: Annotated[list[PartReason], Field(description="Why it is not normal, worst first.")]
    images: Annotated[int, Field(description="Number of its images at this time.")]
    expected: Annotated[int | list[str] | None, Field(description="Expected views; null: any.")]
    revision: Annotated[int, Field(description="1: the first verdict on the part; 2 and more: a correction of it.")]
    corrects: Annotated[int | None, Field(description="Id of the first verdict; null: this is the first.")]
    corrected: Annotated[bool, Field(description="Whether a later correction was stored already; its message follows.")]


class DriftData(BaseModel):
    """A change of the images since the calibration."""

    model_config = ConfigDict(from_attributes=True)

    id: Annotated[int, Field(description="Id of the alarm. Ids ascend; a message that is repeated has the same id.")]
    time: Annotated[datetime, Field(description="When the alarm was raised (UTC).")]
    line: Annotated[str, Field(description="Name of the line.")]
    bundle_hash: str
    cause: Annotated[str, Field(description="As `normweave drift` names it.")]
    subclass: Annotated[str, Field(description="CATEGORY/SUBCLASS; empty: all images.")]
    since: Annotated[str, Field(description="When the change began, by estimate; empty: not known.")]
    since_inspection: Annotated[int, Field(description="Id of the inspection with which it began, by estimate.")]
    evidence: float | None
    effect: Annotated[str, Field(description="Size of the change, for people.")]
    advice: str
    inspections: Annotated[list[int], Field(description="Ids of inspections that show it, newest first.")]


class _Message(BaseModel):
    """What all messages have, in the form that Standard Webhooks recommends."""

    subject: ClassVar[Subject]

    timestamp: Annotated[datetime, Field(description="`time` of the data (UTC).")]
    data: Any

    @property
    def id(self) -> str:
        """Id of the message, also different from those of other servers; the same for each attempt. Has no dot."""
        data = self.data
        before = "" if self.subject == "inspections" else f"{self.subject}-"
        return f"{slug(data.line)}-{before}{data.id}-{int(data.time.timestamp() * 1_000_000)}"


class InspectionMessage(_Message):
    """Message for an inspection."""

    subject: ClassVar[Subject] = "inspections"

    type: Literal["inspection.stored"] = "inspection.stored"
    data: InspectionData

    @classmethod
    def of(cls, inspection: Inspection) -> InspectionMessage:
        """Return the message for a stored inspection."""
        outcome = inspection.outcome
        data = InspectionData(
            id=inspection.id,
            time=inspection.received_at,
            line=inspection.line,
            name=inspection.name,
            part_id=outcome.part_id,
            view=outcome.view,
            verdict=outcome.verdict,
            category=outcome.category,
            subclass=outcome.subclass,
            score=outcome.pred_score,
            threshold=outcome.threshold,
            p_value=outcome.p_value,
            false_alarm_rate=outcome.false_alarm_rate,
            boxes=[MessageBox.model_validate(box) for box in outcome.boxes],
            bundle_hash=outcome.bundle_hash,
            error=outcome.error,
        )
        return cls(timestamp=inspection.received_at, data=data)


class PartMessage(_Message):
    """Message for the verdict on a part, or for a correction of it by a late view."""

    subject: ClassVar[Subject] = "parts"

    type: Literal["part.closed", "part.corrected"]
    data: PartData

    @classmethod
    def of(cls, record: PartRecord, *, revision: int, corrected: bool) -> PartMessage:
        """Return the message for a stored verdict.

        Args:
            revision: 1 for the first verdict on the part, and 1 more for each correction.
            corrected: whether a later correction is stored.
        """
        data = PartData(
            id=record.id,
            time=record.at,
            line=record.line,
            part_id=record.part_id,
            verdict=record.verdict,
            reasons=[PartReason.model_validate(one) for one in record.reasons],
            images=record.images,
            expected=list(record.expected) if isinstance(record.expected, tuple) else record.expected,
            revision=revision,
            corrects=record.corrects,
            corrected=corrected,
        )
        type: Literal["part.closed", "part.corrected"] = "part.closed" if revision == 1 else "part.corrected"
        return cls(type=type, timestamp=record.at, data=data)


class DriftMessage(_Message):
    """Message for an alarm of drift."""

    subject: ClassVar[Subject] = "drift"

    type: Literal["drift.alarm"] = "drift.alarm"
    data: DriftData

    @classmethod
    def of(cls, alarm: DriftAlarm) -> DriftMessage:
        """Return the message for a stored alarm."""
        return cls(timestamp=alarm.time, data=DriftData.model_validate(alarm))


Message = InspectionMessage | PartMessage | DriftMessage
MESSAGES: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])
"""Reads a message from JSON values, and has its schema."""


def slug(name: str) -> str:
    """Return the name of a line as a part of topics and ids: ASCII letters, digits, `_` and `-`; `line` if empty."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name) or "line"
