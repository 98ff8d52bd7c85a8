"""The page for the line: Inspect, Review, Model, History. Everything it loads comes from this server."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from nicegui import app as nicegui
from nicegui import ui

from normweave.serve.pages.history import HistoryPage, csv_lines, filter_of
from normweave.serve.pages.inspect import InspectPage
from normweave.serve.pages.model import ModelPage
from normweave.serve.pages.review import ReviewPage
from normweave.serve.records import Token
from normweave.serve.service import InspectionService, Upload
from normweave.serve.watch import Watch

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#1f6fd6"/>'
    '<path d="M7 11h18M7 21h18M11 7v18M21 7v18" stroke="#fff" stroke-width="2.6" stroke-linecap="round"/>'
    '<circle cx="21" cy="11" r="4.4" fill="#ffa454"/></svg>'
)

TAB_SECONDS = 3600.0
"""NiceGUI keeps an empty drawer for every tab that was ever open; no page uses it."""
SLOW_SECONDS = 30.0
"""A page is given up when the store takes longer to answer."""


def add_pages(app: FastAPI, service: InspectionService, *, watch: Watch | None) -> None:
    """Put the pages on a server, behind all its other routes; once in a process, as NiceGUI has one app.

    Args:
        watch: the folder that is watched; None: the server was started without one.
    """

    @ui.page("/", title="Inspect · normweave", response_timeout=SLOW_SECONDS)
    async def inspect(request: Request) -> None:
        await InspectPage(service, _person(request), watch).build()

    @ui.page("/review", title="Review · normweave", response_timeout=SLOW_SECONDS)
    async def review(request: Request) -> None:
        await ReviewPage(service, _person(request)).build()

    @ui.page("/model", title="Model · normweave", response_timeout=SLOW_SECONDS)
    async def model(request: Request) -> None:
        await ModelPage(service, _person(request)).build()

    @ui.page("/history", title="History · normweave", response_timeout=SLOW_SECONDS)
    async def history(request: Request) -> None:
        await HistoryPage(service, _person(request)).build()

    @app.post("/upload", include_in_schema=False)
    async def upload(request: Request, name: str) -> Response:
        """An image from the Inspect page; REST takes no logins."""
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > service.config.max_image_bytes:
                most = f"{service.config.max_image_bytes:,}"
                return JSONResponse(
                    {"error": f"only images of up to {most} bytes are taken."}, status_code=413
                )
        image = Upload(name=name, content=bytes(content))
        (inspection,) = await service.inspect([image], source="page", actor=_person(request).name)
        return JSONResponse({"id": inspection.id})

    @app.get("/history.csv", include_in_schema=False)
    def export(request: Request) -> Response:
        try:
            chosen = filter_of(request.query_params)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=422)
        headers = {"Content-Disposition": 'attachment; filename="normweave-history.csv"'}
        return StreamingResponse(csv_lines(service.store, chosen), media_type="text/csv", headers=headers)

    nicegui.storage.max_tab_storage_age = TAB_SECONDS
    ui.run_with(
        app,
        title="normweave",
        favicon=ICON,
        dark=None,
        language="en-US",
        tailwind=False,
        reconnect_timeout=10.0,
        binding_refresh_interval=None,
        message_history_length=100,
        show_welcome_message=False,
    )


def _person(request: Request) -> Token:
    person: Token = request.state.token  # the gate has let it in
    return person
