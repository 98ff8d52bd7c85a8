"""Tokens: who may use the server; create a token with a card to log in by, and revoke one."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import get_args
from urllib.parse import urlsplit

import segno
from nicegui import ui
from nicegui.events import GenericEventArguments

from normweave.errors import NormweaveError
from normweave.serve.access import Access, NewToken
from normweave.serve.authentication import is_loopback
from normweave.serve.login import LOGIN
from normweave.serve.pages.frame import EMIT_ID, Page, Serving, notify_error, plain_button
from normweave.serve.records import Role, Token
from normweave.serve.templating import render_macro

TEMPLATE = "tokens.html"
NEVER = 0
LIFETIMES = {1: "after a day", 7: "after a week", 30: "after 30 days", 365: "after a year", NEVER: "never"}
"""Days after which a new token expires."""
NAME_LENGTH = 200
"""Length of a name in characters."""
ORIGIN_LENGTH = 300
EMIT_ORIGIN = "() => emit(location.origin)"
"""Click handler that sends the address by which the browser reaches the server."""


class TokensPage(Page):
    """A table of all tokens, a form that creates one, and the card of a new one."""

    path = "/tokens"
    title = "Tokens"
    purpose = "Who may use this server: people log in with a token or its card, programs send it."
    position = 7
    engineers_only = True

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        self._asked: Token | None = None  # whether to revoke it

    async def content(self) -> None:
        """Build the form, the place of the card, and the table."""
        self.heading()
        if self._access is None:
            ui.label("This server was started with --no-token, so it has no tokens.")
            return
        with ui.element("section").classes("sheet"):
            ui.html("<h2>New token</h2>")
            self._form()
        self._card = ui.element("section").classes("sheet new-token").props('aria-live="polite"')
        self._card.set_visibility(False)
        with ui.element("section").classes("sheet"):
            self._table = ui.html()
            self._table.on("click", self._ask, js_handler=EMIT_ID)
        with (
            ui.dialog().props('aria-label="Revoke a token"') as self._dialog,
            ui.element("div").classes("sheet revoke"),
        ):
            self._question = ui.html()
            with ui.element("div").classes("pager"):
                revoke = ui.button("Revoke", color=None, on_click=self._revoke)
                revoke.props("unelevated no-caps").classes("main-button")
                plain_button("Cancel", self._dialog.close)
        await self._list(self._access)

    # ── create ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _form(self) -> None:
        with ui.element("div").classes("choices"):
            self._name = ui.input("Name of the person, station or program").classes("token-name")
            self._name.props(f"outlined dense maxlength={NAME_LENGTH}")
            self._name.on("keydown.enter", self._create, js_handler=EMIT_ORIGIN)
            self._role = ui.select(list(get_args(Role)), value="operator", label="Role")
            self._role.props("outlined dense options-dense").classes("choice")
            self._days = ui.select(LIFETIMES, value=365, label="Expires")
            self._days.props("outlined dense options-dense").classes("choice")
            create = ui.button("Create", color=None).props("unelevated no-caps").classes("main-button")
            create.on("click", self._create, js_handler=EMIT_ORIGIN)
            create.bind_enabled_from(self._name, "value", backward=lambda name: bool(str(name).strip()))

    async def _create(self, event: GenericEventArguments) -> None:
        name = str(self._name.value or "").strip()[:NAME_LENGTH]
        if self._access is None or not name:
            return
        self._name.set_value("")  # a second tap creates no second token
        actor = self._token
        new = await asyncio.to_thread(
            self._access.create,
            name=name,
            role=self._role.value,
            days=self._days.value or None,
            actor=actor.name,
            by=actor.id,
        )
        self._show(new, str(event.args)[:ORIGIN_LENGTH])
        await self._list(self._access)

    def _show(self, new: NewToken, origin: str) -> None:
        self._card.clear()
        with self._card:
            ui.html(card(new, origin=origin, line=self._service.store.line)).classes("card")
            ui.html(notes(new, origin=origin))
            with ui.element("div").classes("pager"):
                plain_button("Print", lambda: ui.run_javascript("window.print()"))
                plain_button("Close", self._close)
        self._card.set_visibility(True)

    def _close(self) -> None:
        self._card.clear()
        self._card.set_visibility(False)

    # ── revoke ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _list(self, access: Access) -> None:
        self._table.set_content(table(await asyncio.to_thread(access.tokens), now=datetime.now(UTC)))

    async def _ask(self, event: GenericEventArguments) -> None:
        assert self._access is not None  # otherwise there is no table
        tokens = await asyncio.to_thread(self._access.tokens)
        self._asked = next((token for token in tokens if token.id == int(event.args)), None)
        if self._asked is not None:
            self._question.set_content(
                render_macro(TEMPLATE, "question", token=self._asked, own=self._asked.id == self._token.id)
            )
            self._dialog.open()

    async def _revoke(self) -> None:
        self._dialog.close()
        asked, self._asked = self._asked, None
        if self._access is None or asked is None:
            return
        try:
            await asyncio.to_thread(self._access.revoke, asked.id, actor=self._token.name, by=self._token.id)
        except NormweaveError as error:
            notify_error(error)
            return
        ui.notify(f"The token {asked.id} ({asked.name}) is revoked.", type="positive")
        await self._list(self._access)


def table(tokens: list[Token], *, now: datetime) -> str:
    """Return an HTML table of tokens, the valid ones first, then the newest first; `data-id` is the id to revoke."""
    rows = sorted(tokens, key=lambda token: (not token.is_valid(now), -token.id))
    return render_macro(TEMPLATE, "table", tokens=rows, now=now)


def card(new: NewToken, *, origin: str, line: str) -> str:
    """Return the card of a new token as HTML: line, name, role, expiry, and the QR code of the address that logs in.

    Args:
        origin: scheme, host and port of the server.
        line: name of the line, or an empty string.
    """
    code = segno.make(address(new, origin=origin), error="m", micro=False)
    path = code.svg_inline(border=4, light="#fff", omitsize=True)
    return render_macro(TEMPLATE, "card", token=new.token, line=line, code=path, host=urlsplit(origin).netloc)


def notes(new: NewToken, *, origin: str) -> str:
    """Return what to know about the card, and the token as text."""
    here = is_loopback(urlsplit(origin).hostname or "")
    return render_macro(TEMPLATE, "notes", secret=new.secret, origin=origin, here=here)


def address(new: NewToken, *, origin: str) -> str:
    """Return the address that logs in; a browser does not send what follows the # to the server."""
    return f"{origin}{LOGIN}#{new.secret}"
