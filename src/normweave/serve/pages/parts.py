"""Parts: the verdicts on parts of several views, and the views of one part side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import urlencode

from nicegui import ui
from nicegui.events import GenericEventArguments

from normweave.outcome.parts import MAX_IMAGES
from normweave.serve.pages import verdict
from normweave.serve.pages.frame import EMIT_ID, Page, Pager, Serving, plain_button
from normweave.serve.part_store import Marks, PartStore
from normweave.serve.records import Inspection, PartRecord
from normweave.serve.templating import render_macro
from normweave.types import PartReason, PartVerdict

TEMPLATE = "parts.html"
ROWS = 25
"""Rows of one page of the table."""
REFRESH_SECONDS = 5.0
"""Time between two reads of the newest parts."""
WORDS: dict[PartVerdict, str] = {
    "normal": "Good",
    "anomalous": "Defective",
    "unknown": "Unknown product",
    "incomplete": "Incomplete",
}
REASONS = {"anomalous": "defective", "unknown": "unknown product", "unreadable": "not readable", "missing": "missing"}
"""Reasons of `PartReason` for people."""
DECISIONS = {"accept": "accepted as good", "reject": "rejected as defective"}
"""Decisions of reviewers for people."""


class PartsPage(Page):
    """A table of parts, and the views of one of them."""

    path = "/parts"
    title = "Parts"
    purpose = (
        "Parts of several views, with one verdict each. A view that comes late can only make it worse. Decisions of "
        "reviewers change no verdict."
    )
    position = 4.5

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        self._records = PartStore(self._service.store)

    async def content(self) -> None:
        """Build the table and the dialog of one part."""
        self.heading()
        with ui.element("section").classes("sheet"):
            self._table = ui.html()
            self._table.on("click", self._show, js_handler=EMIT_ID)
            self._pager = Pager(ROWS, self._list)
        with (
            ui.dialog().props('aria-label="Part"') as self._dialog,
            ui.element("div").classes("sheet one-sheet"),
        ):
            with ui.element("div").classes("list-head"):
                self._title = ui.html()
                with ui.element("div").classes("pager"):
                    plain_button("Close", self._dialog.close)
            self._views = ui.html()
        await self._list()
        asked = ui.context.client.request.query_params.get("id", "")
        if asked.isdecimal() and await self._fill(int(asked)):
            self._dialog.open()
        ui.timer(REFRESH_SECONDS, self._refresh, immediate=False)

    async def _refresh(self) -> None:
        if self._pager.before is None:
            await self._list()

    async def _list(self) -> None:
        before, limit = self._pager.before, self._pager.limit
        found = await asyncio.to_thread(self._records.records, before=before, limit=limit)
        marks = await asyncio.to_thread(self._records.marks, {one.root for one in found})
        self._table.set_content(table(self._pager.shown(found), marks))

    async def _show(self, event: GenericEventArguments) -> None:
        if await self._fill(int(event.args)):
            self._dialog.open()

    async def _fill(self, id: int) -> bool:
        record = await asyncio.to_thread(self._records.record, id)
        if record is None:
            ui.notify(f"Verdict {id} on a part is not stored, or no longer.", type="warning")
            return False
        found = await asyncio.to_thread(self._records.inspections, record.root, limit=MAX_IMAGES)
        history = await asyncio.to_thread(self._records.of, record.root)
        self._title.set_content(render_macro(TEMPLATE, "link", id=id, address=f"{self.path}?{urlencode({'id': id})}"))
        self._views.set_content(views(history, found))
        return True


def reasons(given: tuple[PartReason, ...]) -> str:
    """Return the reasons as text for people."""
    return ", ".join(f"{one.view or 'a view'}: {REASONS[one.reason]}" for one in given)


def table(records: list[PartRecord], marks: Mapping[int, Marks]) -> str:
    """Return an HTML table of verdicts on parts; `data-id` is the id of the verdict that a click opens.

    Args:
        marks: by the id of the first verdict on the part.
    """
    rows = [(one, WORDS[one.verdict], reasons(one.reasons), marked(one, marks[one.root])) for one in records]
    return render_macro(TEMPLATE, "table", rows=rows)


def marked(record: PartRecord, marks: Marks) -> list[str]:
    """Return what else there is to know of a verdict: corrections, and decisions of reviewers on its images."""
    texts = ["correction by a late view"] if record.corrects else []
    if marks.last_correction > record.id:
        texts.append("corrected later")
    return texts + [f"a view was {DECISIONS[one]}" for one in marks.decisions]


def views(history: list[PartRecord], inspections: list[Inspection]) -> str:
    """Return the verdicts on a part as HTML, oldest first, and its images side by side."""
    verdicts = [(one, WORDS[one.verdict], reasons(one.reasons)) for one in history]
    images = [
        (one, verdict.result_of(one.outcome), DECISIONS.get(one.review.decision if one.review else ""))
        for one in inspections
    ]
    on_time = history[0].images if history else 0
    return render_macro(TEMPLATE, "views", verdicts=verdicts, images=images, on_time=on_time)
