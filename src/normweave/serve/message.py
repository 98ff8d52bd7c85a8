"""The message that outputs send for an inspection. MQTT and webhooks send it as JSON."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from normweave.serve.records import Inspection
from normweave.types import Verdict


class MessageBox(BaseModel):
    """Rectangle around a defect, in pixels of the image as it was sent."""

    model_config = ConfigDict(from_attributes=True)

    x: int
    y: int
    width: int
    height: int
    peak: Annotated[float, Field(description="Highest value of the anomaly map in the rectangle.")]


class MessageData(BaseModel):
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


class Message(BaseModel):
    """Message for an inspection, in the form that Standard Webhooks recommends."""

    type: Literal["inspection.stored"] = "inspection.stored"
    timestamp: Annotated[datetime, Field(description="When the image arrived (UTC).")]
    data: MessageData

    @classmethod
    def of(cls, inspection: Inspection) -> Message:
        """Return the message for a stored inspection."""
        outcome = inspection.outcome
        data = MessageData(
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

    @property
    def id(self) -> str:
        """Id of the message, also different from those of other servers; the same for each attempt. Has no dot."""
        data = self.data
        return f"{slug(data.line)}-{data.id}-{int(data.time.timestamp() * 1_000_000)}"


def slug(name: str) -> str:
    """Return the name of a line as a part of topics and ids: ASCII letters, digits, `_` and `-`; `line` if empty."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name) or "line"
