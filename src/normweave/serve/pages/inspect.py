"""Inspect: images dropped, pasted, chosen, or out of a watched folder, and what was said of each."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice

from nicegui import ui
from nicegui.events import GenericEventArguments

from normweave.serve.pages import verdict
from normweave.serve.pages.frame import frame, heading
from normweave.serve.pages.viewer import Viewer
from normweave.serve.records import Filter, Inspection, Source, Token
from normweave.serve.service import InspectionService
from normweave.serve.watch import Watch

LISTED = 50
"""Inspections in the list."""
LOOK_SECONDS = 2.0
"""Between two looks at what came out of the folder."""
ENDINGS = "image/*,.png,.jpg,.jpeg,.bmp,.tif,.tiff,.webp"


class InspectPage:
    """One browser's view; what it lists is bounded and is gone with it."""

    def __init__(self, service: InspectionService, token: Token, watch: Watch | None) -> None:
        self._service = service
        self._token = token
        self._watch = watch
        self._own: deque[Inspection] = deque(maxlen=LISTED)  # newest first, of this browser
        self._folder: list[Inspection] = []  # newest first
        self._shown: Inspection | None = None

    async def build(self) -> None:
        """Everything on the page."""
        with frame("/", self._service, self._token):
            heading(
                "Inspect", "Show the model an image, and it says whether the part looks like the good ones."
            )
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
                    self._list.on(
                        "click",
                        self._choose,
                        js_handler="(event) => { const row = event.target.closest('[data-id]'); "
                        "if (row) emit(Number(row.dataset.id)); }",
                    )
        self._own.extend(await self._newest("page", actor=self._token.name))
        await self._look()
        if self._shown is None:
            self._show(None)
        if self._watch is not None:
            ui.timer(LOOK_SECONDS, self._look, immediate=False)

    def _drop_zone(self) -> None:
        """The browser sends images one after the other by itself (page.js), and says here what became of each."""
        most = self._service.config.max_image_bytes
        ui.html(
            f'<label class="drop"><input type="file" multiple accept="{ENDINGS}" data-most="{most}">'
            "<span><b>Drop images here</b>, paste them, or touch to choose</span>"
            '<span class="soft progress" aria-live="polite"></span></label>'
        )
        ui.on("inspected", self._inspected)
        ui.on("not_inspected", self._not_inspected)

    def _folder_control(self, watch: Watch) -> None:
        with ui.element("div").classes("folder"):
            ui.html("<h2>Watched folder</h2>")
            ui.label(str(watch.folder)).classes("path")

            def toggle(running: bool) -> None:
                if running and not watch.running:
                    watch.start()
                elif not running and watch.running:
                    watch.stop()

            self._watching = ui.switch("Inspect what is put there", value=watch.running)
            self._watching.on_value_change(lambda change: toggle(bool(change.value)))
            self._problem = ui.label().classes("problem")

    # ── images in ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _inspected(self, event: GenericEventArguments) -> None:
        inspection = await asyncio.to_thread(self._service.store.inspection, int(event.args))
        if inspection is not None:
            self._own.appendleft(inspection)
            self._arrived(inspection)

    def _not_inspected(self, event: GenericEventArguments) -> None:
        ui.notify(str(event.args), type="negative", multi_line=True, close_button="Close")

    # ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _newest(self, source: Source, *, actor: str | None = None) -> list[Inspection]:
        kept = await asyncio.to_thread(self._service.store.inspections, Filter(source=source), limit=LISTED)
        return [inspection for inspection in kept if actor is None or inspection.actor == actor]

    def _listed(self) -> list[Inspection]:
        both = [*self._own, *self._folder]
        return list(islice(sorted(both, key=lambda inspection: -inspection.id), LISTED))

    async def _look(self) -> None:
        """What came out of the folder meanwhile."""
        if self._watch is not None:
            self._watching.set_value(self._watch.running)
            self._problem.set_text(self._watch.problem or "")
            before = self._folder[0].id if self._folder else 0
            self._folder = await self._newest("folder")
            if self._folder and self._folder[0].id == before and self._shown is not None:
                return
        newest = next(iter(self._listed()), None)
        if newest is not None:
            self._arrived(newest)

    def _arrived(self, inspection: Inspection) -> None:
        if self._follow.value or self._shown is None:
            self._show(inspection)
        else:
            self._tell_list()

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
        self._details.set_content("" if inspection is None else verdict.details(inspection))
        self._tell_list()

    def _tell_list(self) -> None:
        shown = self._shown and self._shown.id
        rows = [verdict.row(inspection, shown=inspection.id == shown) for inspection in self._listed()]
        self._list.set_content("".join(rows) or '<li class="soft none">Nothing yet.</li>')
