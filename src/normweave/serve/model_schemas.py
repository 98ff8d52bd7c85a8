"""Models of the REST interface for the bundles of a library, the candidate, and the comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from normweave.serve.model_store import Comparison, Difference, Pair, ShadowRun
from normweave.serve.models import ModelsState, ModelState
from normweave.serve.schemas import InspectionOut
from normweave.types import Outcome, Verdict


class LibraryModel(BaseModel):
    """A bundle of the library."""

    name: Annotated[str, Field(description="Name of its folder.")]
    bundle_hash: Annotated[str | None, Field(description="null: it cannot be read.")]
    model: str
    categories: Annotated[dict[str, list[str]], Field(description="The subclasses of each category.")]
    written_at: Annotated[datetime | None, Field(description="Last change of its record.")]
    state: Annotated[
        ModelState, Field(description="failed: it was the candidate, and was switched off; damaged: it cannot be used.")
    ]
    reason: Annotated[str | None, Field(description="Why it is damaged or has failed.")]


class ShadowOut(BaseModel):
    """The last candidate in the shadow."""

    model_config = ConfigDict(from_attributes=True)

    bundle_hash: str
    started_at: datetime
    ended_at: Annotated[datetime | None, Field(description="null: it runs.")]
    actor: Annotated[str, Field(description="Name of the token that started it.")]
    failure: Annotated[str | None, Field(description="Why the server switched it off.")]
    skipped: Annotated[int, Field(description="Images that it did not judge, to keep its budget.")]


class ModelsOut(BaseModel):
    """The bundles of the library, and which of them inspect on this line."""

    line: Annotated[str, Field(description="Name of the line.")]
    active: Annotated[str, Field(description="Hash of the bundle that inspects.")]
    candidate: Annotated[str | None, Field(description="Hash of the bundle in the shadow.")]
    roll_back_to: Annotated[str | None, Field(description="Hash of the bundle that a roll back returns to.")]
    shadow: ShadowOut | None
    waiting: Annotated[int, Field(description="Images that wait for the candidate.")]
    models: list[LibraryModel]

    @classmethod
    def of(cls, state: ModelsState, *, line: str) -> ModelsOut:
        """Return the answer for a state."""
        return cls(
            line=line,
            active=state.active.bundle_hash,
            candidate=state.candidate,
            roll_back_to=None if state.back_to is None else state.back_to.bundle_hash,
            shadow=None if state.shadow is None else ShadowOut.model_validate(state.shadow),
            waiting=state.waiting,
            models=[
                LibraryModel(
                    name=one.name,
                    bundle_hash=one.bundle_hash,
                    model=one.model,
                    categories={name: list(subclasses) for name, subclasses in one.categories.items()},
                    written_at=one.written_at,
                    state=state.state(one),
                    reason=state.reason(one),
                )
                for one in state.bundles
            ],
        )


class PairOut(BaseModel):
    """Number of images of a subclass with these two verdicts; null: the image could not be scored."""

    category: str | None
    subclass: str | None
    active: Verdict | None
    candidate: Verdict | None
    n: int


class ReviewedOut(BaseModel):
    """What reviewers decided on these images.

    A model is right if it finds an accepted part normal, or a rejected one anomalous or unknown.
    """

    n: Annotated[int, Field(description="Reviewed images.")]
    active_right: int
    candidate_right: int


class CandidateOut(BaseModel):
    """What the candidate computed for an image."""

    verdict: Verdict | None
    pred_score: float | None
    threshold: float | None
    p_value: float | None
    category: str | None
    subclass: str | None
    error: str | None
    boxes: Annotated[list[dict[str, float | str | None]], Field(description="As of an inspection.")]
    overlay_url: str | None

    @classmethod
    def of(cls, difference: Difference) -> CandidateOut:
        """Return the answer for an image on which both differ."""
        outcome = difference.candidate.outcome
        drawn = difference.inspection.image is not None and difference.candidate.grids is not None
        return cls(
            **{name: getattr(outcome, name) for name in cls.model_fields if name not in ("boxes", "overlay_url")},
            boxes=[box._asdict() for box in outcome.boxes],
            overlay_url=overlay_url(difference.inspection.id, outcome) if drawn else None,
        )


class DifferenceOut(BaseModel):
    """An image on which active bundle and candidate have different verdicts."""

    inspection: InspectionOut
    candidate: CandidateOut


class CompareOut(BaseModel):
    """Comparison of the candidate with the active bundle, on the images that both judged."""

    active: str
    candidate: str
    judged: int
    skipped: Annotated[int, Field(description="Images of the last run that the candidate did not judge.")]
    differences: int
    pairs: list[PairOut]
    reviewed: ReviewedOut
    inspections: Annotated[list[DifferenceOut], Field(description="Those that differ, newest first.")]
    next: Annotated[int | None, Field(description="Value of `before` for the next page; null: this is the last page.")]

    @classmethod
    def of(
        cls, comparison: Comparison, run: ShadowRun, pairs: Sequence[Pair], found: Sequence[Difference], *, limit: int
    ) -> CompareOut:
        """Return the answer for the counts and a page of differences."""
        return cls(
            active=comparison.active,
            candidate=comparison.candidate,
            judged=sum(one.n for one in pairs),
            skipped=run.skipped if run.bundle_hash == comparison.candidate else 0,
            differences=sum(one.n for one in pairs if one.active != one.candidate),
            pairs=summed(pairs),
            reviewed=reviewed(pairs),
            inspections=[
                DifferenceOut(inspection=InspectionOut.of(one.inspection), candidate=CandidateOut.of(one))
                for one in found
            ],
            next=found[-1].inspection.id if len(found) == limit else None,
        )


def overlay_url(inspection: int, outcome: Outcome) -> str:
    """Return the address of the image with the map of a candidate."""
    return f"/v1/models/{outcome.bundle_hash}/inspections/{inspection}/overlay"


def summed(pairs: Iterable[Pair]) -> list[PairOut]:
    """Return the counts over all decisions."""
    counts: Counter[tuple[str | None, ...]] = Counter()
    for one in pairs:
        counts[one.category, one.subclass, one.active, one.candidate] += one.n
    names = ("category", "subclass", "active", "candidate")
    return [PairOut.model_validate(dict(zip(names, key, strict=True)) | {"n": n}) for key, n in counts.items()]


def reviewed(pairs: Iterable[Pair]) -> ReviewedOut:
    """Count the reviewed images, and those that each bundle had right."""
    right = {"accept": ("normal",), "reject": ("anomalous", "unknown")}
    known = [one for one in pairs if one.decision is not None]
    return ReviewedOut(
        n=sum(one.n for one in known),
        active_right=sum(one.n for one in known if one.active in right[str(one.decision)]),
        candidate_right=sum(one.n for one in known if one.candidate in right[str(one.decision)]),
    )
