"""Review: what the model stopped, did not know or nearly stopped, one after the other, for a person to decide."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Literal

from nicegui import ui
from nicegui.events import GenericEventArguments

from normweave.errors import NormweaveError
from normweave.serve.pages import verdict
from normweave.serve.pages.frame import frame, heading
from normweave.serve.pages.viewer import Viewer
from normweave.serve.records import Filter, Inspection, Token
from normweave.serve.service import InspectionService

REMEMBERED = 100
"""Decisions that can be undone, the last one first."""
LOOK_SECONDS = 5.0
"""Between two looks at what is left."""
COMMENT = 500
"""Letters."""


def queue(service: InspectionService) -> tuple[Filter, ...]:
    """What waits for a person: anomalous and unknown ones, and normal ones that are close to the line."""
    calibration = service.detector.calibration
    assert calibration is not None  # a service judges, so it has lines
    return (
        Filter(verdicts=("anomalous", "unknown"), reviewed=False),
        Filter(
            verdicts=("normal",),
            reviewed=False,
            p_value_below=verdict.BORDERLINE * calibration.false_alarm_rate,
        ),
    )


class ReviewPage:
    """One browser's way through the queue, newest first. Several may be at it: the last word on a part counts."""

    def __init__(self, service: InspectionService, token: Token) -> None:
        self._service = service
        self._token = token
        self._shown: Inspection | None = None
        self._before: int | None = None  # on this round, inspections from this one on were seen
        self._done: deque[int] = deque(maxlen=REMEMBERED)
        self._deciding = asyncio.Lock()

    async def build(self) -> None:
        """Everything on the page."""
        with frame("/review", self._service, self._token):
            with ui.element("div").classes("heading-row"):
                heading(
                    "Review", "Say of each part whether it is good. Your word is kept beside the model's."
                )
                self._left = ui.label().classes("left").props('aria-live="polite"')
            with ui.element("div").classes("bench"):
                with ui.element("div").classes("bench-main"):
                    self._banner = ui.html()
                    with ui.element("section").classes("sheet"):
                        self._viewer = Viewer()
                        self._nothing = ui.html(
                            "<b>Nothing is left to review.</b><br>What comes in appears here by itself."
                        ).classes("none")
                with ui.element("aside").classes("bench-list turns"):
                    with ui.element("div").classes("sheet decide"):
                        self._comment = ui.input("Comment (optional)")
                        self._comment.props(f"outlined dense maxlength={COMMENT}").classes("comment")
                        self._accept = self._button("accept", "A", "Accept", "the part is good")
                        self._reject = self._button("reject", "R", "Reject", "it is defective")
                        self._next = self._button("next", "N", "Next", "decide later")
                        self._undo = self._button("undo", "U", "Undo", "my last decision")
                    self._details = ui.html().classes("sheet")
        await self._advance()
        ui.timer(LOOK_SECONDS, self._look, immediate=False)

    def _button(
        self, decision: Literal["accept", "reject", "next", "undo"], key: str, word: str, told: str
    ) -> ui.element:
        """It sends the inspection that the person saw when they pressed it, which may be gone on the server by now."""
        button = ui.element("button").classes(f"decision {decision}")
        button.props(f'type=button data-decision={decision} aria-keyshortcuts="{key}"')

        async def pressed(event: GenericEventArguments) -> None:
            await self._pressed(decision, int(event.args))

        button.on("click", pressed, js_handler="() => emit(window.normweave.seen())")
        with button:
            ui.html(f"<b>{word}</b> <small>{told}</small><kbd>{key}</kbd>", tag="span")
        return button

    async def _pressed(self, decision: Literal["accept", "reject", "next", "undo"], seen: int) -> None:
        async with self._deciding:
            if seen != (0 if self._shown is None else self._shown.id):
                return  # a second press of the same key, meant for the one before
            try:
                if decision == "undo":
                    await self._take_back()
                elif self._shown is not None:
                    if decision != "next":
                        await self._service.review(
                            self._shown.id,
                            decision=decision,
                            reviewer=self._token.name,
                            comment=str(self._comment.value or "").strip()[:COMMENT],
                        )
                        self._done.append(self._shown.id)
                    self._before = self._shown.id
                    await self._advance()
            except NormweaveError as error:
                ui.notify(str(error), type="negative", close_button="Close")

    async def _take_back(self) -> None:
        if not self._done:
            return
        id = self._done.pop()
        inspection = await self._service.review(id, decision="undo", reviewer=self._token.name)
        self._before = id + 1
        self._show(inspection)
        await self._count()
        ui.notify("Your decision was taken back.", timeout=2000)

    async def _advance(self) -> None:
        """To the next one; behind the oldest, the newest of those that were skipped."""
        found = await self._first(before=self._before)
        if found is None and self._before is not None:
            self._before = None
            found = await self._first(before=None)
        self._show(found)
        await self._count()

    async def _first(self, *, before: int | None) -> Inspection | None:
        store = self._service.store
        pages = [
            await asyncio.to_thread(store.inspections, wanted, before=before, limit=1)
            for wanted in queue(self._service)
        ]
        return max((page[0] for page in pages if page), key=lambda one: one.id, default=None)

    async def _count(self) -> None:
        store = self._service.store
        counts = [await asyncio.to_thread(store.count, wanted) for wanted in queue(self._service)]
        self._left.set_text(f"{sum(counts)} left")

    async def _look(self) -> None:
        """What came in meanwhile; what the person looks at stays where it is."""
        async with self._deciding:
            if self._shown is None:
                await self._advance()
            else:
                await self._count()

    def _show(self, inspection: Inspection | None) -> None:
        self._shown = inspection
        there = inspection is not None
        self._viewer.show(inspection)
        self._viewer.set_visibility(there)
        self._nothing.set_visibility(not there)
        self._banner.set_content("" if inspection is None else verdict.banner(inspection))
        self._details.set_content("" if inspection is None else verdict.details(inspection))
        self._details.set_visibility(there)
        self._comment.set_value("")
        self._left.props(f"data-seen={0 if inspection is None else inspection.id}")
        for button, usable in (
            (self._accept, there),
            (self._reject, there),
            (self._next, there),
            (self._undo, bool(self._done)),
        ):
            button.props(remove="disabled") if usable else button.props("disabled")
