"""History: results over time, every inspection with its reviews, and the export as CSV."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from urllib.parse import urlencode

from nicegui import ui
from nicegui.events import GenericEventArguments

from normweave.errors import NormweaveError
from normweave.serve.pages import charts, verdict
from normweave.serve.pages.frame import (
    COMMENT,
    DEFECT,
    EMIT_ID,
    EMIT_SHOWN,
    Page,
    Pager,
    Serving,
    defect_input,
    entered,
    notify_error,
    plain_button,
)
from normweave.serve.pages.verdict import Result
from normweave.serve.pages.viewer import Viewer
from normweave.serve.records import Bucket, Filter, Inspection
from normweave.serve.store import Store
from normweave.serve.templating import render_macro
from normweave.types import Outcome

TEMPLATE = "history.html"
ROWS = 25
"""Rows of one page of the table."""
CSV_ROWS = 200
"""Rows that are written at a time."""
REFRESH_SECONDS = 15.0
"""Interval between two reads of the newest inspections."""
ANY = ""
SPANS = {
    "1": "last 24 hours",
    "7": "last 7 days",
    "30": "last 30 days",
    "90": "last 90 days",
    ANY: "everything",
}
BUCKETS: dict[Bucket, str] = {"hour": "by the hour", "day": "by the day", "week": "by the week"}
VERDICTS = {ANY: "any verdict"} | {result.value: result.word for result in Result}
SOURCES = {ANY: "any source", "page": "this page", "folder": "watched folder", "api": "other programs"}
SOURCES |= {"camera": "cameras", "video": "video files", "mqtt": "MQTT messages", "http": "addresses"}
REVIEWS = {
    ANY: "all",
    "none": "not reviewed",
    "any": "reviewed",
    "accept": "accepted",
    "reject": "rejected",
}
CHOICES: dict[str, Mapping[str, str] | None] = {
    "days": SPANS,
    "product": None,
    "verdict": VERDICTS,
    "source": SOURCES,
    "review": REVIEWS,
    "name": None,
}
"""The fields of the filter with their allowed values; None: any text."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def filter_of(given: Mapping[str, str]) -> Filter:
    """Return the filter for the choices of the page or for the query of the export.

    Raises:
        ValueError: a value is not allowed.
    """
    chosen = {name: given.get(name, ANY) for name in CHOICES}
    for name, allowed in CHOICES.items():
        if allowed is not None and chosen[name] not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, allowed))}, got {chosen[name]!r}. "
                "Choose on the History page and use its Export."
            )
    category, _, subclass = chosen["product"].partition("\n")
    review, result = chosen["review"], chosen["verdict"]
    return Filter(
        since=datetime.now(UTC) - timedelta(days=int(chosen["days"])) if chosen["days"] else None,
        verdicts=() if result in (ANY, "unreadable") else (result,),  # type: ignore[arg-type]  # checked above
        unreadable=True if result == "unreadable" else None,
        category=category or None,
        subclass=subclass or None,
        name_contains=chosen["name"] or None,
        source=chosen["source"] or None,  # type: ignore[arg-type]  # checked above
        reviewed=None if review in (ANY, "accept", "reject") else review == "any",
        decision=review if review in ("accept", "reject") else None,  # type: ignore[arg-type]  # checked above
    )


class HistoryPage(Page):
    """A chart over time and a table of the stored inspections."""

    path = "/history"
    title = "History"
    purpose = "All inspections and their reviews. Times are those of the server."
    position = 4

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        self._chosen = choices_of(ui.context.client.request.query_params)
        self._open: int | None = None

    async def content(self) -> None:
        """Build the chart, the table and the dialog of one inspection."""
        self.heading()
        with ui.element("section").classes("sheet"):
            with ui.element("div").classes("choices"):
                self._select("days", "Time", SPANS)
                products = self._products()
                if self._chosen["product"] not in products:
                    self._chosen["product"] = ANY
                self._select("product", "Product", products)
                self._bucket = ui.select(BUCKETS, value="day", label="Columns", on_change=self._draw)
                self._bucket.props("outlined dense options-dense").classes("choice")
                self._shares = ui.switch("As shares", on_change=self._draw)
            self._chart = ui.html()
        with ui.element("section").classes("sheet"):
            with ui.element("div").classes("choices"):
                self._select("verdict", "Verdict", VERDICTS)
                self._select("source", "Source", SOURCES)
                self._select("review", "Review", REVIEWS)
                name = ui.input("File name contains", value=self._chosen["name"])
                name.props("outlined dense clearable debounce=400")
                name.classes("choice").on_value_change(lambda change: self._choose("name", change.value))
                self._export = ui.link("Export CSV", "/history.csv").classes("plain-button export")
                self._export.props("download")
            self._table = ui.html()
            self._table.on("click", self._show, js_handler=EMIT_ID)
            self._pager = Pager(ROWS, self._list)
        self._dialog = await self._add_dialog()
        await self._update()
        asked = ui.context.client.request.query_params.get("id", "")
        if asked.isdecimal() and await self._fill(int(asked)):
            self._dialog.open()
        ui.timer(REFRESH_SECONDS, self._refresh, immediate=False)

    def _products(self) -> dict[str, str]:
        """Return the products of the bundles that inspect here and of the library; others are under all products."""
        models, detectors = self._service.models, self._service.detectors
        known = [one.record["categories"] for one in (detectors.active, *detectors.views.values())]
        known += [] if models is None else [one.categories for one in models.library.known()]
        return products_of(known)

    def _select(self, name: str, label: str, options: Mapping[str, str]) -> None:
        select = ui.select(dict(options), value=self._chosen[name], label=label)
        select.props("outlined dense options-dense").classes("choice")
        select.on_value_change(lambda change: self._choose(name, change.value))

    async def _choose(self, name: str, value: Any) -> None:
        self._chosen[name] = str(value or ANY)
        self._pager.restart()
        self._show_address()
        await self._update()

    def _show_address(self) -> None:
        """Put the filters and the open inspection into the address of the browser."""
        query = {name: value for name, value in self._chosen.items() if value or name == "days"}
        if self._open is not None:
            query["id"] = str(self._open)
        ui.run_javascript(f"window.history.replaceState(null, '', '{self.path}?{urlencode(query)}')")

    # ── chart and table ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _update(self) -> None:
        query = {name: value for name, value in self._chosen.items() if value}
        self._export.props(f'href="/history.csv?{urlencode(query)}"')
        await self._draw()
        await self._list()

    async def _refresh(self) -> None:
        if self._pager.before is None:
            await self._update()

    async def _draw(self) -> None:
        bucket: Bucket = self._bucket.value
        names = ("days", "product")  # the other choices belong to the table
        period = filter_of({name: self._chosen[name] for name in names})
        if bucket == "hour" and period.since is None:
            period = replace(period, since=datetime.now(UTC) - charts.MOST_COLUMNS * timedelta(hours=1))
        counts = await asyncio.to_thread(self._service.store.counts, period, bucket=bucket)
        self._chart.set_content(charts.over_time(counts, bucket=bucket, shares=bool(self._shares.value)))

    async def _list(self) -> None:
        store, chosen = self._service.store, filter_of(self._chosen)
        before, limit = self._pager.before, self._pager.limit
        found = await asyncio.to_thread(store.inspections, chosen, before=before, limit=limit)
        total = await asyncio.to_thread(store.count, chosen)
        self._table.set_content(table(self._pager.shown(found, total=total)))

    # ── one inspection ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _add_dialog(self) -> ui.dialog:
        with (
            ui.dialog().props('aria-label="Inspection"').on("hide", self._closed) as dialog,
            ui.element("div").classes("sheet one-sheet"),
        ):
            with ui.element("div").classes("list-head"):
                self._title = ui.html()
                with ui.element("div").classes("pager"):
                    self._next = plain_button("Next", self._show_next)
                    plain_button("Close", dialog.close)
            self._banner = ui.html()
            with ui.element("div").classes("seen"):
                self._viewer = Viewer()
                with ui.element("div"):
                    self._details = ui.html()
                    self._reviews = ui.html()
            self._comment = ui.input("Comment (optional)")
            self._comment.props(f"outlined dense maxlength={COMMENT}").classes("comment")
            self._defect = await defect_input(self._service.store)
            with ui.element("div").classes("pager"):
                for decision, word in (("accept", "Accept"), ("reject", "Reject"), ("undo", "Undo")):
                    button = ui.element("button").classes(f"decision small {decision}").props("type=button")
                    button.on("click", partial(self._decide, decision), js_handler=EMIT_SHOWN)
                    with button:
                        ui.label(word)
        return dialog

    async def _show(self, event: GenericEventArguments) -> None:
        if await self._fill(int(event.args)):
            self._dialog.open()

    async def _show_next(self) -> None:
        """Show the next older inspection of the table."""
        store, chosen = self._service.store, filter_of(self._chosen)
        found = await asyncio.to_thread(store.inspections, chosen, before=self._open, limit=1)
        if found:
            await self._fill(found[0].id)
        else:
            self._next.set_enabled(False)

    def _closed(self) -> None:
        self._open = None
        self._show_address()

    async def _fill(self, id: int) -> bool:
        store = self._service.store
        inspection = await asyncio.to_thread(store.inspection, id)
        if inspection is None:
            ui.notify(f"Inspection {id} is not stored, or no longer.", type="warning")
            return False
        reviews = await asyncio.to_thread(store.reviews, id)
        if id != self._open:
            self._comment.set_value("")
            self._defect.set_value("")
        self._open = id
        self._show_address()
        self._next.set_enabled(True)
        self._title.set_content(render_macro(TEMPLATE, "link", id=id, path=self.path))
        self._banner.set_content(verdict.banner(inspection))
        self._viewer.show(inspection)
        self._details.set_content(verdict.details(inspection, self._service.references(inspection)))
        self._reviews.set_content(render_macro(TEMPLATE, "reviews", reviews=reviews))
        return True

    async def _decide(self, decision: Any, event: GenericEventArguments) -> None:
        id = self._open
        if id is None or (decision != "undo" and int(event.args) != id):
            return  # its picture is not shown yet
        try:
            await self._service.review(
                id,
                decision=decision,
                reviewer=self._token.name,
                token=self._token.id,
                comment=entered(self._comment, COMMENT),
                defect=entered(self._defect, DEFECT) if decision == "reject" else "",
            )
        except NormweaveError as error:
            notify_error(error)
            return
        self._comment.set_value("")
        self._defect.set_value("")
        await self._fill(id)
        await self._list()


def products_of(known: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, str]:
    """Return the choices of a product, from the categories of each bundle with their subclasses."""
    products = {ANY: "all products"}
    for categories in known:
        for category, subclasses in categories.items():
            products[category] = category
            products |= {f"{category}\n{subclass}": verdict.product(category, subclass) for subclass in subclasses}
    return products


def choices_of(address: Mapping[str, str]) -> dict[str, str]:
    """Return the choices in the address of the page; those that are missing or not allowed have their first value."""
    chosen = dict.fromkeys(CHOICES, ANY) | {"days": "7"}
    for name, allowed in CHOICES.items():
        value = address.get(name)
        if value is not None and (allowed is None or value in allowed):
            chosen[name] = value
    return chosen


def table(inspections: list[Inspection]) -> str:
    """Return an HTML table of inspections; `data-id` is the id of the inspection that a click opens."""
    rows = [
        (
            inspection,
            verdict.result_of(inspection.outcome),
            verdict.product(inspection.outcome.category, inspection.outcome.subclass),
            verdict.decision_word(inspection),
        )
        for inspection in inspections
    ]
    return render_macro(TEMPLATE, "table", rows=rows)


# ── export ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_OUTCOME = tuple(column.name for column in Outcome.columns() if not column.in_file and column.name != "image_path")
COLUMNS = (
    *("id", "received_at", "name", "source", "actor"),
    *_OUTCOME,
    *("decision", "reviewer", "reviewed_at", "comment", "defect"),
)
"""Columns of the export."""


def csv_lines(store: Store, chosen: Filter) -> Iterator[str]:
    """Yield the text of a CSV file of the chosen inspections, oldest first, in blocks of `CSV_ROWS` rows."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS)
    writer.writeheader()
    for count, inspection in enumerate(store.iter_inspections(chosen), start=1):
        writer.writerow({name: _without_formula(value) for name, value in _csv_row(inspection).items()})
        if count % CSV_ROWS == 0:
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()


def _csv_row(inspection: Inspection) -> dict[str, object]:
    row: dict[str, object] = {name: getattr(inspection, name) for name in ("id", "name", "source", "actor")}
    row |= {name: getattr(inspection.outcome, name) for name in _OUTCOME}
    row["received_at"] = inspection.received_at.isoformat()
    row["experts"] = " ".join(f"{name}={weight:.4f}" for name, weight in inspection.outcome.experts)
    row["boxes"] = len(inspection.outcome.boxes)
    if inspection.review is not None:
        row |= {name: getattr(inspection.review, name) for name in ("decision", "reviewer", "comment", "defect")}
        row["reviewed_at"] = inspection.review.at.isoformat()
    return row


def _without_formula(value: object) -> object:
    """Put an apostrophe before text that a spreadsheet would execute as a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
