"""The parts of the OpenAPI document that FastAPI does not derive: problems, uploads, images and tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import FastAPI
from fastapi.security import HTTPBearer

from normweave.serve import problems, records, schemas

IMAGES = "images"
"""Form field of the images."""
PART_FIELDS = ("part", "view")
"""Form fields of the part that an image shows, and of the view; each once for all images or once for each."""
JSON = "application/json"
FORM = "multipart/form-data"
BYTES = "application/octet-stream"
BODY = (400, 408, 413, 429)
"""Statuses of the problems of a request with a body."""
TOKEN = HTTPBearer(auto_error=False, description="A token of this server: Authorization: Bearer nw_…")
_REF = "#/components/schemas/{model}"
_BINARY = {"type": "string", "format": "binary", "contentMediaType": BYTES}  # format: for generators of clients
_TEXT = {"type": "string", "maxLength": records.NAME_LENGTH}
_REASONS = {
    400: "The request cannot be understood.",
    401: "No token, or one that is unknown, expired or revoked.",
    403: "The role of the token does not allow this, or a login was used where a token is needed.",
    404: "Not found.",
    408: "The request did not arrive in time.",
    409: "The state of the server does not allow this; see `code` and `detail`.",
    410: "The image was removed.",
    413: "Too many bytes or images.",
    415: "The content type is not supported.",
    422: "A value is out of range, or a query parameter is unknown.",
    429: "Too many images are waiting. Send the request again after Retry-After seconds.",
    503: "The server cannot answer at the moment. Send the request again after Retry-After seconds.",
}


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI descriptions of these error answers."""
    schema = {"$ref": _REF.format(model=schemas.Problem.__name__)}
    content = {problems.MEDIA_TYPE: {"schema": schema}}
    return {status: {"description": _REASONS[status], "content": content} for status in statuses}


def image_response(*types: str) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of an answer that is a file of one of these types."""
    return {200: {"content": {name: {"schema": _BINARY} for name in types}, "description": "The image."}}


INSPECT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            FORM: {
                "schema": {
                    "title": "InspectForm",
                    "type": "object",
                    "required": [IMAGES],
                    "additionalProperties": False,
                    "properties": {
                        IMAGES: {"type": "array", "minItems": 1, "items": _BINARY},
                        **{name: {"type": "array", "items": _TEXT} for name in PART_FIELDS},
                    },
                }
            },
            JSON: {"schema": {"$ref": _REF.format(model=schemas.InspectIn.__name__)}},
            BYTES: {"schema": _BINARY},
        },
    }
}


def complete_document(app: FastAPI) -> None:
    """Add the schemas to which the parts above refer, so that every reference of the document can be resolved."""
    derive = app.openapi

    @cache
    def openapi() -> dict[str, Any]:
        document = derive()
        for model in (schemas.Problem, schemas.InspectIn):
            schema = model.model_json_schema(ref_template=_REF)
            inner = schema.pop("$defs", {})
            document["components"]["schemas"] |= inner | {model.__name__: schema}
        return document

    app.openapi = openapi  # type: ignore[method-assign]
