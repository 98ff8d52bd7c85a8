"""Routes of the REST interface for the bundles of a library."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from normweave.maps.overlay import overlay
from normweave.serve import schemas
from normweave.serve.answers import HeldAnswers
from normweave.serve.library import ModelError
from normweave.serve.model_schemas import CompareOut, ModelsOut
from normweave.serve.model_store import Actor
from normweave.serve.models import Models
from normweave.serve.openapi import BODY, image_response, problem_responses
from normweave.serve.parameters import (
    CACHED,
    DEPENDENCIES,
    DRAWN_SIDE,
    MAX_PAGE_SIZE,
    PAGE_SIZE,
    DrawnSide,
    Engineer,
    Id,
    stored_image,
    utc,
)
from normweave.serve.problems import ProblemError
from normweave.serve.rendering import ImageReader, png, shrunk
from normweave.serve.service import InspectionService

Hash = Annotated[str, Path(max_length=64, description="`bundle_hash` of a bundle of the library.")]


def model_routes(service: InspectionService, held: HeldAnswers) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["models"], dependencies=DEPENDENCIES, responses=problem_responses(401, 403, 409, 422, 503))

    async def state(models: Models) -> ModelsOut:
        return ModelsOut.of(await asyncio.to_thread(models.state), line=service.store.line)

    @router.get("/v1/models", summary="List the bundles of the library")
    async def bundles() -> ModelsOut:
        return await state(models_of(service))

    @router.get(
        "/v1/models/compare",
        summary="Compare the candidate with the active bundle",
        description="On the images that both judged. After the end of a run: the last candidate, with the bundle that "
        "was active before.",
    )
    async def compare(
        since: Annotated[
            datetime | None, Query(description="Received at this time or later; without a time zone: UTC.")
        ] = None,
        category: schemas.Name | None = None,
        subclass: schemas.Name | None = None,
        before: Annotated[int | None, Query(ge=1, le=2**53, description="Only inspections with a lower id.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = PAGE_SIZE,
    ) -> CompareOut:
        models = models_of(service)

        def read() -> CompareOut:
            run, comparison = models.comparison(since=utc(since), category=category, subclass=subclass)
            pairs = models.records.pairs(comparison)
            found = models.records.differences(comparison, before=before, limit=limit)
            return CompareOut.of(comparison, run, pairs, found, limit=limit)

        return await asyncio.to_thread(read)

    @router.post(
        "/v1/models/rollback",
        summary="Inspect again with the bundle that was active before; for engineers",
        responses=problem_responses(*BODY, 404),
    )
    async def roll_back(engineer: Engineer) -> ModelsOut:
        models = models_of(service)
        await asyncio.to_thread(models.roll_back, Actor(engineer.name, engineer.id))
        return await state(models)

    @router.post(
        "/v1/models/{bundle_hash}/shadow",
        summary="Put a bundle in the shadow of the active one; for engineers",
        description="It judges the same images after they were answered, and ends an earlier candidate.",
        responses=problem_responses(*BODY, 404),
    )
    async def start_shadow(
        bundle_hash: Hash,
        engineer: Engineer,
        any_preparation: Annotated[
            bool, Query(description="Also if it prepares images in another way than the active bundle.")
        ] = False,
    ) -> ModelsOut:
        models, actor = models_of(service), Actor(engineer.name, engineer.id)
        await asyncio.to_thread(models.start_shadow, bundle_hash, actor, any_preparation=any_preparation)
        return await state(models)

    @router.delete(
        "/v1/models/{bundle_hash}/shadow",
        summary="Stop the candidate in the shadow; for engineers",
        responses=problem_responses(404),
    )
    async def stop_shadow(bundle_hash: Hash, engineer: Engineer) -> ModelsOut:
        models = models_of(service)
        await asyncio.to_thread(models.stop_shadow, bundle_hash, Actor(engineer.name, engineer.id))
        return await state(models)

    @router.post(
        "/v1/models/{bundle_hash}/promote",
        summary="Inspect with the candidate; for engineers",
        description="No request is lost: images that were accepted before end with the bundle before.",
        responses=problem_responses(*BODY, 404),
    )
    async def promote(bundle_hash: Hash, engineer: Engineer) -> ModelsOut:
        models = models_of(service)
        await asyncio.to_thread(models.promote, bundle_hash, Actor(engineer.name, engineer.id))
        return await state(models)

    @router.get(
        "/v1/models/{bundle_hash}/inspections/{id}/overlay",
        summary="Read the image in grey, with the regions above the threshold of a candidate in colour",
        response_class=Response,
        responses=problem_responses(404, 410) | image_response("image/png"),
    )
    async def candidate_overlay(bundle_hash: Hash, id: Id, max_side: DrawnSide = DRAWN_SIDE) -> Response:
        models = models_of(service)
        stored = stored_image(await service.inspection(id))
        judged = await asyncio.to_thread(models.records.outcome, id, bundle_hash)
        if judged is None or judged.grids is None:
            raise ProblemError(
                404, f"No map of this bundle is stored for inspection {id}: only where the verdicts differ.",
                code="no_candidate_map",
            )  # fmt: skip
        grids, smoothing, threshold = judged.grids, judged.smoothing or 0.0, judged.map_threshold or 0.0

        def draw(reader: ImageReader) -> bytes:
            scores = reader.map_of(grids, judged.tiles, smoothing=smoothing, threshold=threshold, max_side=max_side)
            inside = reader.inside(grids, max_side=max_side)
            return png(overlay(reader.image(max_side=max_side), scores, threshold=threshold, inside=inside))

        height, width = shrunk(ImageReader(service.files, stored).size, max_side)
        with held.expected(4 * height * width):
            content = await service.render(stored, draw)
        return held.answer(content, media_type="image/png", headers=CACHED)

    return router


def models_of(service: InspectionService) -> Models:
    """Return the models of a server.

    Raises:
        ModelError: it serves one bundle.
    """
    if service.models is None:
        raise ModelError(
            "This server serves one bundle. Start it with 'normweave serve --library DIR' to compare and exchange "
            "bundles.",
            code="no_library",
        )
    return service.models
