"""Routes of the REST interface for parts of several views."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from normweave.outcome.parts import MAX_IMAGES
from normweave.serve import schemas
from normweave.serve.openapi import problem_responses
from normweave.serve.parameters import DEPENDENCIES, MAX_PAGE_SIZE, PAGE_SIZE, Id
from normweave.serve.part_store import PartStore
from normweave.serve.records import NotFoundError, PartRecord
from normweave.serve.service import InspectionService
from normweave.types import PartVerdict


class PartReasonOut(BaseModel):
    """Why a part is not normal."""

    model_config = ConfigDict(from_attributes=True)

    reason: Literal["anomalous", "unknown", "unreadable", "missing"]
    view: Annotated[str | None, Field(description="Name of the view; null: views are counted, and one is missing.")]
    inspection: Annotated[int | None, Field(description="Id of the inspection of this view; null: it is missing.")]


class PartOut(BaseModel):
    """The verdict on a part when it was closed, or a later correction of it."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    at: Annotated[datetime, Field(description="When it was closed, or corrected.")]
    part_id: str
    line: Annotated[str, Field(description="Name of the line.")]
    verdict: PartVerdict
    reasons: Annotated[list[PartReasonOut], Field(description="Why it is not normal, worst first.")]
    images: Annotated[int, Field(description="Number of its images at this time.")]
    expected: Annotated[int | list[str] | None, Field(description="Expected views; null: any.")]
    corrects: Annotated[int | None, Field(description="Id of the verdict that this corrects; null: no correction.")]


class PartsOut(BaseModel):
    """A page of verdicts on parts."""

    parts: list[PartOut]
    next: Annotated[int | None, Field(description="`before`, or `after`, of the next page; null: this is the last.")]


class PartDetail(PartOut):
    """A verdict on a part with its images and all its verdicts."""

    inspections: list[schemas.InspectionOut]
    verdicts: Annotated[list[PartOut], Field(description="The first verdict and its corrections, oldest first.")]


def part_routes(service: InspectionService) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["parts"], dependencies=DEPENDENCIES, responses=problem_responses(401, 403, 422, 503))
    records = PartStore(service.store)

    @router.get(
        "/v1/parts",
        summary="List verdicts on parts and their corrections, newest first",
        description="With `after`, oldest first: to read what is new, ask with the id of the last verdict read.",
    )
    async def parts(
        part_id: schemas.Name | None = None,
        verdict: Annotated[list[PartVerdict] | None, Query(description="May be repeated.")] = None,
        line: schemas.Name | None = None,
        before: Annotated[int | None, Query(ge=1, le=2**53, description="Only verdicts with a lower id.")] = None,
        after: Annotated[int | None, Query(ge=0, le=2**53, description="Only verdicts with a higher id.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = PAGE_SIZE,
    ) -> PartsOut:
        found = await asyncio.to_thread(
            records.records,
            part_id=part_id,
            verdicts=verdict or (),
            line=line,
            before=before,
            after=after,
            limit=limit,
        )
        return PartsOut(
            parts=[PartOut.model_validate(one) for one in found], next=found[-1].id if len(found) == limit else None
        )

    @router.get("/v1/parts/{id}", summary="Read a verdict on a part", responses=problem_responses(404))
    async def part(id: Id) -> PartDetail:
        def read() -> PartDetail:
            record = part_record(records, id)
            found = records.inspections(record.root, limit=MAX_IMAGES)
            return PartDetail.model_validate(
                PartOut.model_validate(record).model_dump()
                | {
                    "inspections": [schemas.InspectionOut.of(one) for one in found],
                    "verdicts": [PartOut.model_validate(one) for one in records.of(record.root)],
                }
            )

        return await asyncio.to_thread(read)

    return router


def part_record(records: PartStore, id: int) -> PartRecord:
    """Return the verdict with this id.

    Raises:
        NotFoundError: there is none.
    """
    found = records.record(id)
    if found is None:
        raise NotFoundError(f"There is no verdict {id} on a part. GET /v1/parts lists them.")
    return found
