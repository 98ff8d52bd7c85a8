"""REST interface: one function for each route, which calls the inspection service."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartException

from normweave.maps.overlay import CROP, heat, overlay
from normweave.outcome.measured import WRONG_REVIEWS
from normweave.references import seen
from normweave.serve import events, handlers, metrics, records, schemas
from normweave.serve.access import Access
from normweave.serve.answers import HeldAnswers
from normweave.serve.delivery import Deliveries
from normweave.serve.handlers import messages
from normweave.serve.line_routes import line_routes
from normweave.serve.model_routes import model_routes
from normweave.serve.openapi import (
    BODY,
    BYTES,
    FORM,
    IMAGES,
    INSPECT_BODY,
    JSON,
    PART_FIELDS,
    complete_document,
    image_response,
    problem_responses,
)
from normweave.serve.parameters import (
    CACHED,
    DEPENDENCIES,
    DRAWN_SIDE,
    MAX_PAGE_SIZE,
    PAGE_SIZE,
    AnyToken,
    DrawnSide,
    Engineer,
    Id,
    MaxSide,
    stored_image,
    utc,
)
from normweave.serve.part_routes import part_routes
from normweave.serve.problems import ProblemError
from normweave.serve.rates import DETECTION, NEWEST, measured_rates
from normweave.serve.records import Filter, Source, StoredImage
from normweave.serve.rendering import ImageReader, npy, png, shrunk
from normweave.serve.repeats import KeyedRequests
from normweave.serve.service import InspectionService, Upload
from normweave.serve.source import SourceRunner
from normweave.serve.teach import Teaching
from normweave.serve.teach_routes import teach_routes
from normweave.serve.watch import Watch
from normweave.types import Verdict


def add_api(
    app: FastAPI,
    service: InspectionService,
    access: Access | None,
    watch: Watch | None,
    teaching: Teaching,
    outputs: Deliveries,
    sources: Sequence[SourceRunner],
) -> None:
    """Add all routes, and the answers to errors.

    Args:
        access: None: the routes of tokens are left out.
    """
    held = HeldAnswers(service.config.max_held_bytes)
    app.state.teaching = teaching
    app.state.streams = streams = events.EventStreams(service)
    routers = [
        _open_routes(service, watch),
        _routes(service, streams, held),
        model_routes(service, held),
        part_routes(service),
        teach_routes(service, teaching),
        line_routes(service, outputs, sources),
        *([] if access is None else [_token_routes(access)]),
    ]
    for router in routers:
        app.include_router(router)
    complete_document(app)
    handlers.add_handlers(app, [route for router in routers for route in router.routes])


# ── routes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _open_routes(service: InspectionService, watch: Watch | None) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz", summary="Check that the process runs")
    async def healthz() -> schemas.Health:
        return schemas.Health()

    @router.get(
        "/readyz",
        summary="Check that the server can inspect and store images",
        responses=problem_responses(503),
        response_model_exclude_unset=True,
    )
    async def readyz() -> schemas.Ready:
        await asyncio.to_thread(service.check_ready)
        if watch is None:
            return schemas.Ready(status="ok")
        watch.check_ready()
        return schemas.Ready(status="ok", watch=schemas.WatchOut.model_validate(watch.state))

    return router


def _routes(service: InspectionService, streams: events.EventStreams, held: HeldAnswers) -> APIRouter:
    keyed = KeyedRequests(service)
    router = APIRouter(dependencies=DEPENDENCIES, responses=problem_responses(401, 403, 422, 503))

    async def render(
        stored: StoredImage,
        work: Callable[[ImageReader], bytes],
        *,
        media_type: str = "image/png",
        max_side: int | None = CROP,
    ) -> Response:
        height, width = shrunk(ImageReader(service.files, stored).size, max_side)
        with held.expected(4 * height * width):  # the bytes of a map, or of colours with transparency
            content = await service.render(stored, work)
        return held.answer(content, media_type=media_type, headers=CACHED)

    @router.post(
        "/v1/inspect",
        summary="Inspect images",
        description="Inspections are answered in the order of the images, and stored before the answer is sent. An "
        "image that cannot be read has `error` set and does not affect the others. With an Idempotency-Key, a request "
        "can be sent again: equal images and names are answered from the store.",
        responses=problem_responses(*BODY, 415),
        openapi_extra=INSPECT_BODY,
    )
    async def inspect(
        request: Request,
        token: AnyToken,
        name: Annotated[schemas.Name, Query(description="File name of an image that is sent as the body.")] = "",
        part: Annotated[schemas.Name, Query(description="Part that this image shows.")] = "",
        view: Annotated[schemas.Name, Query(description="Name of the view of the part.")] = "",
        idempotency_key: Annotated[
            str | None,
            Header(min_length=1, max_length=255, description="Different for each request; equal when it is repeated."),
        ] = None,
    ) -> schemas.InspectOut:
        uploads = await _uploads(request, service, Upload(name, b"", part or None, view or None))
        try:
            async with asyncio.timeout(service.config.answer_seconds):
                if idempotency_key is None:
                    inspections = await service.inspect(uploads, source="api", actor=token.name, token=token.id)
                else:
                    inspections = await keyed.inspect(uploads, key=idempotency_key, actor=token.name, token=token.id)
        except TimeoutError:
            raise ProblemError(
                503,
                f"No answer within {service.config.answer_seconds:g} s. The images were accepted and may still "
                "be inspected. Look with GET /v1/inspections, or repeat a request with an Idempotency-Key.",
                code="answer_timeout",
            ) from None
        return schemas.InspectOut(inspections=[schemas.InspectionOut.of(one) for one in inspections])

    @router.get(
        "/v1/inspections",
        summary="List inspections, newest first",
        description="With `after`, oldest first: to read what is new, ask with the id of the last inspection read.",
    )
    async def inspections(
        chosen: Annotated[Filter, Depends(_filter)],
        before: Annotated[int | None, Query(ge=1, le=2**53, description="Only inspections with a lower id.")] = None,
        after: Annotated[int | None, Query(ge=0, le=2**53, description="Only inspections with a higher id.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = PAGE_SIZE,
    ) -> schemas.InspectionsOut:
        found = await asyncio.to_thread(service.store.inspections, chosen, before=before, after=after, limit=limit)
        return schemas.InspectionsOut(
            inspections=[schemas.InspectionOut.of(one) for one in found],
            next=found[-1].id if len(found) == limit else None,
        )

    @router.get(
        "/v1/inspections/events",
        summary="Follow new inspections",
        description="Server-sent events: each has the id of an inspection and its JSON. It begins after Last-Event-ID, "
        "without it with the next inspection; it ends after some minutes, and clients connect again.",
        response_class=StreamingResponse,
        responses={200: {"content": {events.MEDIA_TYPE: {"schema": {"type": "string"}}}, "description": "Events."}},
    )
    async def follow(
        last_event_id: Annotated[int | None, Header(ge=0, le=2**53, description="Only later inspections.")] = None,
    ) -> StreamingResponse:
        stream = await streams.start(last_event_id)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream, media_type=events.MEDIA_TYPE, headers=headers)

    @router.get("/v1/inspections/{id}", summary="Read an inspection", responses=problem_responses(404))
    async def inspection(id: Id) -> schemas.InspectionDetail:
        found = await service.inspection(id)
        reviews = await asyncio.to_thread(service.store.reviews, id)
        return schemas.InspectionDetail.with_reviews(found, reviews)

    @router.get(
        "/v1/inspections/{id}/image",
        summary="Read the image",
        response_class=Response,
        responses=problem_responses(404, 410) | image_response("image/*"),
    )
    async def image(
        id: Id,
        format: Annotated[
            Literal["original", "png"], Query(description="The file as it was sent, or a PNG.")
        ] = "original",
        max_side: MaxSide = None,
    ) -> Response:
        stored = stored_image(await service.inspection(id))
        if format == "original":
            content = await service.read_image(stored)
            return held.answer(content, media_type=stored.image_type, headers=CACHED)
        return await render(stored, lambda reader: png(reader.image(max_side=max_side)), max_side=max_side)

    @router.get(
        "/v1/inspections/{id}/map",
        summary="Read the anomaly map",
        description="A PNG with transparency to show over the image, or the (height, width) float32 values as .npy.",
        response_class=Response,
        responses=problem_responses(404, 410) | image_response("image/png", BYTES),
    )
    async def anomaly_map(id: Id, format: Literal["png", "npy"] = "png", max_side: DrawnSide = DRAWN_SIDE) -> Response:
        stored = stored_image(await service.inspection(id))
        if format == "npy":
            return await render(stored, lambda reader: npy(reader.anomaly_map()), media_type=BYTES, max_side=None)

        def draw(reader: ImageReader) -> bytes:
            scores, inside = reader.anomaly_map(max_side=max_side), reader.inside(max_side=max_side)
            return png(heat(scores, threshold=stored.map_threshold, inside=inside))

        return await render(stored, draw, max_side=max_side)

    @router.get(
        "/v1/inspections/{id}/overlay",
        operation_id="laid_over_v1_inspections__id__overlay_get",  # used by clients generated from the schema
        summary="Read the image in grey, with the regions above the threshold in colour",
        response_class=Response,
        responses=problem_responses(404, 410) | image_response("image/png"),
    )
    async def map_overlay(id: Id, max_side: DrawnSide = DRAWN_SIDE) -> Response:
        stored = stored_image(await service.inspection(id))

        def draw(reader: ImageReader) -> bytes:
            pixels, scores = reader.image(max_side=max_side), reader.anomaly_map(max_side=max_side)
            inside = reader.inside(max_side=max_side)
            return png(overlay(pixels, scores, threshold=stored.map_threshold, inside=inside))

        return await render(stored, draw, max_side=max_side)

    @router.get(
        "/v1/inspections/{id}/boxes/{number}/{side}",
        summary="Read the surroundings of a box, or of the region of a good image that it was compared with",
        response_class=Response,
        responses=problem_responses(404, 410) | image_response("image/png"),
    )
    async def box(
        id: Id,
        number: Annotated[int, Path(ge=0, le=2**31, description="Position in `boxes`, from 0.")],
        side: Annotated[Literal["seen", "expected"], Path(description="The image itself, or the good image.")],
    ) -> Response:
        found = await service.inspection(id)
        stored = stored_image(found)
        if number >= len(found.outcome.boxes):
            raise HTTPException(404, f"Inspection {id} has {len(found.outcome.boxes)} boxes, counted from 0.")
        chosen = found.outcome.boxes[number]
        if side == "seen":
            return await render(stored, lambda reader: png(seen(reader.image(), chosen)))
        references = service.references(found)
        if references is None or not references.shows(chosen):
            raise HTTPException(404, f"This bundle has no picture of the good image of box {number}.")
        return await render(stored, lambda _: png(references.expected(chosen)))

    @router.post(
        "/v1/inspections/{id}/review", summary="Add a reviewer decision", responses=problem_responses(*BODY, 404)
    )
    async def review(id: Id, body: schemas.ReviewIn, token: AnyToken) -> schemas.InspectionOut:
        inspection = await service.review(
            id, decision=body.decision, reviewer=token.name, token=token.id, comment=body.comment, defect=body.defect
        )
        return schemas.InspectionOut.of(inspection)

    @router.get(
        "/v1/reviews/rates",
        summary="Measure the detection rate and the false-alarm rate by the reviews",
        description="Of the newest inspections with this bundle, weighted by which of them were reviewed. Each image "
        "counts once. The proposed rate is not used by itself.",
    )
    async def review_rates(
        wrong_reviews: Annotated[
            float, Query(ge=0, lt=0.5, description="Largest share of wrong decisions.")
        ] = WRONG_REVIEWS,
        detection: Annotated[float, Query(gt=0, le=1, description="That the proposed rate must reach.")] = DETECTION,
        last: Annotated[int, Query(ge=1, le=NEWEST)] = NEWEST,
    ) -> schemas.ReviewRatesOut:
        detector = service.detector
        found = await asyncio.to_thread(
            measured_rates,
            service.store,
            detector.bundle_hash or "",
            calibration=detector.calibration,
            wrong_reviews=wrong_reviews,
            detection=detection,
            newest=last,
        )
        return schemas.ReviewRatesOut.model_validate(found)

    @router.get("/v1/model", summary="Describe the model")
    async def model() -> schemas.ModelOut:
        return _model(service)

    @router.get(
        "/v1/model/preview",
        summary="Preview verdicts of the newest inspections at another false-alarm rate",
    )
    async def preview(
        false_alarm_rate: Annotated[float, Query(gt=0, lt=1)],
        last: Annotated[int, Query(ge=1, le=20_000)] = 10_000,
    ) -> schemas.PreviewOut:
        return schemas.PreviewOut.model_validate(await service.preview_rate(false_alarm_rate, last))

    @router.put(
        "/v1/model/false-alarm-rate",
        summary="Change the false-alarm rate; for engineers",
        responses=problem_responses(*BODY),
    )
    async def change_rate(body: schemas.RateIn, engineer: Engineer) -> schemas.ModelOut:
        await service.change_rate(body.false_alarm_rate, actor=engineer.name, token=engineer.id)
        return _model(service)

    @router.get(
        "/v1/model/rates",
        summary="List changes of the false-alarm rate, oldest first; for engineers",
    )
    async def rates(_: Engineer) -> list[schemas.RateChangeOut]:
        changes = await asyncio.to_thread(service.store.rates)
        return [schemas.RateChangeOut.model_validate(change) for change in changes]

    @router.get(
        "/v1/audit",
        summary="List the events of the audit, newest first; for engineers",
    )
    async def audit(
        _: Engineer,
        event: records.AuditEvent | None = None,
        before: Annotated[int | None, Query(ge=1, le=2**53, description="Only entries with a lower id.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = PAGE_SIZE,
    ) -> schemas.AuditOut:
        found = await asyncio.to_thread(service.store.audit, event=event, before=before, limit=limit)
        return schemas.AuditOut(
            entries=[schemas.AuditEntryOut.model_validate(entry) for entry in found],
            next=found[-1].id if len(found) == limit else None,
        )

    @router.get("/metrics", summary="Read the metrics for Prometheus", response_class=Response)
    async def counters() -> Response:
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    return router


def _token_routes(access: Access) -> APIRouter:
    router = APIRouter(dependencies=DEPENDENCIES, responses=problem_responses(401, 403, 422, 503), tags=["tokens"])

    @router.get("/v1/tokens", summary="List tokens, without their secrets; for engineers")
    async def tokens(_: Engineer) -> list[schemas.TokenOut]:
        return [schemas.TokenOut.model_validate(token) for token in await asyncio.to_thread(access.tokens)]

    @router.post(
        "/v1/tokens",
        summary="Create a token; the answer is the only one with its secret; for engineers",
        status_code=201,
        responses=problem_responses(*BODY),
    )
    async def make(body: schemas.TokenIn, engineer: Engineer) -> schemas.TokenMade:
        new = await asyncio.to_thread(
            access.create,
            name=body.name,
            role=body.role,
            days=body.expires_in_days,
            actor=engineer.name,
            by=engineer.id,
        )
        return schemas.TokenMade.model_validate(vars(new.token) | {"token": new.secret})

    @router.delete("/v1/tokens/{id}", summary="Revoke a token; for engineers", responses=problem_responses(404, 409))
    async def revoke(id: Id, engineer: Engineer) -> schemas.TokenOut:
        token = await asyncio.to_thread(access.revoke, id, actor=engineer.name, by=engineer.id)
        return schemas.TokenOut.model_validate(token)

    return router


# ── uploads ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _uploads(request: Request, service: InspectionService, body: Upload) -> list[Upload]:
    """Return the images of a request from its form, JSON or raw body.

    Args:
        body: name, part and view of an image that is the body.

    Raises:
        HTTPException: the request cannot be parsed, or exceeds a limit.
        ConfigError: an image has a view and no part.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == FORM:
        uploads = await _from_form(request, service.config.max_images)
    elif content_type == JSON:
        uploads = await asyncio.to_thread(_from_json, await request.body())
    elif content_type == BYTES or content_type.startswith("image/"):
        uploads = [body._replace(content=await request.body())]
    else:
        raise HTTPException(
            415,
            f"The content type must be {FORM} (field {IMAGES!r}), {JSON} (base64), or, for one image as the body, "
            f"image/* or {BYTES}; got {content_type or 'no content type'!r:.100}.",
        )
    config = service.config
    if not uploads:
        raise HTTPException(422, f"The request has no image. Send one or more as {IMAGES!r}.")
    identify = service.part_rule.identify
    for one in uploads:
        identify(one.name, part=one.part, view=one.view)  # a view without a part is refused
    if len(uploads) > config.max_images:
        raise HTTPException(
            413,
            f"The request has {len(uploads)} images, but at most {config.max_images} are allowed. Send more requests.",
        )
    if large := [upload for upload in uploads if len(upload.content) > config.max_image_bytes]:
        raise HTTPException(
            413,
            f"The image {large[0].name!r:.100} has {len(large[0].content):,} bytes, but at most "
            f"{config.max_image_bytes:,} are allowed for one image.",
        )
    return uploads


async def _from_form(request: Request, max_images: int) -> list[Upload]:
    try:
        async with request.form(max_files=max_images, max_fields=8 + 2 * max_images) as form:
            parts = form.getlist(IMAGES)
            if not all(isinstance(part, UploadFile) for part in parts):
                raise HTTPException(
                    422, f"{IMAGES!r} must contain files, got text. With curl: -F '{IMAGES}=@part.png'."
                )
            if other := sorted(set(form) - {IMAGES, *PART_FIELDS}):
                raise HTTPException(
                    422,
                    f"The form has the unknown field {other[0]!r:.100}. Allowed are {IMAGES!r}, "
                    f"{' and '.join(map(repr, PART_FIELDS))}: correct its name, or leave it out.",
                )
            files = [part for part in parts if isinstance(part, UploadFile)]
            if long := [part for part in files if len(part.filename or "") > records.NAME_LENGTH]:
                raise HTTPException(
                    422,
                    f"The name {long[0].filename!r:.100} has {len(long[0].filename or '')} characters, but at most "
                    f"{records.NAME_LENGTH} are allowed. Send a shorter one.",
                )
            given = zip(*(_texts(form.getlist(name), name, len(files)) for name in PART_FIELDS), strict=True)
            return [
                Upload(file.filename or "", await file.read(), part, view)
                for file, (part, view) in zip(files, given, strict=True)
            ]
    except (StarletteHTTPException, MultiPartException) as error:
        if isinstance(error, HTTPException):
            raise
        reason = error.detail if isinstance(error, StarletteHTTPException) else error.message
        status = 413 if "Too many" in str(reason) else 400
        raise HTTPException(status, f"The form cannot be read: {reason}") from error


def _texts(given: Sequence[object], name: str, images: int) -> list[str | None]:
    """Return the text of a form field for each image, which is sent once for all or once for each."""
    texts = [text for text in given if isinstance(text, str) and len(text) <= records.NAME_LENGTH]
    if len(texts) < len(given) or len(texts) not in (0, 1, images):
        raise HTTPException(
            422,
            f"{name!r} must be text of at most {records.NAME_LENGTH} characters, once for all {images} images or once "
            f"for each in their order, got {len(given)} values. With curl: -F '{name}=17'.",
        )
    return [text or None for text in (texts if len(texts) == images else (texts or [""]) * images)]


def _from_json(body: bytes) -> list[Upload]:
    try:
        parsed = schemas.InspectIn.model_validate_json(body)
    except ValidationError as error:
        raise HTTPException(422, messages(error.errors(include_url=False, include_input=False))) from error
    uploads = []
    for image in parsed.images:
        try:
            content = base64.b64decode(image.data, validate=True)
            uploads.append(Upload(image.name, content, image.part or None, image.view or None))
        except (binascii.Error, ValueError) as error:
            raise HTTPException(
                422, f"data of {image.name!r:.100} is not base64: {error}. Encode the whole file as base64."
            ) from error
    return uploads


# ── inspections ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _filter(
    since: Annotated[
        datetime | None, Query(description="Received at this time or later; without a time zone: UTC.")
    ] = None,
    until: Annotated[datetime | None, Query(description="Received before this time.")] = None,
    verdict: Annotated[list[Verdict] | None, Query(description="May be repeated.")] = None,
    unreadable: Annotated[bool | None, Query(description="Whether the image could not be read.")] = None,
    category: schemas.Name | None = None,
    subclass: schemas.Name | None = None,
    name: schemas.Name | None = None,
    source: Source | None = None,
    line: schemas.Name | None = None,
    reviewed: Annotated[bool | None, Query(description="Whether it has a reviewer decision.")] = None,
    decision: Literal["accept", "reject"] | None = None,
    bundle_hash: schemas.Name | None = None,
) -> Filter:
    return Filter(
        since=utc(since),
        until=utc(until),
        verdicts=tuple(verdict or ()),
        unreadable=unreadable,
        category=category,
        subclass=subclass,
        name=name,
        source=source,
        line=line,
        reviewed=reviewed,
        decision=decision,
        bundle_hash=bundle_hash,
    )


def _model(service: InspectionService) -> schemas.ModelOut:
    detector = service.detector
    calibration = detector.calibration
    assert calibration is not None  # a bundle without operating points is not loaded
    record = detector.record
    return schemas.ModelOut(
        line=service.store.line,
        model=record["model"],
        bundle_hash=detector.bundle_hash,
        view_bundles=dict(service.detectors.view_hashes),
        categories=record["categories"],
        fit_images=record["fit_images"],
        calibration_images=record["calibration_images"],
        seed=record["seed"],
        false_alarm_rate=calibration.false_alarm_rate,
        unknown_rate=calibration.unknown_rate,
        guarantee=calibration.guarantee,
        operating_points=calibration.table(detector.subclass_names),
        waiting=service.waiting,
    )
