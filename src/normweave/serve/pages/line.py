"""Line: what each source and output does, how far behind it is, and what its counterpart has refused."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from nicegui import ui
from nicegui.events import GenericEventArguments

from normweave.serve.delivery import OutputState
from normweave.serve.delivery_store import DeadLetter
from normweave.serve.pages import live
from normweave.serve.pages.frame import EMIT_ID, Page
from normweave.serve.records import Token
from normweave.serve.source import SourceRunner
from normweave.serve.templating import render_macro

TEMPLATE = "line.html"
REFRESH_SECONDS = 2.0
LETTERS = 10
"""Dead letters of an output that are listed, the oldest."""
COLOURS = {"working": "green", "behind": "amber", "failing": "red"}
"""Class of the mark of each status; the page shows the status itself beside it."""


class LinePage(Page):
    """A section for each source and output."""

    path = "/line"
    title = "Line"
    purpose = "Where images come from and where results go: whether each source and output works."
    position = 4.7

    async def content(self) -> None:
        """Build the sections."""
        self.heading()
        await live.follower_note(self._service)
        self._given = ui.html().props('aria-live="polite"')
        self._sections = ui.html().props('aria-live="polite"')
        self._sections.on("click", self._act, js_handler=EMIT_ID)
        self._names: list[str] = []
        await self._update()
        ui.timer(REFRESH_SECONDS, self._update, immediate=False)

    async def _update(self) -> None:
        states, letters = await asyncio.to_thread(self._read)
        self._names = [state.name for state in states]
        self._sections.set_content(sections(states, letters, token=self._token))
        self._given.set_content(sources(self._sources))

    def _read(self) -> tuple[list[OutputState], dict[str, list[DeadLetter]]]:
        states = self._outputs.states()
        return states, {
            one.name: self._outputs.dead_letters(one.name, limit=LETTERS) for one in states if one.dead_letters
        }

    async def _act(self, event: GenericEventArguments) -> None:
        """Do what the button of an output is for; its number is that of the output, negative to acknowledge a loss."""
        number = int(event.args)
        place = abs(number) - 1
        if self._token.role != "engineer" or not 0 <= place < len(self._names):
            return
        name = self._names[place]
        if number > 0:
            count = await asyncio.to_thread(self._outputs.send_again, name)
            ui.notify(f"{count} messages are sent again.")
        else:
            actor, token = self._token.name, self._token.id
            count = await asyncio.to_thread(self._outputs.acknowledge_removed, name, actor=actor, token=token)
            ui.notify(f"The loss of {count} messages is acknowledged.")
        await self._update()


def sources(given: Sequence[SourceRunner]) -> str:
    """Return the state of each source as HTML."""
    rows = [(one.config, one.state) for one in given]
    return render_macro(TEMPLATE, "sources", rows=rows, colours=live.COLOURS)


def _about(letter: DeadLetter) -> tuple[str, str]:
    """Return the name and the address of what a dead letter is of."""
    id = int(letter.message["data"]["id"])
    match letter.message["type"]:
        case "inspection.stored":
            return f"Inspection {id}", f"/history?days=&id={id}"
        case "drift.alarm":
            return f"Alarm of drift {id}", "/drift"
        case _:
            return f"Part verdict {id}", f"/parts?id={id}"


def sections(states: list[OutputState], letters: dict[str, list[DeadLetter]], *, token: Token) -> str:
    """Return a section for each output as HTML, with the buttons of an engineer."""
    listed = {name: [(one, *_about(one)) for one in given] for name, given in letters.items()}
    return render_macro(
        TEMPLATE, "sections", states=states, letters=listed, colours=COLOURS, engineer=token.role == "engineer"
    )
