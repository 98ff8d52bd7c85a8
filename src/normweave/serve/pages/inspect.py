"""Inspect: the live view of the line, with the inspections of all sources, and the field for own images."""

from __future__ import annotations

import asyncio

from nicegui import ui
from nicegui.events import GenericEventArguments

from normweave.serve.pages import verdict
from normweave.serve.pages.frame import EMIT_ID, Page, Serving, notify_error, plain_button
from normweave.serve.pages.viewer import Viewer
from normweave.serve.records import Filter, Inspection
from normweave.serve.templating import render_macro
from normweave.serve.watch import Watch

TEMPLATE = "inspect.html"
LISTED = 50
"""Number of inspections in the list."""
REFRESH_SECONDS = 1.0
"""Interval between two reads of the newest inspections."""
ENDINGS = "image/*,.png,.jpg,.jpeg,.bmp,.tif,.tiff,.webp"
NOT_GOOD = (Filter(verdicts=("anomalous", "unknown")), Filter(unreadable=True))


class InspectPage(Page):
    """The newest inspection in large letters.

    An image that is not good stays until a person continues, so that a good one after it does not hide it.
    """

    path = "/"
    title = "Inspect"
    purpose = "The newest inspections of all sources. Drop an image to inspect it as well."
    position = 1

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        self._listed: list[Inspection] = []  # newest first
        self._held: list[Inspection] = []  # not good and not confirmed, newest first
        self._shown: Inspection | None = None
        self._refreshing = asyncio.Lock()

    async def content(self) -> None:
        """Build the shown inspection, the list and the drop zone."""
        self.heading()
        with ui.element("div").classes("bench"):
            with ui.element("div").classes("bench-main live"):
                with ui.element("div").classes("held").props('role="status"') as self._holding:
                    self._hold_text = ui.label()
                    plain_button("Continue", self._continue)
                self._banner = ui.html().props('aria-live="polite"')
                self._nothing = ui.html(render_macro(TEMPLATE, "nothing")).classes("sheet none")
                with ui.element("div").classes("seen") as self._seen:
                    with ui.element("section").classes("sheet"):
                        self._viewer = Viewer()
                    self._details = ui.html().classes("sheet")
            with ui.element("aside").classes("sheet bench-list").props('aria-label="Inspections"'):
                self._drop_zone()
                if self._watch is not None:
                    self._folder_control(self._watch)
                with ui.element("div").classes("list-head"):
                    ui.html("<h2>Newest</h2>")
                    self._follow = ui.switch("Show the newest", value=True)
                    ui.html(render_macro(TEMPLATE, "sound"))
                self._list = ui.html(tag="ul").classes("inspected")
                self._list.on("click", self._choose, js_handler=EMIT_ID)
        self._show(None)
        self._listed = await asyncio.to_thread(self._service.store.inspections, Filter(), limit=LISTED)
        self._show_newest()
        await self._refresh()
        ui.timer(REFRESH_SECONDS, self._refresh, immediate=False)

    def _drop_zone(self) -> None:
        """Add the drop zone. The browser uploads the images itself (page.js) and reports each as an event."""
        most = self._service.config.max_image_bytes
        ui.html(render_macro(TEMPLATE, "drop_zone", endings=ENDINGS, most=most))
        ui.on("inspected", self._refresh)
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
            self._folder_state = ui.html().props('aria-live="polite"')

    def _show_folder(self, watch: Watch) -> None:
        self._watching.set_value(watch.running)
        self._folder_state.set_content(render_macro(TEMPLATE, "folder_state", watch=watch.state))

    async def _refresh(self) -> None:
        """Read the newest inspections of all sources."""
        async with self._refreshing:
            if self._watch is not None:
                self._show_folder(self._watch)
            store, before = self._service.store, self._listed[0].id if self._listed else 0
            newest = await asyncio.to_thread(store.inspections, Filter(), limit=1)
            if not newest or newest[0].id == before:
                return
            self._listed = await asyncio.to_thread(store.inspections, Filter(), limit=LISTED)
            # Read by themselves: of many new images, one that is not good may be no longer in the list.
            found = [await asyncio.to_thread(store.inspections, one, limit=LISTED) for one in NOT_GOOD]
            new = sorted((one for page in found for one in page if one.id > before), key=lambda one: -one.id)
            self._held = [*new, *self._held][:LISTED]
            if new:
                ui.run_javascript("window.normweave.alarm()")
            self._show_newest()

    def _show_newest(self) -> None:
        if self._listed and (self._follow.value or self._shown is None):
            self._show(self._held[0] if self._held else self._listed[0])
        else:
            self._fill_list()

    async def _continue(self) -> None:
        self._held = []
        self._follow.set_value(True)
        self._show_newest()

    async def _choose(self, event: GenericEventArguments) -> None:
        chosen = await asyncio.to_thread(self._service.store.inspection, int(event.args))
        if chosen is not None:
            self._follow.set_value(False)
            self._show(chosen)

    def _show(self, inspection: Inspection | None) -> None:
        self._shown = inspection
        self._viewer.show(inspection)
        self._seen.set_visibility(inspection is not None)
        self._nothing.set_visibility(inspection is None)
        self._banner.set_content("" if inspection is None else verdict.banner(inspection))
        self._details.set_content(
            "" if inspection is None else verdict.details(inspection, self._service.references(inspection))
        )
        self._fill_list()

    def _fill_list(self) -> None:
        shown = self._shown and self._shown.id
        rows = [verdict.row(inspection, shown=inspection.id == shown) for inspection in self._listed]
        self._list.set_content("".join(rows) or '<li class="soft none">Nothing yet.</li>')
        self._holding.set_visibility(bool(self._held))
        if self._held:
            number = f"{len(self._held)}{' or more' if len(self._held) == LISTED else ''}"
            since = f"{self._held[-1].received_at.astimezone():%H:%M:%S}"
            newest = verdict.result_of(self._listed[0].outcome).word
            self._hold_text.set_text(f"{number} not good since {since}. The newest image: {newest}.")
