"""Audit: who logged in, made or revoked tokens, changed the false-alarm rate or the model, or taught a product."""

from __future__ import annotations

import asyncio
from typing import get_args

from nicegui import ui

from normweave.serve.pages.frame import Page, Pager, Serving
from normweave.serve.records import AuditEntry, AuditEvent
from normweave.serve.templating import render_macro

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
    "shadow_started": "shadow started",
    "shadow_stopped": "shadow stopped",
    "shadow_failed": "shadow failed",
    "model_promoted": "model promoted",
    "model_rolled_back": "model rolled back",
    "teach_started": "training of a product started",
    "teach_kept": "new bundle kept",
    "teach_discarded": "training or new bundle thrown away",
    "delivery_lost": "messages removed before delivery",
    "delivery_loss_acknowledged": "loss of messages acknowledged",
}


class AuditPage(Page):
    """The entries of the audit table, newest first."""

    path = "/audit"
    title = "Audit"
    purpose = "Logins, tokens, limits, bundles and trainings. Nobody can change or remove an entry."
    position = 6
    engineers_only = True

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        self._event: AuditEvent | None = None

    async def content(self) -> None:
        """Build the table and its buttons."""
        self.heading()
        with ui.element("section").classes("sheet"):
            with ui.element("div").classes("choices"):
                choice = ui.select({ANY: "any event"} | EVENTS, value=ANY, label="Event")
                choice.props("outlined dense options-dense").classes("choice")
                choice.on_value_change(lambda change: self._choose(str(change.value)))
            self._table = ui.html()
            self._pager = Pager(ROWS, self._list)
        await self._list()

    async def _choose(self, event: str) -> None:
        self._event = next((one for one in get_args(AuditEvent) if one == event), None)
        self._pager.restart()
        await self._list()

    async def _list(self) -> None:
        found = await asyncio.to_thread(
            self._service.store.audit, event=self._event, before=self._pager.before, limit=self._pager.limit
        )
        self._table.set_content(table(self._pager.shown(found), line=self._service.store.line))


def table(entries: list[AuditEntry], *, line: str = "") -> str:
    """Return an HTML table of entries; those of other lines than `line` name theirs."""
    rows = [(entry, word(entry), described(entry)) for entry in entries]
    return render_macro("audit.html", "table", rows=rows, line=line)


def word(entry: AuditEntry) -> str:
    """Return the event in words; a training can be thrown away before it has made a bundle."""
    if entry.event == "teach_discarded":
        return "training thrown away" if entry.detail["bundle_hash"] is None else "new bundle thrown away"
    return EVENTS[entry.event]


def described(entry: AuditEntry) -> str:
    """Return what belongs to an event in words."""
    detail = entry.detail
    match entry.event:
        case "login_failed":
            times = "once" if detail["attempts"] == 1 else f"{detail['attempts']} times"
            return f"{times}, from {', '.join(detail['addresses'])}"
        case "token_created" | "token_revoked":
            return f"{detail['name']} (token {detail['id']}), {detail['role']}"
        case "rate_changed":
            return f"{100 * detail['false_alarm_rate']:.3g} % for bundle {detail['bundle_hash'][:12]}"
        case "bundle_loaded":
            before = detail["before"]
            changed = f", before {before[:12]}" if before not in (None, detail["bundle_hash"]) else ""
            views = "".join(f", view {view}: {own[:12]}" for view, own in detail.get("views", {}).items())
            return f"bundle {detail['bundle_hash'][:12]}{changed}{views}"
        case "shadow_started" | "shadow_stopped":
            return f"bundle {detail['bundle_hash'][:12]}"
        case "teach_started":
            return f"{detail['category']}/{detail['subclass']}, {detail['images']} images, bundle {detail['base'][:12]}"
        case "teach_kept" | "teach_discarded":
            made = f", bundle {detail['bundle_hash'][:12]}" if detail["bundle_hash"] else ""
            return f"{detail['category']}/{detail['subclass']}{made}"
        case "delivery_lost" | "delivery_loss_acknowledged":
            count = detail["removed"]
            return f"output {detail['output']}, {count:,} message{'' if count == 1 else 's'}"
        case "shadow_failed":
            return f"bundle {detail['bundle_hash'][:12]}: {detail['reason']}"
        case "model_promoted" | "model_rolled_back":
            return f"bundle {detail['bundle_hash'][:12]}, before {detail['before'][:12]}"
    return ""
