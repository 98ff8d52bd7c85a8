"""The shapes of REST: what comes in and what is answered."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from normweave.serve import records
from normweave.types import Verdict

Name = Annotated[str, StringConstraints(max_length=500)]
Text = Annotated[str, StringConstraints(max_length=10_000)]
Rate = Annotated[float, Field(gt=0, lt=1)]


class Shape(BaseModel):
    """What comes in may hold nothing that nobody reads."""

    model_config = ConfigDict(extra="forbid")


# ── in ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


class EncodedImage(Shape):
    """An image in JSON."""

    name: Name = ""
    data: Annotated[
        str, Field(description="The file's bytes in base64.", json_schema_extra={"format": "byte"})
    ]


class InspectIn(Shape):
    """Images in JSON."""

    images: Annotated[list[EncodedImage], Field(min_length=1)]


class ReviewIn(Shape):
    """What a person says of the part."""

    decision: Annotated[
        records.Decision,
        Field(description="accept: the part is good; reject: it is defective; undo: neither."),
    ]
    reviewer: Annotated[Name, Field(description="Left out: the name of the token.")] = ""
    comment: Text = ""


class RateIn(Shape):
    """A new line."""

    false_alarm_rate: Annotated[
        Rate, Field(description="Share of new normal images that may be called anomalous.")
    ]


class TokenIn(Shape):
    """A token to be made."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    role: records.Role = "operator"
    expires_in_days: Annotated[float | None, Field(gt=0, le=36_500)] = None


# ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Problem(BaseModel):
    """Why not."""

    error: str


class Box(BaseModel):
    """A region above the line, in pixels of the image."""

    x: int
    y: int
    width: int
    height: int
    peak: float


class Expert(BaseModel):
    """An expert that was asked."""

    name: str
    weight: float


class ReviewOut(BaseModel):
    """What a person said."""

    at: datetime
    decision: records.Decision
    reviewer: str
    comment: str


class InspectionOut(BaseModel):
    """What was said of an image. `error` set: it could not be read, and the rest is empty."""

    id: int
    received_at: datetime
    name: str
    source: records.Source
    actor: str
    verdict: Verdict | None
    pred_score: float | None
    p_value: float | None
    threshold: float | None
    false_alarm_rate: float | None
    category: str | None
    subclass: str | None
    subclass_distance: float | None
    subclass_p_value: float | None
    unseen: bool
    experts: list[Expert]
    adapted: bool
    boxes: list[Box]
    height: int | None
    width: int | None
    latency_ms: float | None
    model: str | None
    bundle_hash: str | None
    error: str | None
    image_hash: Annotated[str | None, Field(description="SHA-256 of the image as it came in.")]
    image_url: str | None
    map_url: str | None
    overlay_url: str | None
    review: ReviewOut | None

    @classmethod
    def of(cls, inspection: records.Inspection) -> InspectionOut:
        """From a record."""
        fields: dict[str, Any] = inspection.outcome.as_dict()
        picture, place = inspection.image, f"/v1/inspections/{inspection.id}"
        there = picture is not None
        return cls(
            **{key: value for key, value in fields.items() if key not in ("image_path", "anomaly_map")},
            id=inspection.id,
            received_at=inspection.received_at,
            name=inspection.name,
            source=inspection.source,
            actor=inspection.actor,
            image_hash=None if picture is None else picture.image_hash,
            image_url=f"{place}/image" if there else None,
            map_url=f"{place}/map" if there else None,
            overlay_url=f"{place}/overlay" if there else None,
            review=None if inspection.review is None else review_out(inspection.review),
        )


class InspectOut(BaseModel):
    """One inspection an image, in their order."""

    inspections: list[InspectionOut]


class InspectionsOut(BaseModel):
    """A page of inspections, newest first."""

    inspections: list[InspectionOut]
    next: Annotated[int | None, Field(description="Ask with before=next for the next page; null: no more.")]


class InspectionDetail(InspectionOut):
    """An inspection with all that people said of it."""

    reviews: list[ReviewOut]


class ModelOut(BaseModel):
    """What is at work."""

    model: str
    bundle_hash: str | None
    categories: dict[str, Any]
    fit_images: int
    calibration_images: int
    seed: int
    false_alarm_rate: float
    unknown_rate: float
    operating_points: list[dict[str, Any]]
    waiting: Annotated[int, Field(description="Images taken and not yet answered.")]


class PreviewOut(BaseModel):
    """What another false-alarm rate would have said of the newest inspections."""

    false_alarm_rate: float
    n: int
    now: dict[str, int]
    then: dict[str, int]
    changed: int


class RateChangeOut(BaseModel):
    """Somebody moved the line."""

    at: datetime
    bundle_hash: str
    false_alarm_rate: float
    actor: str


class TokenOut(BaseModel):
    """A token, without its secret."""

    id: int
    name: str
    role: records.Role
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, token: records.Token) -> TokenOut:
        """From a record."""
        return cls(
            id=token.id,
            name=token.name,
            role=token.role,
            created_at=token.created_at,
            expires_at=token.expires_at,
            revoked_at=token.revoked_at,
        )


class TokenMade(TokenOut):
    """A new token; its secret is seen this once."""

    token: str


class Health(BaseModel):
    """Alive."""

    status: Literal["ok"] = "ok"


def review_out(review: records.Review) -> ReviewOut:
    """From a record."""
    return ReviewOut(at=review.at, decision=review.decision, reviewer=review.reviewer, comment=review.comment)
