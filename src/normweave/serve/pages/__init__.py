"""The web pages of the server, one module each. They load nothing from other hosts."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from itertools import chain

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from nicegui import app as nicegui
from nicegui import ui

from normweave.serve import handlers, problems, schemas
from normweave.serve.access import Access
from normweave.serve.delivery import Deliveries
from normweave.serve.drift import DriftWatch
from normweave.serve.pages.frame import TEMPLATE, Page, Serving, registered_pages
from normweave.serve.pages.history import csv_lines, filter_of
from normweave.serve.pages.sockets import bind_sockets
from normweave.serve.records import Token
from normweave.serve.service import InspectionService, Upload
from normweave.serve.source import SourceRunner
from normweave.serve.teach import Teaching
from normweave.serve.templating import render_macro
from normweave.serve.watch import Watch

TAB_SECONDS = 3600.0
"""How long NiceGUI keeps the storage of a closed tab; no page uses it."""
BYTE_ORDER_MARK = "\ufeff"
"""Spreadsheets read a CSV file that begins with it as UTF-8."""
SLOW_SECONDS = 30.0
"""How long a page may wait for the store before it fails."""


def every_page() -> list[type[Page]]:
    """Import the modules of this package and return their pages in the order of the navigation."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return registered_pages()


def add_pages(
    app: FastAPI,
    service: InspectionService,
    *,
    access: Access | None,
    watch: Watch | None,
    drift: DriftWatch,
    teaching: Teaching,
    outputs: Deliveries,
    sources: Sequence[SourceRunner] = (),
) -> None:
    """Add the pages to a server after all its other routes; once per process, because NiceGUI has one app.

    Args:
        access: None: requests need no token.
        watch: the watched folder, if any.
        drift: follows changes of the images.
        teaching: trains new products.
        outputs: deliver the results.
        sources: of images, as on the page Live.
    """

    def serving(token: Token) -> Serving:
        return Serving(service, token, watch, access, drift, teaching, outputs, sources)

    for page in every_page():
        _add_page(page, serving, service.store.line)

    @app.post("/upload", include_in_schema=False)
    async def upload(request: Request, name: schemas.Name) -> Response:
        """Inspect an image from the Inspect page, whose login the REST interface does not accept."""
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > service.config.max_image_bytes:
                most = f"{service.config.max_image_bytes:,}"
                return problems.answer(413, f"only images of up to {most} bytes are accepted.")
        image = Upload(name=name, content=bytes(content))
        person = _person(request)
        (inspection,) = await service.inspect([image], source="page", actor=person.name, token=person.id)
        return JSONResponse({"id": inspection.id})

    @app.get("/history.csv", include_in_schema=False)
    def export(request: Request) -> Response:
        try:
            chosen = filter_of(request.query_params)
        except ValueError as error:
            return problems.answer(422, str(error))
        headers = {"Content-Disposition": 'attachment; filename="normweave-history.csv"'}
        text = chain([BYTE_ORDER_MARK], csv_lines(service.store, chosen))
        return StreamingResponse(text, media_type="text/csv", headers=headers)

    handlers.add_page_handlers(app, nicegui)
    bind_sockets()
    nicegui.storage.max_tab_storage_age = TAB_SECONDS
    ui.run_with(
        app,
        title="normweave",
        favicon=render_macro(TEMPLATE, "icon"),
        dark=None,
        language="en-US",
        tailwind=False,
        reconnect_timeout=10.0,
        binding_refresh_interval=None,
        message_history_length=100,
        show_welcome_message=False,
    )


def _add_page(page: type[Page], serving: Callable[[Token], Serving], line: str) -> None:
    title = " · ".join(filter(None, (page.title, line, "normweave")))

    @ui.page(page.path, title=title, response_timeout=SLOW_SECONDS)
    async def build(request: Request) -> None:
        await page(serving(_person(request))).build()


def _person(request: Request) -> Token:
    token: Token = request.state.token  # set by the authentication
    return token
