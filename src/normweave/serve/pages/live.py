"""Live: the last image of each source with its map and verdict, and what the source does."""

from __future__ import annotations

import asyncio

from nicegui import ui

from normweave.serve.pages import verdict
from normweave.serve.pages.frame import Page
from normweave.serve.pages.viewer import Viewer
from normweave.serve.replicas import Leader
from normweave.serve.service import InspectionService
from normweave.serve.source import SourceConfig, SourceRunner, SourceState
from normweave.serve.templating import render_macro

TEMPLATE = "live.html"
LEADER_SECONDS = 2.0
"""Time between two looks at which server leads."""
REFRESH_SECONDS = 0.5
"""Time between two looks at the sources; images in between are not shown."""
COLOURS = {"running": "green", "attention": "amber", "no images": "red", "idle": "grey"}
"""Class of the mark of each status; the page shows the status itself beside it."""


class LivePage(Page):
    """One section for each source of `line.yaml`."""

    path = "/live"
    title = "Live"
    purpose = "The last image of each source."
    position = 1.5

    async def content(self) -> None:
        """Build the sections."""
        self.heading()
        await follower_note(self._service)
        if not self._sources:
            ui.html(render_macro(TEMPLATE, "missing")).classes("sheet")
        shown = [_Section(source) for source in self._sources]

        def update() -> None:
            for section in shown:
                section.update()

        update()
        ui.timer(REFRESH_SECONDS, update, immediate=False)


class _Section:
    """What the page shows of a source. The browser loads an image only when another one was inspected."""

    def __init__(self, source: SourceRunner) -> None:
        self._source = source
        self._id = 0
        self._state: SourceState | None = None
        with ui.element("section").classes("sheet live"):
            self._head = ui.html()
            self._banner = ui.html().props('aria-live="polite"')
            self._viewer = Viewer()

    def update(self) -> None:
        """Show a new state and a new inspection."""
        state, last = self._source.state, self._source.last
        if state != self._state:
            self._state = state
            self._head.set_content(head(self._source.config, state))
        if last is not None and last.id != self._id:
            self._id = last.id
            self._banner.set_content(verdict.banner(last))
            self._viewer.show(last)


async def follower_note(service: InspectionService) -> None:
    """Add a section that names the server that leads, unless this one does, which is kept up to date."""
    replica = service.replica
    if replica is None:
        return
    section = ui.html().props('aria-live="polite"')

    async def update() -> None:
        section.set_content("" if replica.leads else follower(await asyncio.to_thread(replica.leader)))

    await update()
    ui.timer(LEADER_SECONDS, update, immediate=False)


def follower(leader: Leader | None) -> str:
    """Return who reads the sources and delivers, on a server that does not, as HTML."""
    return render_macro(TEMPLATE, "follower", leader=leader)


def head(config: SourceConfig, state: SourceState) -> str:
    """Return the name and the state of a source as HTML."""
    colour = COLOURS[state.status]
    return render_macro(TEMPLATE, "head", name=config.name, type=config.type, state=state, colour=colour)
