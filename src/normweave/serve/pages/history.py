"""History: how the rates went, kind by kind, every inspection with what people said of it, and all of it as CSV."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from html import escape
from typing import Any
from urllib.parse import urlencode

from nicegui import ui
from nicegui.events import GenericEventArguments

from normweave.errors import NormweaveError
from normweave.serve.pages import charts, verdict
from normweave.serve.pages.frame import frame, heading
from normweave.serve.pages.viewer import Viewer
from normweave.serve.records import Bucket, Filter, Inspection, Review, Token
from normweave.serve.service import InspectionService
from normweave.serve.store import Store

ROWS = 25
"""Of a page of the table."""
CSV_ROWS = 200
"""Written at a time."""
LOOK_SECONDS = 15.0
"""Between two looks at what came in, as long as the newest are shown."""
ANY = ""
SPANS = {
    "1": "last 24 hours",
    "7": "last 7 days",
    "30": "last 30 days",
    "90": "last 90 days",
    ANY: "everything",
}
BUCKETS: dict[Bucket, str] = {"hour": "by the hour", "day": "by the day", "week": "by the week"}
VERDICTS = {ANY: "any verdict"} | {kind: verdict.WORDS[kind] for kind in verdict.KINDS}
SOURCES = {ANY: "any source", "page": "this page", "folder": "watched folder", "api": "other programs"}
REVIEWS = {
    ANY: "reviewed or not",
    "none": "not reviewed",
    "any": "reviewed",
    "accept": "accepted as good",
    "reject": "rejected as defective",
}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def filter_of(given: Mapping[str, str]) -> Filter:
    """Which inspections are meant by what was chosen on the page, or stands in the address of the export.

    Raises:
        ValueError: something is not one of the choices.
    """
    chosen = {name: given.get(name, ANY) for name in ("days", "kind", "verdict", "source", "review", "name")}
    for name, allowed in (("days", SPANS), ("verdict", VERDICTS), ("source", SOURCES), ("review", REVIEWS)):
        if chosen[name] not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, allowed))}, got {chosen[name]!r}. "
                "Choose on the History page and use its Export."
            )
    category, _, subclass = chosen["kind"].partition("\n")
    review, seen = chosen["review"], chosen["verdict"]
    return Filter(
        since=datetime.now(UTC) - timedelta(days=int(chosen["days"])) if chosen["days"] else None,
        verdicts=() if seen in (ANY, "unreadable") else (seen,),  # type: ignore[arg-type]  # checked above
        unreadable=True if seen == "unreadable" else None,
        category=category or None,
        subclass=subclass or None,
        name=chosen["name"] or None,
        source=chosen["source"] or None,  # type: ignore[arg-type]  # checked above
        reviewed=None if review in (ANY, "accept", "reject") else review == "any",
        decision=review if review in ("accept", "reject") else None,  # type: ignore[arg-type]  # checked above
    )


class HistoryPage:
    """One browser's view of what was inspected."""

    def __init__(self, service: InspectionService, token: Token) -> None:
        self._service = service
        self._token = token
        self._chosen = {"days": "7", "kind": ANY, "verdict": ANY, "source": ANY, "review": ANY, "name": ANY}
        self._befores: list[int | None] = [None]  # where each page begins, up to the one that is shown
        self._open: int | None = None

    async def build(self) -> None:
        """Everything on the page."""
        with frame("/history", self._service, self._token):
            heading(
                "History", "What was inspected, and what people said of it. Times are those of the server."
            )
            with ui.element("section").classes("sheet"):
                with ui.element("div").classes("choices"):
                    self._select("days", "Time", SPANS)
                    self._select("kind", "Kind", self._kinds())
                    self._bucket = ui.select(BUCKETS, value="day", label="Columns", on_change=self._draw)
                    self._bucket.props("outlined dense options-dense").classes("choice")
                    self._shares = ui.switch("As shares", on_change=self._draw)
                self._chart = ui.html()
            with ui.element("section").classes("sheet"):
                with ui.element("div").classes("choices"):
                    self._select("verdict", "Verdict", VERDICTS)
                    self._select("source", "Source", SOURCES)
                    self._select("review", "Review", REVIEWS)
                    name = ui.input("File name, exactly").props("outlined dense clearable debounce=400")
                    name.classes("choice").on_value_change(lambda change: self._choose("name", change.value))
                    self._export = ui.link("Export CSV", "/history.csv").classes("plain-button export")
                    self._export.props("download")
                self._table = ui.html()
                self._table.on(
                    "click",
                    self._show,
                    js_handler="(event) => { const row = event.target.closest('[data-id]'); "
                    "if (row) emit(Number(row.dataset.id)); }",
                )
                with ui.element("div").classes("pager"):
                    self._newer = _plain_button("Newer", self._back)
                    self._where = ui.label().classes("soft").props('aria-live="polite"')
                    self._older = _plain_button("Older", self._on)
        self._one()
        await self._all()
        ui.timer(LOOK_SECONDS, self._look, immediate=False)

    def _kinds(self) -> dict[str, str]:
        """The kinds that this bundle knows; those of others are found under everything."""
        kinds = {ANY: "all kinds"}
        for category, subclasses in self._service.detector.record["categories"].items():
            kinds[category] = category
            kinds |= {
                f"{category}\n{subclass}": verdict.joined(category, subclass) for subclass in subclasses
            }
        return kinds

    def _select(self, name: str, label: str, options: Mapping[str, str]) -> None:
        select = ui.select(dict(options), value=self._chosen[name], label=label)
        select.props("outlined dense options-dense").classes("choice")
        select.on_value_change(lambda change: self._choose(name, change.value))

    async def _choose(self, name: str, value: Any) -> None:
        self._chosen[name] = str(value or ANY)
        self._befores = [None]
        await self._all()

    # ── chart and table ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _all(self) -> None:
        given = {name: value for name, value in self._chosen.items() if value}
        self._export.props(f'href="/history.csv?{urlencode(given)}"')
        await self._draw()
        await self._list()

    async def _look(self) -> None:
        if self._befores == [None]:
            await self._all()

    async def _draw(self) -> None:
        bucket: Bucket = self._bucket.value
        chosen = filter_of(self._chosen)
        whole = replace(
            chosen, verdicts=(), unreadable=None, reviewed=None, decision=None, name=None, source=None
        )
        if bucket == "hour" and whole.since is None:
            whole = replace(whole, since=datetime.now(UTC) - charts.MOST_COLUMNS * timedelta(hours=1))
        counts = await asyncio.to_thread(self._service.store.counts, whole, bucket=bucket)
        self._chart.set_content(charts.over_time(counts, bucket=bucket, shares=bool(self._shares.value)))

    async def _list(self) -> None:
        store, chosen = self._service.store, filter_of(self._chosen)
        rows = await asyncio.to_thread(store.inspections, chosen, before=self._befores[-1], limit=ROWS + 1)
        total = await asyncio.to_thread(store.count, chosen)
        shown, more = rows[:ROWS], len(rows) > ROWS
        self._last = shown[-1].id if shown else None
        self._table.set_content(_table(shown))
        first = (len(self._befores) - 1) * ROWS
        self._where.set_text(f"{first + 1 if shown else 0}–{first + len(shown)} of {total:,}")
        self._newer.set_enabled(len(self._befores) > 1)
        self._older.set_enabled(more)

    async def _on(self) -> None:
        self._befores.append(self._last)
        await self._list()

    async def _back(self) -> None:
        if len(self._befores) > 1:
            self._befores.pop()
        await self._list()

    # ── one of them ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _one(self) -> None:
        with ui.dialog().classes("one") as self._dialog, ui.element("div").classes("sheet one-sheet"):
            with ui.element("div").classes("list-head"):
                self._title = ui.label().classes("soft")
                _plain_button("Close", self._dialog.close)
            self._banner = ui.html()
            self._viewer = Viewer()
            self._details = ui.html()
            self._said = ui.html()
            with ui.element("div").classes("pager"):
                for decision, word in (("accept", "Accept"), ("reject", "Reject"), ("undo", "Take back")):
                    button = ui.element("button").classes(f"decision small {decision}").props("type=button")
                    button.on("click", partial(self._decide, decision), args=[])
                    with button:
                        ui.label(word)

    async def _show(self, event: GenericEventArguments) -> None:
        self._open = int(event.args)
        if await self._fill():
            self._dialog.open()

    async def _fill(self) -> bool:
        if self._open is None:
            return False
        store = self._service.store
        inspection = await asyncio.to_thread(store.inspection, self._open)
        if inspection is None:
            ui.notify("This inspection is no longer kept.", type="warning")
            return False
        reviews = await asyncio.to_thread(store.reviews, self._open)
        self._title.set_text(f"Inspection {inspection.id}")
        self._banner.set_content(verdict.banner(inspection))
        self._viewer.show(inspection)
        self._details.set_content(verdict.details(inspection))
        self._said.set_content(_reviews(reviews))
        return True

    async def _decide(self, decision: Any) -> None:
        if self._open is None:
            return
        try:
            await self._service.review(self._open, decision=decision, reviewer=self._token.name)
        except NormweaveError as error:
            ui.notify(str(error), type="negative", close_button="Close")
            return
        await self._fill()
        await self._list()


def _plain_button(word: str, action: Callable[[], Any]) -> ui.button:
    return ui.button(word, color=None, on_click=action).props("flat no-caps").classes("plain-button")


def _table(inspections: list[Inspection]) -> str:
    """Rows that say which inspection a click on them means."""
    if not inspections:
        return '<p class="soft none">No inspections here.</p>'
    rows = []
    for one in inspections:
        outcome = one.outcome
        score = "–" if outcome.pred_score is None else f"{outcome.pred_score:.4g} <small>{_line(one)}</small>"
        p_value = "–" if outcome.p_value is None else f"{outcome.p_value:.3g}"
        said = verdict.decision_word(one)
        rows.append(
            f'<tr data-id="{one.id}"><td class="text">{tag_of(one)}</td>'
            f'<td class="text name"><button type="button" data-id="{one.id}">{escape(one.name)}'
            f"<small>{said}</small></button></td>"
            f'<td class="text wide">{escape(verdict.joined(outcome.category, outcome.subclass))}</td>'
            f'<td class="wide">{score}</td><td class="wide">{p_value}</td>'
            f'<td class="text wide">{said}</td><td>{_when(one)}</td></tr>'
        )
    return (
        '<table class="inspections"><thead><tr><th class="text">Verdict</th><th class="text">File</th>'
        '<th class="text wide">Looks like</th><th class="wide">Score</th><th class="wide">p</th>'
        f'<th class="text wide">Review</th><th>Time</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def tag_of(inspection: Inspection) -> str:
    """The verdict of an inspection."""
    return verdict.tag(verdict.kind_of(inspection.outcome))


def _when(inspection: Inspection) -> str:
    return " ".join(f"<span>{part}</span>" for part in verdict.local(inspection.received_at).split())


def _line(inspection: Inspection) -> str:
    threshold = inspection.outcome.threshold
    return "" if threshold is None else f"line {threshold:.4g}"


def _reviews(reviews: list[Review]) -> str:
    """Everything that was said, also what was taken back."""
    words = {"accept": "accepted as good", "reject": "rejected as defective", "undo": "taken back"}
    items = "".join(
        f"<li>{verdict.local(one.at)}: {words[one.decision]} by {escape(one.reviewer)}"
        f"{f': “{escape(one.comment)}”' if one.comment else ''}</li>"
        for one in reviews
    )
    return f'<h3>Reviews</h3><ul class="plain">{items}</ul>' if items else ""


# ── export ───────────────────────────────────────────────────────────────────────────────────────────────────────────

COLUMNS = (
    "id",
    "received_at",
    "name",
    "source",
    "actor",
    "verdict",
    "pred_score",
    "threshold",
    "p_value",
    "false_alarm_rate",
    "category",
    "subclass",
    "subclass_distance",
    "subclass_p_value",
    "unseen",
    "adapted",
    "experts",
    "boxes",
    "height",
    "width",
    "latency_ms",
    "model",
    "bundle_hash",
    "error",
    "decision",
    "reviewer",
    "reviewed_at",
    "comment",
)
"""Of the export."""


def csv_lines(store: Store, chosen: Filter) -> Iterator[str]:
    """A table for a spreadsheet, oldest first, a few rows at a time."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS)
    writer.writeheader()
    for count, one in enumerate(store.iter_inspections(chosen), start=1):
        writer.writerow({name: _harmless(value) for name, value in _csv_row(one).items()})
        if count % CSV_ROWS == 0:
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()


def _csv_row(one: Inspection) -> dict[str, object]:
    row: dict[str, object] = {
        name: getattr(one if hasattr(one, name) else one.outcome, name, None) for name in COLUMNS
    }
    row["received_at"] = one.received_at.isoformat()
    row["experts"] = " ".join(f"{name}={weight:.4f}" for name, weight in one.outcome.experts)
    row["boxes"] = len(one.outcome.boxes)
    if one.review is not None:
        row |= {name: getattr(one.review, name) for name in ("decision", "reviewer", "comment")}
        row["reviewed_at"] = one.review.at.isoformat()
    return row


def _harmless(value: object) -> object:
    """A text that a spreadsheet would take for a formula is marked as text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
