"""Routes of the REST interface that teach a new product; for engineers."""

from __future__ import annotations

import asyncio
import base64
import binascii
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, HTTPException, Path, Response
from pydantic import BaseModel, ConfigDict, Field

from normweave.serve import schemas
from normweave.serve.model_store import Actor
from normweave.serve.openapi import BODY, image_response, problem_responses
from normweave.serve.parameters import DEPENDENCIES, Engineer, Id, stored_image
from normweave.serve.service import InspectionService, Upload
from normweave.serve.teach import MOST, Teaching, TeachJob, TeachState


class _FromRecord(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class TeachIn(schemas.RequestBody):
    """A new product, and good images of it: stored inspections, or files."""

    category: schemas.Name
    subclass: schemas.Name
    inspections: Annotated[list[int], Field(default_factory=list, max_length=MOST, description="Ids of inspections.")]
    images: Annotated[list[schemas.EncodedImage], Field(default_factory=list, max_length=MOST)]


class HeldOutOut(_FromRecord):
    """An image that the new product was not trained on; null until it is scored."""

    name: str
    verdict: str | None
    score: float | None
    threshold: float | None
    subclass: str | None


class TeachOut(_FromRecord):
    """A training of a new product."""

    id: int
    category: str
    subclass: str
    actor: Annotated[str, Field(description="Name of the token of the engineer.")]
    state: TeachState
    step: str
    started_at: datetime
    ended_at: datetime | None
    images: Annotated[int, Field(description="Number of images for training.")]
    held_out: list[HeldOutOut]
    base_hash: Annotated[str, Field(description="Of the bundle that the product is added to.")]
    bundle_hash: str | None
    promise: str | None
    in_shadow: bool
    error: str | None


class TeachingOut(_FromRecord):
    """Whether this server can train, and the current or last job."""

    missing: Annotated[str | None, Field(description="Why it cannot train, with the command that cures it.")]
    job: TeachOut | None


def teach_routes(service: InspectionService, teaching: Teaching) -> APIRouter:
    """Return the routes."""
    responses = problem_responses(401, 403, 409, 422, 503)
    router = APIRouter(tags=["teach"], dependencies=DEPENDENCIES, responses=responses)

    @router.get("/v1/teach", summary="Read whether the server can train, and its last job; for engineers")
    async def last(_: Engineer) -> TeachingOut:
        return TeachingOut.model_validate({"missing": teaching.missing(), "job": teaching.job})

    @router.post(
        "/v1/teach",
        summary="Train a new product in a process of its own; for engineers",
        description="Every fifth image is held out and scored with the new bundle. The active bundle stays as it is.",
        status_code=202,
        responses=problem_responses(*BODY, 404, 410),
    )
    async def start(body: TeachIn, engineer: Engineer) -> TeachOut:
        uploads = await asyncio.to_thread(_decoded, body.images)
        uploads += await stored_uploads(service, body.inspections)
        actor = Actor(engineer.name, engineer.id)
        names = {"category": body.category, "subclass": body.subclass}
        return _out(await asyncio.to_thread(teaching.start, uploads, **names, actor=actor))

    @router.get("/v1/teach/{id}", summary="Read a job; for engineers", responses=problem_responses(404))
    async def job(id: Id, _: Engineer) -> TeachOut:
        found = teaching.job
        if found is None or found.id != id:
            raise HTTPException(404, f"There is no job {id}; it was thrown away, or another one was started.")
        return _out(found)

    @router.get(
        "/v1/teach/{id}/held-out/{number}/map",
        summary="Read a held-out image with its map; for engineers",
        response_class=Response,
        responses=problem_responses(404) | image_response("image/png"),
    )
    async def held_out_map(
        id: Id, number: Annotated[int, Path(ge=0, le=MOST, description="Position in `held_out`.")], _: Engineer
    ) -> Response:
        path = await asyncio.to_thread(teaching.held_out_map, id, number)
        return Response(await asyncio.to_thread(path.read_bytes), media_type="image/png")

    @router.post(
        "/v1/teach/{id}/keep",
        summary="Put the new bundle into the library and into the shadow; for engineers",
        responses=problem_responses(*BODY, 404),
    )
    async def keep(id: Id, engineer: Engineer) -> TeachOut:
        return _out(await asyncio.to_thread(teaching.keep, id, Actor(engineer.name, engineer.id)))

    @router.delete(
        "/v1/teach/{id}", summary="Throw a job away; for engineers", status_code=204, responses=problem_responses(404)
    )
    async def discard(id: Id, engineer: Engineer) -> None:
        await asyncio.to_thread(teaching.discard, id, Actor(engineer.name, engineer.id))

    return router


async def stored_uploads(service: InspectionService, ids: list[int]) -> list[Upload]:
    """Return the images of inspections.

    Raises:
        NormweaveError: an inspection or its image is not stored.
    """
    uploads = []
    for id in ids:
        found = await service.inspection(id)
        uploads.append(Upload(found.name or str(id), await service.read_image(stored_image(found))))
    return uploads


def _decoded(given: list[schemas.EncodedImage]) -> list[Upload]:
    try:
        return [Upload(image.name, base64.b64decode(image.data, validate=True)) for image in given]
    except (binascii.Error, ValueError) as error:
        raise HTTPException(422, f"The data of an image is not base64: {error}. Encode the whole file.") from error


def _out(job: TeachJob) -> TeachOut:
    return TeachOut.model_validate(job)
