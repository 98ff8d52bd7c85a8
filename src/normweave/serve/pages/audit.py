"""Audit: who logged in, made or revoked tokens, changed the false-alarm rate, and which bundles were loaded."""

from __future__ import annotations

import asyncio
from typing import get_args

from nicegui import ui

from normweave.serve.pages.frame import Page, plain_button
from normweave.serve.records import AuditEntry, AuditEvent, Token
from normweave.serve.service import InspectionService
from normweave.serve.templating import render_macro
from normweave.serve.watch import Watch

ROWS = 50
"""Rows of one page of the table."""
ANY = ""
EVENTS: dict[AuditEvent, str] = {
    "login": "logged in",
    "login_failed": "login failed",
    "logout": "logged out",
    "token_created": "token created",
    "token_revoked": "token revoked",
    "rate_changed": "false-alarm rate changed",
    "bundle_loaded": "bundle loaded",
}


class AuditPage(Page):
    """The entries of the audit table, newest first."""

    path = "/audit"
    title = "Audit"
    purpose = "Logins, tokens, limits and bundles. Nobody can change or remove an entry."
    position = 5
    engineers_only = True

    def __init__(self, service: InspectionService, token: Token, watch: Watch | None) -> None:
        super().__init__(service, token, watch)
        self._event: AuditEvent | None = None
        self._befores: list[int | None] = [None]  # of each page up to the shown one
        self._last: int | None = None

    async def content(self) -> None:
        """Build the table and its buttons."""
        self.heading()
        with ui.element("section").classes("sheet"):
            with ui.element("div").classes("choices"):
                choice = ui.select({ANY: "any event"} | EVENTS, value=ANY, label="Event")
                choice.props("outlined dense options-dense").classes("choice")
                choice.on_value_change(lambda change: self._choose(str(change.value)))
            self._table = ui.html()
            with ui.element("div").classes("pager"):
                self._newer = plain_button("Newer", self._previous_rows)
                self._older = plain_button("Older", self._next_rows)
        await self._list()

    async def _choose(self, event: str) -> None:
        self._event = next((one for one in get_args(AuditEvent) if one == event), None)
        self._befores = [None]
        await self._list()

    async def _list(self) -> None:
        found = await asyncio.to_thread(
            self._service.store.audit, event=self._event, before=self._befores[-1], limit=ROWS + 1
        )
        shown = found[:ROWS]
        self._last = shown[-1].id if shown else None
        self._table.set_content(table(shown, line=self._service.store.line))
        self._newer.set_enabled(len(self._befores) > 1)
        self._older.set_enabled(len(found) > ROWS)

    async def _next_rows(self) -> None:
        self._befores.append(self._last)
        await self._list()

    async def _previous_rows(self) -> None:
        if len(self._befores) > 1:
            self._befores.pop()
        await self._list()


def table(entries: list[AuditEntry], *, line: str = "") -> str:
    """Return an HTML table of entries; those of other lines than `line` name theirs."""
    rows = [(entry, EVENTS[entry.event], described(entry)) for entry in entries]
    return render_macro("audit.html", "table", rows=rows, line=line)


def described(entry: AuditEntry) -> str:
    """Return what belongs to an event in words."""
    detail = entry.detail
    match entry.event:
        case "login_failed":
            return f"{detail['attempts']} times, from {', '.join(detail['addresses'])}"
        case "token_created" | "token_revoked":
            return f"{detail['name']} (token {detail['id']}), {detail['role']}"
        case "rate_changed":
            return f"{100 * detail['false_alarm_rate']:.3g} % for bundle {detail['bundle_hash'][:12]}"
        case "bundle_loaded":
            before = detail["before"]
            changed = f", before {before[:12]}" if before not in (None, detail["bundle_hash"]) else ""
            return f"bundle {detail['bundle_hash'][:12]}{changed}"
    return ""
