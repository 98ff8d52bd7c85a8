"""Answers to requests that fail: problem details in JSON (RFC 9457), with a code that stays the same."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 1
"""Value of Retry-After in answers with 429 and 503."""
CODES = {
    400: "malformed_request",
    401: "not_authenticated",
    403: "not_allowed",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    410: "gone",
    413: "too_large",
    415: "unsupported_content_type",
    422: "invalid_value",
    429: "too_many_requests",
    431: "headers_too_large",
    500: "internal_error",
    503: "unavailable",
}
"""Code of each status; a `ProblemError` may have a narrower one."""


class ProblemError(HTTPException):
    """A request that fails, with a code of its own."""

    def __init__(self, status: int, detail: str, *, code: str) -> None:
        super().__init__(status, detail)
        self.code = code


def content(status: int, detail: str, *, code: str | None = None) -> dict[str, Any]:
    """Return the fields of a problem; clients choose by `code`, people read `detail`."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code or CODES.get(status, "error"),
    }


def answer(status: int, detail: str, *, code: str | None = None, headers: dict[str, str] | None = None) -> Response:
    """Return the response for a problem, with Retry-After if the request may succeed later."""
    retry = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
    body = json.dumps(content(status, detail, code=code), ensure_ascii=False)
    return Response(body, status_code=status, media_type=MEDIA_TYPE, headers=retry | (headers or {}))
