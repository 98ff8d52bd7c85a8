"""Review: defective, unknown, unreadable and borderline parts, one after the other, for a person to decide."""

from __future__ import annotations

import asyncio
from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Literal

from nicegui import ui
from nicegui.events import GenericEventArguments

from normweave.errors import NormweaveError
from normweave.serve.pages import verdict
from normweave.serve.pages.frame import COMMENT, DEFECT, EMIT_SHOWN, Page, Serving, defect_input, entered, notify_error
from normweave.serve.pages.viewer import Viewer
from normweave.serve.rates import BORDERLINE
from normweave.serve.records import Filter, Inspection
from normweave.serve.templating import render_macro

REMEMBERED = 100
"""Number of decisions that can be undone, the last one first."""
REMEMBERED_TIME = timedelta(hours=12)
"""Age up to which decisions can be undone after the page was loaded again."""
REFRESH_SECONDS = 5.0
"""Interval between two counts of the queue."""
Action = Literal["accept", "reject", "next", "undo"]
ACTIONS: tuple[tuple[Action, str, str, str], ...] = (
    ("accept", "A", "Accept", "the part is good"),
    ("reject", "R", "Reject", "it is defective"),
    ("next", "N", "Next", "decide later"),
    ("undo", "U", "Undo", "my last decision"),
)
"""(action, key, word, effect) of each button."""


QUEUE = (
    Filter(verdicts=("anomalous", "unknown"), reviewed=False),
    Filter(unreadable=True, reviewed=False),
    Filter(verdicts=("normal",), reviewed=False, p_value_within=BORDERLINE),
)
"""The parts that need a decision: defective, unknown, unreadable, and close to the limit of their inspection."""


class ReviewPage(Page):
    """The queue, newest first. Several people may review at once: the last decision on a part counts."""

    path = "/review"
    title = "Review"
    purpose = "Decide for each part whether it is good. Your decision is stored beside the verdict of the model."
    position = 2

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        self._shown: Inspection | None = None
        self._before: int | None = None  # inspections from this id on were shown in this round
        self._done: deque[int] = deque(maxlen=REMEMBERED)
        self._deciding = asyncio.Lock()

    async def content(self) -> None:
        """Build the shown inspection and the buttons."""
        with ui.element("div").classes("heading-row"):
            self.heading()
            self._left = ui.label().classes("left").props('aria-live="polite"')
        with ui.element("div").classes("bench"):
            with ui.element("div").classes("bench-main"):
                self._banner = ui.html()
                with ui.element("section").classes("sheet"):
                    self._viewer = Viewer()
                    self._nothing = ui.html(
                        "<b>Nothing is left to review.</b><br>New parts appear here automatically."
                    ).classes("none")
            with ui.element("aside").classes("bench-list turns"):
                with ui.element("div").classes("sheet decide"):
                    self._comment = ui.input("Comment (optional)")
                    self._comment.props(f"outlined dense maxlength={COMMENT}").classes("comment")
                    self._defect = await defect_input(self._service.store)
                    self._buttons = {action[0]: self._button(*action) for action in ACTIONS}
                self._details = ui.html().classes("sheet")
        since = datetime.now(UTC) - REMEMBERED_TIME
        done = await asyncio.to_thread(self._service.store.decided, self._token.name, since=since, limit=REMEMBERED)
        self._done.extend(reversed(done))
        await self._advance()
        ui.timer(REFRESH_SECONDS, self._refresh, immediate=False)

    def _button(self, action: Action, key: str, word: str, effect: str) -> ui.element:
        """Add a button. A decision names the inspection whose picture is shown; the server may have a newer one."""
        button = ui.element("button").classes(f"decision {action}")
        button.props(f'type=button data-decision={action} aria-keyshortcuts="{key}"')

        async def pressed(event: GenericEventArguments) -> None:
            await self._pressed(action, int(event.args))

        button.on("click", pressed, js_handler=EMIT_SHOWN)
        with button:
            ui.html(render_macro("review.html", "button", word=word, effect=effect, key=key), tag="span")
        return button

    async def _pressed(self, action: Action, seen: int) -> None:
        async with self._deciding:
            try:
                if action == "undo":
                    await self._undo()
                elif self._shown is not None:
                    if action != "next":
                        if seen != self._shown.id:
                            return  # its picture is not shown yet: a second tap, meant for the inspection before
                        await self._service.review(
                            self._shown.id,
                            decision=action,
                            reviewer=self._token.name,
                            token=self._token.id,
                            comment=entered(self._comment, COMMENT),
                            defect=entered(self._defect, DEFECT) if action == "reject" else "",
                        )
                        self._done.append(self._shown.id)
                    self._before = self._shown.id
                    await self._advance()
            except NormweaveError as error:
                notify_error(error)

    async def _undo(self) -> None:
        if not self._done:
            return
        id = self._done.pop()
        inspection = await self._service.review(id, decision="undo", reviewer=self._token.name, token=self._token.id)
        self._before = id + 1
        self._show(inspection)
        await self._count()
        ui.notify("Your decision was undone.", timeout=2000)

    async def _advance(self) -> None:
        """Show the next inspection; after the oldest, start again at the newest."""
        found = await self._first()
        if found is None and self._before is not None:
            self._before = None
            found = await self._first()
        self._show(found)
        await self._count()

    async def _first(self) -> Inspection | None:
        """Return the newest inspection of the queue that was not shown in this round."""
        store = self._service.store
        found = [await asyncio.to_thread(store.inspections, part, before=self._before, limit=1) for part in QUEUE]
        return max((page[0] for page in found if page), key=lambda inspection: inspection.id, default=None)

    async def _count(self) -> None:
        store = self._service.store
        counts = [await asyncio.to_thread(store.count, part) for part in QUEUE]
        self._left.set_text(f"{sum(counts)} left")

    async def _refresh(self) -> None:
        """Count the queue again. The shown inspection does not change."""
        async with self._deciding:
            if self._shown is None:
                await self._advance()
            else:
                await self._count()

    def _show(self, inspection: Inspection | None) -> None:
        self._shown = inspection
        available = inspection is not None
        self._viewer.show(inspection)
        self._viewer.set_visibility(available)
        self._nothing.set_visibility(not available)
        self._banner.set_content("" if inspection is None else verdict.banner(inspection))
        self._details.set_content(
            "" if inspection is None else verdict.details(inspection, self._service.references(inspection))
        )
        self._details.set_visibility(available)
        self._comment.set_value("")
        self._defect.set_value("")
        for action, button in self._buttons.items():
            usable = bool(self._done) if action == "undo" else available
            button.props(remove="disabled") if usable else button.props("disabled")
