"""Models of the REST interface: request bodies and answers."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model, model_validator

from normweave.outcome import measured
from normweave.serve import records
from normweave.types import Guarantee, Outcome

Name = Annotated[str, StringConstraints(max_length=records.NAME_LENGTH)]
Text = Annotated[str, StringConstraints(max_length=10_000)]
Rate = Annotated[float, Field(gt=0, lt=1)]


class RequestBody(BaseModel):
    """Base of request bodies; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class EncodedImage(RequestBody):
    """An image in JSON."""

    name: Name = ""
    data: Annotated[str, Field(description="Content of the file in base64.", json_schema_extra={"format": "byte"})]


class EncodedView(EncodedImage):
    """An image in JSON that may show a view of a part."""

    part: Annotated[Name, Field(description="Part that the image shows.")] = ""
    view: Annotated[Name, Field(description="Name of the view of the part.")] = ""


class InspectIn(RequestBody):
    """Images in JSON."""

    images: Annotated[list[EncodedView], Field(min_length=1)]


class ReviewIn(RequestBody):
    """Reviewer decision on a part."""

    decision: Annotated[
        records.ReviewDecision,
        Field(description="accept: the part is good; reject: it is defective; undo: no decision."),
    ]
    comment: Text = ""
    defect: Annotated[str, StringConstraints(max_length=255), Field(description="Name of the defect.")] = ""

    @model_validator(mode="after")
    def _is_of_a_defective_part(self) -> ReviewIn:
        if self.defect and self.decision != "reject":
            raise ValueError(
                f"defect is {self.defect!r:.100}, but the decision is {self.decision}. Send it with reject."
            )
        return self


class RateIn(RequestBody):
    """New false-alarm rate."""

    false_alarm_rate: Annotated[
        Rate, Field(description="Share of new normal images that may be classified as anomalous.")
    ]


class TokenIn(RequestBody):
    """Token to create."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    role: records.Role = "operator"
    expires_in_days: Annotated[float | None, Field(gt=0, le=36_500)] = None


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_NOT_IN_ANSWERS = ("image_path",)
"""Fields of the outcome that the REST interface replaces: `name` is the name of the image."""
_MODEL_NAMES = {"DefectBox": "Box", "ExpertWeight": "Expert"}
"""Names of schemas that existing clients know."""


def outcome_names(outcome: type[Outcome]) -> list[str]:
    """Return the names of the fields of an outcome that are part of a response."""
    return [column.name for column in outcome.columns() if not column.in_file and column.name not in _NOT_IN_ANSWERS]


def outcome_model(outcome: type[Outcome], *, base: type[BaseModel] = BaseModel) -> type[BaseModel]:
    """Return a subclass of `base` with the fields of an outcome. Items of its lists are pydantic models, not tuples."""
    names = outcome_names(outcome)
    fields: dict[str, Any] = {}
    for column in outcome.columns():
        if column.name in names:
            annotation = column.annotation
            if column.is_list:
                item: Any = create_model(
                    _MODEL_NAMES.get(column.type.__name__, column.type.__name__),
                    __doc__=column.type.__doc__,
                    **get_type_hints(column.type),
                )
                annotation = list[item]
            fields[column.name] = (annotation, ...)
    return create_model(f"{outcome.__name__}Out", __base__=base, **fields)


class Problem(BaseModel):
    """Reason why a request failed (RFC 9457)."""

    type: str
    title: Annotated[str, Field(description="Name of the status.")]
    status: int
    detail: Annotated[str, Field(description="What is wrong and what to do, for people; its text may change.")]
    code: Annotated[str, Field(description="What is wrong, for programs; it does not change.")]


class _FromRecord(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class ReviewOut(_FromRecord):
    """Reviewer decision."""

    at: datetime
    decision: records.ReviewDecision
    reviewer: Annotated[str, Field(description="Name of the token that the decision came with.")]
    token: Annotated[int | None, Field(description="Id of this token.")]
    comment: str
    defect: Annotated[str, Field(description="Name of the defect; empty: not named.")]


class _Arrival(BaseModel):
    id: int
    received_at: datetime
    name: str
    source: records.Source
    actor: Annotated[str, Field(description="Name of the token that the image came with.")]
    token: Annotated[int | None, Field(description="Id of this token; null: the watched folder.")]
    line: Annotated[str, Field(description="Name of the line.")]


if TYPE_CHECKING:
    _WithOutcome = _Arrival
else:
    _WithOutcome = outcome_model(Outcome, base=_Arrival)


class InspectionOut(_WithOutcome):
    """Result for an image. If `error` is set, the image could not be read and the other fields are empty."""

    image_hash: Annotated[str | None, Field(description="SHA-256 of the file as it was sent.")]
    image_url: str | None
    map_url: str | None
    overlay_url: str | None
    review: ReviewOut | None

    @classmethod
    def of(cls, inspection: records.Inspection) -> InspectionOut:
        """Return the answer for a record."""
        return cls.model_validate(_fields(inspection))


class InspectOut(BaseModel):
    """One inspection for each image, in the order of the request."""

    inspections: list[InspectionOut]


class InspectionsOut(BaseModel):
    """A page of inspections, newest first."""

    inspections: list[InspectionOut]
    next: Annotated[int | None, Field(description="`before`, or `after`, of the next page; null: this is the last.")]


class InspectionDetail(InspectionOut):
    """An inspection with all its reviewer decisions."""

    reviews: list[ReviewOut]

    @classmethod
    def with_reviews(cls, inspection: records.Inspection, reviews: list[records.Review]) -> InspectionDetail:
        """Return the answer for a record and its reviews."""
        return cls.model_validate(_fields(inspection) | {"reviews": reviews})


class ModelOut(BaseModel):
    """The model and its operating points."""

    line: Annotated[str, Field(description="Name of the line.")]
    model: str
    bundle_hash: str | None
    view_bundles: Annotated[
        dict[str, str], Field(description="`bundle_hash` of each view of parts that has a bundle of its own.")
    ]
    categories: dict[str, Any]
    fit_images: int
    calibration_images: int
    seed: int
    false_alarm_rate: float
    unknown_rate: float
    guarantee: Guarantee
    operating_points: list[dict[str, Any]]
    waiting: Annotated[int, Field(description="Number of images accepted and not yet answered.")]


class PreviewOut(_FromRecord):
    """Verdicts of the newest inspections at another false-alarm rate."""

    false_alarm_rate: float
    n: int
    now: dict[str, int]
    then: dict[str, int]
    changed: int


class RateChangeOut(_FromRecord):
    """A change of the false-alarm rate."""

    at: datetime
    bundle_hash: str
    false_alarm_rate: float
    actor: str


class RateOut(_FromRecord):
    """A measured rate with its interval."""

    estimate: Annotated[float | None, Field(description="null: it cannot be measured.")]
    low: float
    high: float
    reviewed: Annotated[int, Field(description="Number of reviewed defective images, or of good ones.")]
    reason: Annotated[str | None, Field(description="Why it cannot be measured.")]


class StratumOut(_FromRecord):
    """Images that were shown alike, and how many of them are reviewed."""

    shown: measured.Shown
    images: int
    reviewed: int
    defective: int


class MeasuredOut(_FromRecord):
    """Rates at the present operating point."""

    detection: RateOut
    false_alarms: RateOut
    strata: list[StratumOut]
    detection_by_subclass: dict[str, RateOut]
    detection_by_defect: dict[str, RateOut]
    false_alarms_by_subclass: dict[str, RateOut]
    wrong_reviews: float
    level: float


class OperatingPointRatesOut(_FromRecord):
    """Rates at the operating point of a false-alarm rate."""

    false_alarm_rate: float
    threshold: float
    detection: RateOut
    false_alarms: RateOut


class ReviewRatesOut(_FromRecord):
    """Rates measured by reviews."""

    bundle_hash: str
    inspections: int
    measured: MeasuredOut
    operating_points: list[OperatingPointRatesOut]
    present: Annotated[float | None, Field(description="Present false-alarm rate.")]
    proposed: Annotated[
        float | None, Field(description="Lowest false-alarm rate that reaches `detection`; it is not used by itself.")
    ]
    detection: float


class AuditEntryOut(_FromRecord):
    """An event of the audit."""

    id: int
    at: datetime
    event: records.AuditEvent
    actor: Annotated[str, Field(description="Name of the token, or `server`; empty: unknown.")]
    token: Annotated[int | None, Field(description="Id of the token of the actor.")]
    address: Annotated[str, Field(description="Network address of the client, if it was recorded.")]
    detail: Annotated[dict[str, Any], Field(description="What belongs to this event.")]
    line: Annotated[str, Field(description="Name of the line.")]


class AuditOut(BaseModel):
    """A page of the audit, newest first."""

    entries: list[AuditEntryOut]
    next: Annotated[int | None, Field(description="Value of `before` for the next page; null: this is the last page.")]


class TokenOut(_FromRecord):
    """A token, without its secret."""

    id: int
    name: str
    role: records.Role
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class TokenMade(TokenOut):
    """A new token with its secret, which is shown only here."""

    token: str


class Health(BaseModel):
    """The server is alive."""

    status: Literal["ok"] = "ok"


class WatchOut(_FromRecord):
    """The watched folder."""

    state: records.WatchStatus
    files_behind: int = Field(description="Images in the folder that are not inspected yet.")
    last_error: str | None = Field(description="Why the folder or a file in it is not inspected.")


class Ready(Health):
    """The server can inspect and store images."""

    watch: WatchOut | None = Field(default=None, description="Missing if no folder is watched.")


def _fields(inspection: records.Inspection) -> dict[str, Any]:
    url = f"/v1/inspections/{inspection.id}"
    image = inspection.image
    outcome = inspection.outcome.as_dict()
    return {name: outcome[name] for name in outcome_names(Outcome)} | {
        "id": inspection.id,
        "received_at": inspection.received_at,
        "name": inspection.name,
        "source": inspection.source,
        "actor": inspection.actor,
        "token": inspection.token,
        "line": inspection.line,
        "image_hash": None if image is None else image.image_hash,
        "image_url": None if image is None else f"{url}/image",
        "map_url": None if image is None else f"{url}/map",
        "overlay_url": None if image is None else f"{url}/overlay",
        "review": inspection.review,
    }
