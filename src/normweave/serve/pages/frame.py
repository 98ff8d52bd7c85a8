"""The base class of the pages: header, navigation, theme, log out."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Any, ClassVar, NamedTuple, TypeVar

from nicegui import ui

from normweave.errors import NormweaveError
from normweave.serve.access import Access
from normweave.serve.delivery import Deliveries
from normweave.serve.drift import DriftWatch
from normweave.serve.records import AuditEntry, Inspection, PartRecord, Token
from normweave.serve.reviews import defect_names
from normweave.serve.service import InspectionService
from normweave.serve.source import SourceRunner
from normweave.serve.store import Store
from normweave.serve.teach import Teaching
from normweave.serve.templating import render_macro
from normweave.serve.watch import Watch

Row = TypeVar("Row", AuditEntry, Inspection, PartRecord)

TEMPLATE = "frame.html"
COMMENT, DEFECT = 500, 100
"""Length of a comment, and of the name of a defect, in characters."""
EMIT_ID = "(event) => { const row = event.target.closest('[data-id]'); if (row) emit(Number(row.dataset.id)); }"
"""Click handler of a list: it sends the `data-id` of the row."""
EMIT_SHOWN = "() => emit(window.normweave.shown())"
"""Click handler of a decision: it sends the id of the inspection whose picture is shown; 0 if it is not yet."""


def _text(name: str) -> str:
    return resources.files("normweave.serve.pages").joinpath(name).read_text(encoding="utf-8")


HEAD = f"<style>{_text('page.css')}</style><script>{_text('page.js')}</script>"


class Serving(NamedTuple):
    """What a page serves, and to whom."""

    service: InspectionService
    token: Token
    """Token of the person."""
    watch: Watch | None
    """None: no folder is watched."""
    access: Access | None
    """None: requests need no token."""
    drift: DriftWatch
    teaching: Teaching
    outputs: Deliveries
    sources: Sequence[SourceRunner]


class Page(ABC):
    """One page in one browser. A subclass in this package is served at its `path` and listed in the navigation.

    Attributes:
        path: the address.
        title: the name in the navigation and the heading.
        purpose: the sentence below the heading.
        position: the rank in the navigation, ascending.
        engineers_only: whether operators neither see it in the navigation nor may open it.
    """

    path: ClassVar[str]
    title: ClassVar[str]
    purpose: ClassVar[str]
    position: ClassVar[float]
    engineers_only: ClassVar[bool] = False

    def __init__(self, serving: Serving) -> None:
        self._service, self._token, self._watch, self._access = serving[:4]
        self._drift, self._teaching, self._outputs, self._sources = serving[4:]

    @abstractmethod
    async def content(self) -> None:
        """Build everything below the header."""

    async def build(self) -> None:
        """Build the page."""
        ui.add_head_html(HEAD)
        ui.context.client.on_exception(_notify_failure)
        with ui.element("header").classes("top"):
            ui.html(render_macro(TEMPLATE, "brand", line=self._service.store.line), tag="div").classes("brand")
            pages = [page for page in registered_pages() if page.is_open_to(self._token)]
            links = render_macro(TEMPLATE, "navigation", pages=pages, path=self.path)
            ui.html(links, tag="nav").props('aria-label="Pages"')
            with ui.element("div").classes("person"):
                theme = ui.html(render_macro(TEMPLATE, "theme"), tag="button").classes("theme")
                theme.props('type=button title="Light or dark" aria-label="Light or dark"')
                theme.on("click", js_handler="() => window.normweave.nextTheme()")
                ui.html(render_macro(TEMPLATE, "who", token=self._token)).classes("who")
                with ui.element("form").props("method=post action=/logout"):
                    ui.html("Log out", tag="button").classes("plain-button").props("type=submit")
        with ui.element("div").classes("page"):
            if self.is_open_to(self._token):
                await self.content()
            else:
                self.heading()
                ui.label("This page is for engineers.")

    @classmethod
    def is_open_to(cls, token: Token) -> bool:
        """Return whether the person with this token may open the page."""
        return token.role == "engineer" or not cls.engineers_only

    def heading(self) -> None:
        """Add the title and the purpose."""
        ui.html(render_macro(TEMPLATE, "heading", page=self)).classes("heading")


def registered_pages() -> list[type[Page]]:
    """Return the pages that are imported, in the order of the navigation."""
    return sorted(Page.__subclasses__(), key=lambda page: page.position)


def plain_button(word: str, action: Callable[[], Any]) -> ui.button:
    """Add a button without a colour."""
    return ui.button(word, color=None, on_click=action).props("flat no-caps").classes("plain-button")


class Pager:
    """The buttons below a table that show its older and newer rows.

    Args:
        rows: number of rows of a page of the table.
        update: fills the table again.
    """

    def __init__(self, rows: int, update: Callable[[], Awaitable[None]]) -> None:
        self._rows, self._update = rows, update
        self._befores: list[int | None] = [None]  # id at which each page of the table begins, up to the shown one
        self._last: int | None = None
        with ui.element("div").classes("pager"):
            self._newer = plain_button("Newer", self._show_newer)
            self._range = ui.label().classes("soft").props('aria-live="polite"')
            self._older = plain_button("Older", self._show_older)
        for button in (self._newer, self._older):
            button.disable()  # until something is shown

    @property
    def before(self) -> int | None:
        """All rows of the shown page have lower ids; None: it is the first page."""
        return self._befores[-1]

    @property
    def limit(self) -> int:
        """Number of entries to read: one more than are shown tells whether there are older ones."""
        return self._rows + 1

    def restart(self) -> None:
        """Go to the first page."""
        self._befores = [None]

    def shown(self, found: Sequence[Row], *, total: int | None = None) -> list[Row]:
        """Return those of the entries that are shown, and set the buttons.

        Args:
            found: up to `limit` entries before `before`.
            total: number of all entries, if it is known.
        """
        rows = list(found[: self._rows])
        self._last = rows[-1].id if rows else None
        first = (len(self._befores) - 1) * self._rows
        of_all = "" if total is None else f" of {total:,}"
        self._range.set_text(f"{first + 1 if rows else 0}–{first + len(rows)}{of_all}")
        self._newer.set_enabled(self.before is not None)
        self._older.set_enabled(len(found) > self._rows)
        return rows

    async def _show_older(self) -> None:
        self._befores.append(self._last)
        await self._update()

    async def _show_newer(self) -> None:
        if self.before is not None:
            self._befores.pop()
        await self._update()


async def defect_input(store: Store) -> ui.input:
    """Add the field for the name of a defect, which proposes the names that were given before."""
    names = await asyncio.to_thread(defect_names, store)
    field = ui.input("Name of the defect (optional)", autocomplete=names)
    field.props(f"outlined dense maxlength={DEFECT}").classes("comment")
    return field


def entered(field: ui.input, length: int) -> str:
    """Return the text of a field, of at most `length` characters."""
    return str(field.value or "").strip()[:length]


def notify_error(message: object) -> None:
    """Show an error until the person closes it."""
    ui.notify(str(message), type="negative", multi_line=True, close_button="Close")


def _notify_failure(error: Exception) -> None:
    known = isinstance(error, NormweaveError)
    notify_error(error if known else "Something went wrong. See the log of the server.")
