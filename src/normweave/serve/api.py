"""REST: one function a route; what they do is the service's."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartException

from normweave.errors import CheckError, ConfigError, NormweaveError
from normweave.maps.overlay import heat, overlay
from normweave.serve import metrics, schemas
from normweave.serve.access import Access
from normweave.serve.limits import RETRY_SECONDS
from normweave.serve.records import Filter, Inspection, NotFoundError, Source, StoredImage, Token
from normweave.serve.service import BusyError, ImageReader, InspectionService, Upload, png
from normweave.types import Verdict

IMAGES = "images"
"""Field of the form that holds them."""
PAGE = 100
"""Inspections a page, unless told otherwise."""
MOST = 1000
JSON = "application/json"
FORM = "multipart/form-data"
BYTES = "application/octet-stream"


def add_api(app: FastAPI, service: InspectionService, access: Access | None) -> None:
    """Every route, and what goes wrong in our words."""
    app.include_router(_open_routes(service))
    app.include_router(_routes(service))
    if access is not None:
        app.include_router(_token_routes(access))
    for kind, answer in _ERRORS.items():
        app.add_exception_handler(kind, answer)


# ── who ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _holder(request: Request) -> Token:
    token: Token = request.state.token  # the gate has let it in
    return token


def _engineer(request: Request) -> Token:
    token = _holder(request)
    if token.role != "engineer":
        raise HTTPException(
            403, f"This takes the role of an engineer; the token {token.name!r} is an {token.role}'s."
        )
    return token


Holder = Annotated[Token, Depends(_holder)]
Engineer = Annotated[Token, Depends(_engineer)]
Number = Annotated[int, Path(ge=1, le=2**53)]
MaxSide = Annotated[
    int | None, Query(ge=16, le=20_000, description="Shrink to at most so many pixels a side.")
]


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the document says of answers that are none."""
    reasons = {
        400: "The request cannot be understood.",
        401: "No token, or one that is unknown, expired or revoked.",
        403: "The token's role is not enough, or a login was used where a token is needed.",
        404: "There is no such thing.",
        408: "The request did not arrive in time.",
        413: "Too many bytes or images.",
        415: "No way to send images.",
        422: "A value is out of range.",
        429: "Too much waits. Come back after Retry-After seconds.",
        503: "Not now.",
    }
    return {status: {"model": schemas.Problem, "description": reasons[status]} for status in statuses}


# ── routes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _open_routes(service: InspectionService) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz", summary="Whether the process lives")
    async def healthz() -> schemas.Health:
        return schemas.Health()

    @router.get("/readyz", summary="Whether images would be judged and kept", responses=_problems(503))
    async def readyz() -> schemas.Health:
        await asyncio.to_thread(service.ready)
        return schemas.Health()

    return router


def _routes(service: InspectionService) -> APIRouter:
    router = APIRouter(responses=_problems(401, 403))

    @router.post(
        "/v1/inspect",
        summary="Judge one image or many",
        description="Each image comes back in its order, and is kept before the answer is sent. One that cannot be "
        "read has its `error` set and does not stop the others.",
        responses=_problems(400, 408, 413, 415, 422, 429, 503),
        openapi_extra=_INSPECT_BODY,
    )
    async def inspect(
        request: Request,
        holder: Holder,
        name: Annotated[schemas.Name, Query(description="Of an image that is sent as the body itself.")] = "",
    ) -> schemas.InspectOut:
        uploads = await _uploads(request, service, name)
        try:
            async with asyncio.timeout(service.config.answer_seconds):
                inspections = await service.inspect(uploads, source="api", actor=holder.name)
        except TimeoutError:
            raise HTTPException(
                503,
                f"No answer within {service.config.answer_seconds:g} s. The images were taken and are judged all the "
                "same: look for them with GET /v1/inspections.",
                headers={"Retry-After": str(RETRY_SECONDS)},
            ) from None
        return schemas.InspectOut(inspections=[schemas.InspectionOut.of(one) for one in inspections])

    @router.get("/v1/inspections", summary="What was inspected, newest first", responses=_problems(422, 503))
    async def inspections(
        wanted: Annotated[Filter, Depends(_filter)],
        before: Annotated[
            int | None, Query(ge=1, le=2**53, description="Only those with a lower id.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=MOST)] = PAGE,
    ) -> schemas.InspectionsOut:
        found = await asyncio.to_thread(service.store.inspections, wanted, before=before, limit=limit)
        return schemas.InspectionsOut(
            inspections=[schemas.InspectionOut.of(one) for one in found],
            next=found[-1].id if len(found) == limit else None,
        )

    @router.get("/v1/inspections/{id}", summary="One inspection", responses=_problems(404, 422, 503))
    async def inspection(id: Number) -> schemas.InspectionDetail:
        found = await service.inspection(id)
        reviews = await asyncio.to_thread(service.store.reviews, id)
        return schemas.InspectionDetail(
            **schemas.InspectionOut.of(found).model_dump(),
            reviews=[schemas.review_out(review) for review in reviews],
        )

    @router.get(
        "/v1/inspections/{id}/image",
        summary="Its image",
        response_class=Response,
        responses=_problems(404, 422, 503) | _content("image/*"),
    )
    async def image(
        id: Number,
        format: Annotated[
            Literal["original", "png"], Query(description="As it came in, or as PNG.")
        ] = "original",
        max_side: MaxSide = None,
    ) -> Response:
        picture = _picture(await service.inspection(id))
        if format == "original":
            content = await service.read_image(picture)
            return Response(content, media_type=picture.image_type, headers=_CACHED)
        content = await service.render(picture, lambda drawing: png(drawing.image(), max_side=max_side))
        return Response(content, media_type="image/png", headers=_CACHED)

    @router.get(
        "/v1/inspections/{id}/map",
        summary="Its anomaly map",
        description="As colours with transparency to lay over the image, or as the numbers (height, width) float32.",
        response_class=Response,
        responses=_problems(404, 422, 503) | _content("image/png", BYTES),
    )
    async def anomaly_map(
        id: Number, format: Literal["png", "npy"] = "png", max_side: MaxSide = None
    ) -> Response:
        picture = _picture(await service.inspection(id))
        if format == "npy":
            return Response(await service.render(picture, _numbers), media_type=BYTES, headers=_CACHED)

        def colours(drawing: ImageReader) -> bytes:
            return png(heat(drawing.anomaly_map(), threshold=picture.map_threshold), max_side=max_side)

        return Response(await service.render(picture, colours), media_type="image/png", headers=_CACHED)

    @router.get(
        "/v1/inspections/{id}/overlay",
        summary="Its image in grey, with what lies above the line in colour",
        response_class=Response,
        responses=_problems(404, 422, 503) | _content("image/png"),
    )
    async def laid_over(id: Number, max_side: MaxSide = None) -> Response:
        picture = _picture(await service.inspection(id))

        def both(drawing: ImageReader) -> bytes:
            pixels = overlay(drawing.image(), drawing.anomaly_map(), threshold=picture.map_threshold)
            return png(pixels, max_side=max_side)

        return Response(await service.render(picture, both), media_type="image/png", headers=_CACHED)

    @router.post(
        "/v1/inspections/{id}/review",
        summary="Say what the part really is",
        responses=_problems(404, 422, 503),
    )
    async def review(id: Number, given: schemas.ReviewIn, holder: Holder) -> schemas.InspectionOut:
        inspection = await service.review(
            id, decision=given.decision, reviewer=given.reviewer or holder.name, comment=given.comment
        )
        return schemas.InspectionOut.of(inspection)

    @router.get("/v1/model", summary="What is at work")
    async def model() -> schemas.ModelOut:
        return _model(service)

    @router.get(
        "/v1/model/preview",
        summary="What another false-alarm rate would have said of the newest inspections",
        responses=_problems(422, 503),
    )
    async def preview(
        false_alarm_rate: Annotated[float, Query(gt=0, lt=1)],
        last: Annotated[int, Query(ge=1, le=20_000)] = 10_000,
    ) -> schemas.PreviewOut:
        return schemas.PreviewOut(**vars(await service.preview_rate(false_alarm_rate, last)))

    @router.put(
        "/v1/model/false-alarm-rate",
        summary="Move the line; for engineers",
        responses=_problems(422, 503),
    )
    async def change_rate(given: schemas.RateIn, engineer: Engineer) -> schemas.ModelOut:
        await service.change_rate(given.false_alarm_rate, actor=engineer.name)
        return _model(service)

    @router.get(
        "/v1/model/rates", summary="Who moved the line, newest first; for engineers", responses=_problems(503)
    )
    async def rates(_: Engineer) -> list[schemas.RateChangeOut]:
        changes = await asyncio.to_thread(service.store.rates)
        return [schemas.RateChangeOut(**vars(change)) for change in changes]

    @router.get("/metrics", summary="Counters for Prometheus", response_class=Response)
    async def counters() -> Response:
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    return router


def _token_routes(access: Access) -> APIRouter:
    router = APIRouter(responses=_problems(401, 403), tags=["tokens"])

    @router.get(
        "/v1/tokens", summary="Tokens, without their secrets; for engineers", responses=_problems(503)
    )
    async def tokens(_: Engineer) -> list[schemas.TokenOut]:
        return [schemas.TokenOut.of(token) for token in await asyncio.to_thread(access.all)]

    @router.post(
        "/v1/tokens",
        summary="Make a token; its secret is shown this once; for engineers",
        status_code=201,
        responses=_problems(422, 503),
    )
    async def make(given: schemas.TokenIn, _: Engineer) -> schemas.TokenMade:
        made = await asyncio.to_thread(
            access.create, name=given.name, role=given.role, days=given.expires_in_days
        )
        return schemas.TokenMade(**schemas.TokenOut.of(made.token).model_dump(), token=made.secret)

    @router.delete(
        "/v1/tokens/{id}", summary="Make a token worthless; for engineers", responses=_problems(404, 422, 503)
    )
    async def revoke(id: Number, _: Engineer) -> schemas.TokenOut:
        return schemas.TokenOut.of(await asyncio.to_thread(access.revoke, id))

    return router


# ── images in ────────────────────────────────────────────────────────────────────────────────────────────────────────

_INSPECT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            FORM: {
                "schema": {
                    "type": "object",
                    "required": [IMAGES],
                    "properties": {
                        IMAGES: {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "contentMediaType": BYTES},
                        }
                    },
                }
            },
            JSON: {"schema": schemas.InspectIn.model_json_schema()},
            BYTES: {"schema": {"type": "string", "contentMediaType": BYTES}},
        },
    }
}


async def _uploads(request: Request, service: InspectionService, name: str) -> list[Upload]:
    """The images of a request, however they were sent.

    Raises:
        HTTPException: it cannot be understood, or holds too much.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM:
        uploads = await _from_form(request, service.config.max_images)
    elif kind == JSON:
        uploads = await asyncio.to_thread(_from_json, await request.body())
    elif kind == BYTES or kind.startswith("image/"):
        uploads = [Upload(name, await request.body())]
    else:
        raise HTTPException(
            415,
            f"Images come as {FORM} (field {IMAGES!r}), as {JSON} (base64), or as the body itself (as image/png or "
            f"{BYTES}), got {kind or 'no content type'!r:.100}.",
        )
    config = service.config
    if not uploads:
        raise HTTPException(422, f"There is no image in the request. Send one or more as {IMAGES!r}.")
    if len(uploads) > config.max_images:
        raise HTTPException(
            413,
            f"{len(uploads)} images in one request, but this server takes at most {config.max_images}. Send several.",
        )
    if large := [upload for upload in uploads if len(upload.content) > config.max_image_bytes]:
        raise HTTPException(
            413,
            f"The image {large[0].name!r:.100} has {len(large[0].content):,} bytes, but this server takes at most "
            f"{config.max_image_bytes:,} an image.",
        )
    return uploads


async def _from_form(request: Request, max_images: int) -> list[Upload]:
    try:
        async with request.form(max_files=max_images, max_fields=8) as form:
            parts = form.getlist(IMAGES)
            if not all(isinstance(part, UploadFile) for part in parts):
                raise HTTPException(
                    422, f"{IMAGES!r} must be files, got text. With curl: -F '{IMAGES}=@part.png'."
                )
            return [
                Upload((part.filename or "")[:500], await part.read())
                for part in parts
                if isinstance(part, UploadFile)
            ]
    except (StarletteHTTPException, MultiPartException) as error:
        if isinstance(error, HTTPException):
            raise
        reason = error.detail if isinstance(error, StarletteHTTPException) else error.message
        status = 413 if "Too many" in str(reason) else 400
        raise HTTPException(status, f"The form cannot be read: {reason}") from error


def _from_json(body: bytes) -> list[Upload]:
    try:
        given = schemas.InspectIn.model_validate_json(body)
    except ValidationError as error:
        raise HTTPException(422, _wrong(error.errors(include_url=False, include_input=False))) from error
    uploads = []
    for image in given.images:
        try:
            uploads.append(Upload(image.name, base64.b64decode(image.data, validate=True)))
        except (binascii.Error, ValueError) as error:
            raise HTTPException(
                422, f"data of {image.name!r:.100} is not base64: {error}. Encode the whole file."
            ) from error
    return uploads


# ── what was kept ────────────────────────────────────────────────────────────────────────────────────────────────────

_CACHED = {"Cache-Control": "private, max-age=3600"}


def _filter(
    since: Annotated[
        datetime | None, Query(description="Received at this moment or later; without a zone: UTC.")
    ] = None,
    until: Annotated[datetime | None, Query(description="Received before this moment.")] = None,
    verdict: Annotated[list[Verdict] | None, Query(description="May be repeated.")] = None,
    unreadable: Annotated[
        bool | None, Query(description="Only images that could not be read, or only others.")
    ] = None,
    category: schemas.Name | None = None,
    subclass: schemas.Name | None = None,
    name: schemas.Name | None = None,
    source: Source | None = None,
    reviewed: Annotated[bool | None, Query(description="Whether somebody accepted or rejected it.")] = None,
    decision: Literal["accept", "reject"] | None = None,
    bundle_hash: schemas.Name | None = None,
) -> Filter:
    return Filter(
        since=_utc(since),
        until=_utc(until),
        verdicts=tuple(verdict or ()),
        unreadable=unreadable,
        category=category,
        subclass=subclass,
        name=name,
        source=source,
        reviewed=reviewed,
        decision=decision,
        bundle_hash=bundle_hash,
    )


def _utc(moment: datetime | None) -> datetime | None:
    """Of a moment without a zone that in UTC."""
    return moment if moment is None or moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _picture(inspection: Inspection) -> StoredImage:
    if inspection.image is None:
        why = "could not be read" if inspection.outcome.error is not None else "has been removed to make room"
        raise HTTPException(404, f"The image of inspection {inspection.id} {why}.")
    return inspection.image


def _numbers(drawing: ImageReader) -> bytes:
    content = io.BytesIO()
    np.save(content, drawing.anomaly_map(), allow_pickle=False)
    return content.getvalue()


def _content(*types: str) -> dict[int | str, dict[str, Any]]:
    schema = {"type": "string", "contentMediaType": BYTES}
    return {200: {"content": {name: {"schema": schema} for name in types}, "description": "The picture."}}


def _model(service: InspectionService) -> schemas.ModelOut:
    runtime = service.detector
    calibration = runtime.calibration
    assert calibration is not None  # a bundle without a line is not loaded
    lines = calibration.as_dict()
    record = runtime.record
    return schemas.ModelOut(
        model=record["model"],
        bundle_hash=runtime.bundle_hash,
        categories=record["categories"],
        fit_images=record["fit_images"],
        calibration_images=record["calibration_images"],
        seed=record["seed"],
        false_alarm_rate=calibration.false_alarm_rate,
        unknown_rate=calibration.unknown_rate,
        operating_points=lines["operating_points"],
        waiting=service.waiting,
    )


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


def _problem(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": reason}, status_code=status, headers=headers)


def _wrong(errors: Any) -> str:
    """All mistakes of a request in one line."""
    return "; ".join(
        f"{'.'.join(str(part) for part in error['loc']) or 'body'}: {error['msg']}"
        for error in list(errors)[:10]
    )


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return _problem(error.status_code, str(error.detail), dict(error.headers or {}))


async def _validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _problem(422, _wrong(error.errors()))


async def _busy(_: Request, error: Exception) -> Response:
    return _problem(429, str(error), {"Retry-After": str(RETRY_SECONDS)})


async def _not_there(_: Request, error: Exception) -> Response:
    return _problem(404, str(error))


async def _not_allowed(_: Request, error: Exception) -> Response:
    return _problem(422, str(error))


async def _failed(_: Request, error: Exception) -> Response:
    """The store, a file, the bundle, or a server that ends: what another request meets too, until it is mended."""
    return _problem(503, str(error), {"Retry-After": str(RETRY_SECONDS)})


async def _bug(_: Request, error: Exception) -> Response:
    return _problem(500, f"A mistake of the server's: {type(error).__name__}. Its log has the details.")


_ERRORS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    StarletteHTTPException: _http,
    RequestValidationError: _validation,
    BusyError: _busy,
    NotFoundError: _not_there,
    CheckError: _not_allowed,
    ConfigError: _not_allowed,
    NormweaveError: _failed,
    Exception: _bug,
}
