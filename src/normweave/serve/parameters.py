"""Parameters that several routes of the REST interface have."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Path, Query, Request, Security

from normweave.serve.handlers import refuse_unknown_parameters
from normweave.serve.openapi import TOKEN
from normweave.serve.problems import ProblemError
from normweave.serve.records import Inspection, StoredImage, Token

PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
DRAWN_SIDE = 2048
"""Default of the longest side of a map or overlay: drawing 49 million pixels takes longer than scoring them."""
CACHED = {"Cache-Control": "private, max-age=3600"}


def token(request: Request) -> Token:
    """Return the token of a request."""
    found: Token = request.state.token  # set by AuthenticationMiddleware
    return found


def engineer(request: Request) -> Token:
    """Return the token of a request.

    Raises:
        HTTPException: it is not the token of an engineer.
    """
    found = token(request)
    if found.role != "engineer":
        raise HTTPException(
            403, f"This route needs the role engineer, but the token {found.name!r} has the role {found.role}."
        )
    return found


AnyToken = Annotated[Token, Depends(token)]
Engineer = Annotated[Token, Depends(engineer)]
Id = Annotated[int, Path(ge=1, le=2**53)]
DEPENDENCIES: list[Any] = [Security(TOKEN), Depends(refuse_unknown_parameters)]
DrawnSide = Annotated[
    int, Query(ge=16, le=20_000, description="Maximum width and height in pixels of a PNG; drawn at this size.")
]
MaxSide = Annotated[
    int | None,
    Query(ge=16, le=20_000, description="Maximum width and height in pixels; larger images are shrunk."),
]


def utc(time: datetime | None) -> datetime | None:
    """Return the time with the zone UTC if it has none."""
    return time if time is None or time.tzinfo is not None else time.replace(tzinfo=UTC)


def stored_image(inspection: Inspection) -> StoredImage:
    """Return the image of an inspection.

    Raises:
        ProblemError: it could not be read, or was removed.
    """
    if inspection.image is None:
        what = f"The image of inspection {inspection.id}"
        if inspection.outcome.error is not None:
            raise ProblemError(404, f"{what} could not be read.", code="image_unreadable")
        raise ProblemError(410, f"{what} was removed by retention.", code="image_gone")
    return inspection.image
