"""Inspect: images that are dropped, pasted, chosen, or put into a watched folder, and their results."""

from __future__ import annotations

import asyncio
from collections import deque

from nicegui import ui
from nicegui.events import GenericEventArguments

from normweave.serve.pages import verdict
from normweave.serve.pages.frame import EMIT_ID, Page, notify_error
from normweave.serve.pages.viewer import Viewer
from normweave.serve.records import Filter, Inspection, Source, Token
from normweave.serve.service import InspectionService
from normweave.serve.templating import render_macro
from normweave.serve.watch import Watch

LISTED = 50
"""Number of inspections in the list."""
REFRESH_SECONDS = 2.0
"""Interval between two reads of the results of the watched folder."""
ENDINGS = "image/*,.png,.jpg,.jpeg,.bmp,.tif,.tiff,.webp"


class InspectPage(Page):
    """Uploads of this browser and images from the watched folder, newest first."""

    path = "/"
    title = "Inspect"
    purpose = "Drop an image to check whether the part looks like the good ones."
    position = 1

    def __init__(self, service: InspectionService, token: Token, watch: Watch | None) -> None:
        super().__init__(service, token, watch)
        self._own: deque[Inspection] = deque(maxlen=LISTED)  # newest first, of this browser
        self._folder: list[Inspection] = []  # newest first
        self._shown: Inspection | None = None

    async def content(self) -> None:
        """Build the drop zone, the shown inspection and the list."""
        self.heading()
        with ui.element("div").classes("bench"):
            with ui.element("div").classes("bench-main"):
                self._drop_zone()
                self._banner = ui.html().props('aria-live="polite"')
                with ui.element("div").classes("seen"):
                    with ui.element("section").classes("sheet"):
                        self._viewer = Viewer()
                    self._details = ui.html().classes("sheet")
            with ui.element("aside").classes("sheet bench-list"):
                if self._watch is not None:
                    self._folder_control(self._watch)
                with ui.element("div").classes("list-head"):
                    ui.html("<h2>Inspected</h2>")
                    self._follow = ui.switch("Show the newest", value=True)
                self._list = ui.html(tag="ul").classes("inspected")
                self._list.on("click", self._choose, js_handler=EMIT_ID)
        self._own.extend(await self._newest("page", actor=self._token.name))
        await self._refresh()
        if self._shown is None:
            self._show(None)
        if self._watch is not None:
            ui.timer(REFRESH_SECONDS, self._refresh, immediate=False)

    def _drop_zone(self) -> None:
        """Add the drop zone. The browser uploads the images itself (page.js) and reports each as an event."""
        most = self._service.config.max_image_bytes
        ui.html(render_macro("inspect.html", "drop_zone", endings=ENDINGS, most=most))
        ui.on("inspected", self._inspected)
        ui.on("not_inspected", lambda event: notify_error(event.args))

    def _folder_control(self, watch: Watch) -> None:
        with ui.element("div").classes("folder"):
            ui.html("<h2>Watched folder</h2>")
            ui.label(str(watch.folder)).classes("path")

            def toggle(running: bool) -> None:
                if running and not watch.running:
                    watch.start()
                elif not running and watch.running:
                    watch.stop()

            self._watching = ui.switch("Inspect new images", value=watch.running)
            self._watching.on_value_change(lambda change: toggle(bool(change.value)))
            self._problem = ui.label().classes("problem")

    async def _inspected(self, event: GenericEventArguments) -> None:
        inspection = await asyncio.to_thread(self._service.store.inspection, int(event.args))
        if inspection is not None:
            self._own.appendleft(inspection)
            self._add(inspection)

    async def _newest(self, source: Source, *, actor: str | None = None) -> list[Inspection]:
        stored = await asyncio.to_thread(self._service.store.inspections, Filter(source=source), limit=LISTED)
        return [inspection for inspection in stored if actor is None or inspection.actor == actor]

    def _listed(self) -> list[Inspection]:
        return sorted([*self._own, *self._folder], key=lambda inspection: -inspection.id)[:LISTED]

    async def _refresh(self) -> None:
        """Read the newest results of the watched folder."""
        if self._watch is not None:
            self._watching.set_value(self._watch.running)
            self._problem.set_text(self._watch.state.last_error or "")
            before = self._folder[0].id if self._folder else 0
            self._folder = await self._newest("folder")
            if self._folder and self._folder[0].id == before and self._shown is not None:
                return
        if listed := self._listed():
            self._add(listed[0])

    def _add(self, inspection: Inspection) -> None:
        if self._follow.value or self._shown is None:
            self._show(inspection)
        else:
            self._fill_list()

    async def _choose(self, event: GenericEventArguments) -> None:
        chosen = await asyncio.to_thread(self._service.store.inspection, int(event.args))
        if chosen is not None:
            self._follow.set_value(False)
            self._show(chosen)

    def _show(self, inspection: Inspection | None) -> None:
        self._shown = inspection
        self._viewer.show(inspection)
        self._viewer.set_visibility(inspection is not None)
        self._banner.set_content("" if inspection is None else verdict.banner(inspection))
        self._details.set_content(
            "" if inspection is None else verdict.details(inspection, self._service.references(inspection))
        )
        self._fill_list()

    def _fill_list(self) -> None:
        shown = self._shown and self._shown.id
        rows = [verdict.row(inspection, shown=inspection.id == shown) for inspection in self._listed()]
        self._list.set_content("".join(rows) or '<li class="soft none">Nothing yet.</li>')
