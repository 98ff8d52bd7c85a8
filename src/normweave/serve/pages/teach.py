"""Teach: train a new product from good images, look at held-out ones, and keep the new bundle or throw it away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from nicegui import ui
from nicegui.events import GenericEventArguments

from normweave.errors import NormweaveError
from normweave.serve.model_store import Actor
from normweave.serve.pages import verdict
from normweave.serve.pages.frame import EMIT_ID, Page, Serving, entered, notify_error, plain_button
from normweave.serve.pages.inspect import ENDINGS
from normweave.serve.pages.inspect import TEMPLATE as DROP_TEMPLATE
from normweave.serve.records import Filter, Inspection
from normweave.serve.teach import FEWEST, MOST, TeachJob
from normweave.serve.teach_routes import stored_uploads
from normweave.serve.templating import render_macro

TEMPLATE = "teach.html"
LISTED = 60
"""Number of images to choose from."""
REFRESH_SECONDS = 1.0
NAMED = 5
"""Number of files that a message names."""
NAME = 60
"""Length of a name in characters."""
SOURCES: dict[str, tuple[str, Filter]] = {
    "unknown": ("unknown products", Filter(verdicts=("unknown",))),
    "accepted": ("accepted by a reviewer", Filter(decision="accept")),
    "page": ("dropped on a page", Filter(source="page", unreadable=False)),
    "folder": ("from the watched folder", Filter(source="folder", unreadable=False)),
    "all": ("all", Filter(unreadable=False)),
}
"""What the images are chosen from."""


class TeachPage(Page):
    """The images of a new product, its training, and its result."""

    path = "/teach"
    title = "Teach"
    purpose = "A new product from a few good images. What the model knows stays as it is, and inspection goes on."
    position = 9
    engineers_only = True

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        self._chosen: dict[int, Inspection] = {}
        self._listed: list[Inspection] = []
        self._shown: TeachJob | None = None
        self._refused: list[str] = []  # names of dropped files that are not images
        self._refusal: ui.notification | None = None
        self._asked: int | None = None  # id of the job, until it is confirmed that it is thrown away

    async def content(self) -> None:
        """Build the job, and the form of a new one."""
        self.heading()
        if (reason := self._teaching.missing()) is not None:
            ui.html(render_macro(TEMPLATE, "missing", reason=reason)).classes("sheet")
            return
        self._result = ui.element("section").classes("sheet").props('aria-live="polite"')
        with self._result:
            self._job = ui.html()
            with ui.element("div").classes("pager"):
                self._keep = ui.button("Keep", color=None, on_click=self._pressed(self._kept))
                self._keep.props("unelevated no-caps").classes("main-button")
                self._discard = plain_button("Throw away", self._ask)
        self._form = ui.element("section").classes("sheet")
        with self._form:
            ui.html("<h2>New product</h2>")
            ui.html(
                render_macro(DROP_TEMPLATE, "drop_zone", endings=ENDINGS, most=self._service.config.max_image_bytes)
            )
            ui.on("inspected", self._dropped)
            ui.on("not_inspected", lambda event: notify_error(event.args))
            with ui.element("div").classes("choices"):
                options = {name: label for name, (label, _) in SOURCES.items()}
                self._source = ui.select(options, value="unknown", label="Images", on_change=self._list)
                self._source.props("outlined dense options-dense").classes("choice")
                plain_button("Choose all", self._choose_all)
                plain_button("Choose none", self._choose_none)
            self._images = ui.html().classes("taught")
            self._images.on("click", self._toggle, js_handler=EMIT_ID)
            with ui.element("div").classes("choices"):
                categories = list(self._service.detector.record["categories"])
                self._category = ui.input("Category", value=categories[0] if categories else "")
                self._subclass = ui.input("Subclass")
                for field in (self._category, self._subclass):
                    field.on_value_change(self._show_count)
                    field.props(f"outlined dense maxlength={NAME}").classes("choice")
                self._start = ui.button("Teach", color=None, on_click=self._pressed(self._started))
                self._start.props("unelevated no-caps").classes("main-button")
            self._count = ui.label().classes("soft").props('aria-live="polite"')
        with (
            ui.dialog().props('aria-label="Confirm"') as self._dialog,
            ui.element("div").classes("sheet revoke"),
        ):
            self._question = ui.html()
            with ui.element("div").classes("pager"):
                self._confirm = ui.button("", color=None, on_click=self._pressed(self._discarded))
                self._confirm.props("unelevated no-caps").classes("main-button")
                plain_button("Cancel", self._dialog.close)
        await self._list()
        self._refresh(force=True)
        ui.timer(REFRESH_SECONDS, self._refresh, immediate=False)

    # ── choose ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _list(self) -> None:
        chosen = SOURCES[str(self._source.value)][1]
        found = await asyncio.to_thread(self._service.store.inspections, chosen, limit=LISTED)
        self._listed = [one for one in found if one.image is not None]
        self._draw()

    async def _dropped(self, event: GenericEventArguments) -> None:
        """Choose an image that was dropped on this page."""
        one = await asyncio.to_thread(self._service.store.inspection, int(event.args))
        if one is not None and one.outcome.error is not None:
            self._refuse(one.name or str(one.id))
            return
        if one is not None and one.image is not None:
            self._chosen[one.id] = one
        if self._source.value == "page":
            await self._list()
        else:
            self._source.set_value("page")  # lists them

    def _refuse(self, name: str) -> None:
        """Tell that a file is not an image; those until the person closes the message are in one."""
        if self._refusal is None or self._refusal.is_deleted:
            self._refused = []
            self._refusal = ui.notification(type="negative", multi_line=True, timeout=None, close_button="Close")
        self._refused.append(name)
        self._refusal.message = not_images(self._refused)

    def _choose_all(self) -> None:
        self._chosen |= {one.id: one for one in self._listed}
        self._draw()

    def _choose_none(self) -> None:
        self._chosen.clear()
        self._draw()

    def _toggle(self, event: GenericEventArguments) -> None:
        id = int(event.args)
        one = next((one for one in self._listed if one.id == id), None)
        if self._chosen.pop(id, None) is None and one is not None:
            self._chosen[id] = one
        self._draw()

    def _draw(self) -> None:
        rows = [(one, verdict.result_of(one.outcome), one.id in self._chosen) for one in self._listed]
        self._images.set_content(render_macro(TEMPLATE, "images", rows=rows))
        self._show_count()

    def _show_count(self) -> None:
        count = len(self._chosen)
        fields = {"category": self._category, "subclass": self._subclass}
        empty = [name for name, field in fields.items() if not entered(field, NAME)]
        needed = f" Enter the {' and the '.join(empty)}." if empty else ""
        self._count.set_text(f"{count} chosen; {FEWEST} to {MOST} different good images are needed.{needed}")
        self._start.set_enabled(FEWEST <= count <= MOST and not empty)

    # ── the job ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _refresh(self, *, force: bool = False) -> None:
        job = self._teaching.job
        if job is self._shown and not force and (job is None or job.state != "training"):
            return
        self._shown = job
        self._result.set_visibility(job is not None)
        self._form.set_visibility(job is None or job.state not in ("training", "done"))
        if job is not None:
            library = self._service.models is not None
            self._job.set_content(render_macro(TEMPLATE, "job", job=job, library=library, results=verdict.Result))
            self._keep.set_visibility(job.state == "done" and library)
            self._discard.set_visibility(job.state != "kept")
            self._discard.set_text(ending(job))

    def _pressed(self, action: Callable[[Actor], Awaitable[object]]) -> Callable[[], Awaitable[None]]:
        """Return the handler of a button; a browser can send the event although the page is not open to the person."""

        async def pressed() -> None:
            if not self.is_open_to(self._token):
                return
            try:
                await action(Actor(self._token.name, self._token.id))
            except NormweaveError as error:
                notify_error(error)
            self._refresh(force=True)

        return pressed

    async def _started(self, actor: Actor) -> None:
        ids = list(self._chosen)  # more can be dropped meanwhile
        images = await stored_uploads(self._service, ids)
        names = {"category": entered(self._category, NAME), "subclass": entered(self._subclass, NAME)}
        await asyncio.to_thread(self._teaching.start, images, **names, actor=actor)
        for id in ids:
            self._chosen.pop(id, None)
        self._draw()

    async def _kept(self, actor: Actor) -> None:
        if self._shown is not None:
            await asyncio.to_thread(self._teaching.keep, self._shown.id, actor)

    def _ask(self) -> None:
        if self._shown is not None:
            self._asked = self._shown.id
            self._question.set_content(render_macro(TEMPLATE, "question", job=self._shown))
            self._confirm.set_text(ending(self._shown))
            self._dialog.open()

    async def _discarded(self, actor: Actor) -> None:
        self._dialog.close()
        asked, self._asked = self._asked, None
        if asked is not None:
            await asyncio.to_thread(self._teaching.discard, asked, actor)


def ending(job: TeachJob) -> str:
    """Return the word of the button that ends a job."""
    return "Stop" if job.state == "training" else "Throw away"


def not_images(names: Sequence[str]) -> str:
    """Return the sentence that files are not images; the names of at most `NAMED` of them."""
    if len(names) == 1:
        return f"{names[0]} is not an image."
    listed, more = list(names[:NAMED]), len(names) - NAMED
    last = f"{more} more" if more > 0 else listed.pop()
    return f"{', '.join(listed)} and {last} are not images."
