"""Answers to the errors of all routes, to HEAD, to unknown routes and methods, and to unknown query parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi import HTTPException as FastAPIHTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normweave.errors import CheckError, ConfigError, NormweaveError
from normweave.serve import problems
from normweave.serve.database import StoreError
from normweave.serve.files import MissingFileError
from normweave.serve.library import ModelError
from normweave.serve.records import LastTokenError, NotFoundError
from normweave.serve.service import BusyError, StoppedError
from normweave.serve.templating import render

_PROBLEMS: dict[type[Exception], tuple[int, str | None]] = {
    BusyError: (429, "queue_full"),
    NotFoundError: (404, None),
    LastTokenError: (409, "last_engineer"),
    CheckError: (422, None),
    ConfigError: (422, None),
    MissingFileError: (410, "image_gone"),
    StoreError: (503, "store_unavailable"),
    StoppedError: (503, "stopping"),
    NormweaveError: (503, None),  # of a file, the bundle, or a part of the server: other requests fail too
}
"""Status and code of each error; None: the code of the status."""


class HeadMiddleware:
    """ASGI middleware that answers HEAD with the status and the headers of GET, which the routes of FastAPI lack."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body"})  # this also ends a stream

        await self._app({**scope, "method": "GET"}, receive, send_head)


def add_handlers(app: FastAPI, routes: Iterable[BaseRoute]) -> None:
    """Add the answers to errors.

    Args:
        routes: those of which an unknown method is answered with 405; kept in `app.state.routes`.
    """
    app.state.routes = list(routes)
    app.router.redirect_slashes = False  # an address with a slash too many is not found

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code in (404, 405) and not isinstance(error, FastAPIHTTPException | problems.ProblemError):
            return no_route(request, app.state.routes)
        code = error.code if isinstance(error, problems.ProblemError) else None
        return problems.answer(error.status_code, str(error.detail), code=code, headers=dict(error.headers or {}))

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(NormweaveError, _failure)
    app.add_exception_handler(Exception, _internal)


def add_page_handlers(app: FastAPI, pages: FastAPI) -> None:
    """Add the answers to errors of the application of the pages, which gets every request without a route in `app`."""
    page_not_found: Any = pages.exception_handlers[404]

    async def not_found(request: Request, error: Exception) -> Response:
        answer = no_route(request, [*app.state.routes, *app.routes, *pages.routes])
        for_people = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/v1/")
        return await page_not_found(request, error) if answer.status_code == 404 and for_people else answer

    async def failed(request: Request, _: Exception) -> Response:
        return unavailable(request.scope)

    pages.router.redirect_slashes = False
    pages.add_exception_handler(404, not_found)
    pages.add_exception_handler(405, not_found)
    pages.add_exception_handler(NormweaveError, failed)


async def _failure(_: Request, error: Exception) -> Response:
    if isinstance(error, ModelError):
        return problems.answer(error.status, str(error), code=error.code)
    status, code = next(_PROBLEMS[base] for base in type(error).__mro__ if base in _PROBLEMS)
    return problems.answer(status, str(error), code=code)


def unavailable(scope: Scope) -> Response:
    """Return the answer to a request without a valid login while the store fails: a page for people, else a problem.

    It names no database, since anyone may read it.
    """
    detail = "The database of this server does not answer. Try again in a moment."
    accepted = dict(scope["headers"]).get(b"accept", b"")
    if b"text/html" in accepted:
        headers = {"Retry-After": str(problems.RETRY_SECONDS), "Cache-Control": "no-store"}
        return HTMLResponse(render("unavailable.html", detail=detail), status_code=503, headers=headers)
    return problems.answer(503, detail, code="store_unavailable")


def no_route(request: Request, routes: Iterable[BaseRoute]) -> Response:
    """Return 405 with the methods that the path has, or 404 if no route has this path."""
    path, method = request.url.path, request.method
    allowed: set[str] = set()
    for route in routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] != Match.NONE:
            allowed |= route.methods or set()
    if "GET" in allowed:
        allowed.add("HEAD")
    if allowed:
        names = ", ".join(sorted(allowed))
        return problems.answer(
            405, f"{method} is not allowed for {path:.200}. Allowed: {names}.", headers={"Allow": names}
        )
    return problems.answer(404, f"There is no {path:.200}. GET /openapi.json lists all addresses.")


def refuse_unknown_parameters(request: Request) -> None:
    """Refuse a request with a query parameter that its route does not have: a filter that is ignored misleads.

    Raises:
        ProblemError: one is unknown.
    """
    known = _query_names(request.scope["route"].dependant)
    if unknown := sorted(set(request.query_params) - known):
        some = f"Known: {', '.join(sorted(known))}." if known else "This address has none."
        raise problems.ProblemError(
            422, f"Unknown query parameter {unknown[0]!r:.100}. {some}", code="unknown_parameter"
        )


def _query_names(dependant: Any) -> set[str]:
    """Return the query parameters of a route and of everything that it depends on."""
    names = {parameter.alias for parameter in dependant.query_params}
    return names.union(*map(_query_names, dependant.dependencies))


def messages(errors: Any) -> str:
    """Return the first ten validation errors in one line."""
    return "; ".join(
        f"{'.'.join(str(part) for part in error['loc']) or 'body'}: {error['msg']}" for error in list(errors)[:10]
    )


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problems.answer(422, messages(error.errors()))


async def _internal(_: Request, error: Exception) -> Response:
    return problems.answer(500, f"Internal error of the server: {type(error).__name__}. See its log for details.")
