"""Model: what it was trained on, where its lines lie, and what another false-alarm rate would change."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

import numpy as np
from nicegui import ui
from numpy.typing import NDArray

from normweave.errors import NormweaveError
from normweave.outcome.operating_point import Calibration
from normweave.serve.pages import charts
from normweave.serve.pages.frame import frame, heading
from normweave.serve.pages.verdict import joined, percent, tag
from normweave.serve.records import Token
from normweave.serve.service import PREVIEW_IMAGES, InspectionService, RatePreview
from normweave.types import Verdict

LOWEST, HIGHEST = 1e-4, 0.5
"""Ends of the slider."""
SETTLE_SECONDS = 0.4
"""The stored inspections are judged anew once the slider has rested for so long."""
CONNECT_SECONDS = 30.0
"""For the browser to load the page."""
ALL, UNSEEN = "all", "unseen"
VERDICTS: tuple[Verdict, ...] = ("normal", "anomalous", "unknown")


class Stored(NamedTuple):
    """Scores of the newest inspections of this bundle."""

    scores: NDArray[np.float64]  # (n,)
    routed: NDArray[np.int64]  # (n,) index of the subclass, -1 where the head does not route
    unseen: NDArray[np.bool_]  # (n,)


class ModelPage:
    """One browser's view of the model."""

    def __init__(self, service: InspectionService, token: Token) -> None:
        self._service = service
        self._token = token
        self._rate = self._calibration.false_alarm_rate
        self._asked = 0  # the newest preview that was asked for; the answers to others are dropped
        self._stored = Stored(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.bool_))

    @property
    def _calibration(self) -> Calibration:
        calibration = self._service.detector.calibration
        assert calibration is not None  # a service judges, so it has lines
        return calibration

    async def build(self) -> None:
        """Everything on the page."""
        with frame("/model", self._service, self._token):
            heading("Model", "What the detector was made from, and where it draws the line.")
            with ui.element("section").classes("sheet"):
                ui.html("<h2>False-alarm rate</h2>")
                ui.html(
                    "At most this many of the good parts are stopped by mistake. "
                    "A lower rate stops fewer good parts, and lets more defects pass."
                ).classes("soft")
                self._controls()
                self._told = ui.html().classes("preview").props('aria-live="polite"')
                with ui.element("div").classes("list-head"):
                    ui.html("<h3>Scores and the line</h3>")
                    self._group = ui.select(self._groups(), value=ALL, label="Kind", on_change=self._draw)
                    self._group.props("outlined dense options-dense").classes("choice")
                self._histogram = ui.html()
            self._points = ui.html().classes("sheet")
            record = self._service.detector.record
            ui.html(_trained(record, self._service.detector.bundle_hash)).classes("sheet")
        self._draw()
        await ui.context.client.connected(CONNECT_SECONDS)  # the page is there before its numbers are
        self._stored = await asyncio.to_thread(self._read_stored)
        self._draw()
        await self._preview()

    # ── the rate ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _controls(self) -> None:
        with ui.element("div").classes("rate"):
            self._slider = ui.slider(
                min=math.log10(LOWEST), max=math.log10(HIGHEST), step=0.01, value=math.log10(self._rate)
            )
            self._slider.props('aria-label="False-alarm rate, on a logarithmic scale"').classes("rate-slider")
            self._number = ui.number("Rate in percent", value=100 * self._rate, format="%.4g", min=0, max=100)
            self._number.props("outlined dense debounce=300").classes("rate-number")
            self._apply = ui.button("Apply", color=None, on_click=self._change)
            self._apply.props("unelevated no-caps").classes("main-button")
        self._why = ui.label().classes("soft")
        # a value that the page itself sets comes back as a change, too: what does not differ is not moved again
        self._slider.on_value_change(lambda change: self._move(_rounded(10 ** float(change.value))))
        self._number.on_value_change(lambda change: self._move((change.value or 0) / 100))

    async def _move(self, rate: float) -> None:
        """The rate that is looked at, from slider or number; the other one follows."""
        if math.isclose(rate, self._rate, rel_tol=0.012):  # as fine as the slider is
            return
        self._rate = rate
        self._number.set_value(100 * rate)
        if rate > 0:
            self._slider.set_value(min(max(math.log10(rate), math.log10(LOWEST)), math.log10(HIGHEST)))
        self._draw()
        self._asked += 1
        asked = self._asked
        await asyncio.sleep(SETTLE_SECONDS)
        if asked == self._asked:
            await self._preview()

    async def _preview(self) -> None:
        self._asked += 1
        asked, rate = self._asked, self._rate
        try:
            preview = await self._service.preview_rate(rate)
        except NormweaveError as error:
            if asked == self._asked:
                self._told.set_content(f'<p class="refused"><b>Not possible.</b> {escape(str(error))}</p>')
                self._allow(possible=False)
            return
        if asked == self._asked:
            self._told.set_content(_previewed(preview, self._calibration.false_alarm_rate))
            self._allow(possible=True)

    def _allow(self, *, possible: bool) -> None:
        engineer = self._token.role == "engineer"
        moved = self._rate != self._calibration.false_alarm_rate
        self._apply.set_enabled(engineer and possible and moved)
        self._apply.set_text(f"Apply {percent(self._rate)}" if moved and possible else "Apply")
        if not engineer:
            self._why.set_text("Only an engineer may apply another rate. You can look at what it would do.")

    async def _change(self) -> None:
        if self._token.role != "engineer":
            return  # its button is disabled; a browser may press it all the same
        try:
            await self._service.change_rate(self._rate, actor=self._token.name)
        except NormweaveError as error:
            ui.notify(str(error), type="negative", multi_line=True, close_button="Close")
            return
        ui.notify(f"From now on at most {percent(self._rate)} of good parts are stopped.", type="positive")
        self._draw()
        await self._preview()

    # ── the picture ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _groups(self) -> dict[str, str]:
        calibration = self._calibration
        groups = {ALL: "All known kinds"}
        if calibration.subclasses is not None:
            groups |= {str(k): name for k, name in enumerate(calibration.subclass_names)}
        if calibration.unseen is not None:
            groups[UNSEEN] = "Kinds not seen in training"
        return groups

    def _read_stored(self) -> Stored:
        rows = self._service.store.scored_images(
            self._service.detector.bundle_hash or "", newest=PREVIEW_IMAGES
        )
        return Stored(
            np.array([one.score for one in rows], dtype=np.float64),
            np.array([-1 if one.routed is None else one.routed for one in rows], dtype=np.int64),
            np.array([one.unseen for one in rows], dtype=np.bool_),
        )

    def _draw(self) -> None:
        calibration, group, stored = self._calibration, str(self._group.value), self._stored
        try:
            moved = calibration.with_rate(self._rate)
        except NormweaveError:  # what `_preview` tells
            moved = calibration
        subclass = int(group) if group.isdigit() else None
        if group == UNSEEN and calibration.unseen is not None:
            normals, mine = calibration.unseen.scores, stored.unseen
            line = calibration.unseen.point().threshold
            new_line = moved.unseen.point().threshold if moved.unseen is not None else line
        else:
            normals, mine = calibration.scores, ~stored.unseen
            line, new_line = calibration.point(subclass).threshold, moved.point(subclass).threshold
            if subclass is not None:
                assert calibration.subclasses is not None  # or it could not be chosen
                normals, mine = (
                    normals[calibration.subclasses == subclass],
                    mine & (stored.routed == subclass),
                )
        self._histogram.set_content(
            charts.histogram(
                normals,
                stored.scores[mine],
                line=line,
                moved=None if new_line == line else new_line,
                upper="held-out good parts",
                lower="stored inspections",
            )
        )
        self._points.set_content(_operating_points(calibration))


def _rounded(rate: float) -> float:
    """Three digits, as the slider is no finer."""
    return float(f"{rate:.3g}")


def _previewed(preview: RatePreview, rate: float) -> str:
    """What another rate would have said of what was inspected."""
    if not preview.n:
        return (
            '<p class="soft">Nothing was inspected with this bundle yet, so there is nothing to compare.</p>'
        )
    if preview.false_alarm_rate == rate and not preview.changed:
        head = f"All {preview.n:,} stored inspections were judged at this rate."
    else:
        head = (
            f"<b>{preview.changed:,} of {preview.n:,}</b> stored inspections would get another verdict "
            f"at {percent(preview.false_alarm_rate)}."
        )
    rows = "".join(
        f"<tr><th scope=row>{tag(verdict)}</th><td>{preview.now.get(verdict, 0):,}</td>"
        f"<td>{preview.then.get(verdict, 0):,}</td>"
        f"<td>{preview.then.get(verdict, 0) - preview.now.get(verdict, 0):+,}</td></tr>"
        for verdict in VERDICTS
    )
    return (
        f"<p>{head}</p><table class=narrow><thead><tr><th>Verdict</th><th>as judged</th><th>at this rate</th>"
        f"<th>change</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _operating_points(calibration: Calibration) -> str:
    """The lines, one row a subclass."""

    def rows(points: list[dict[str, Any]], whose: str) -> str:
        return "".join(
            f'<tr><th scope="row">{escape(_whose(point, whose))}</th><td class="rare">{point["normals"]}</td>'
            f"<td>{point['threshold']:.4g}</td><td>{point['drawn_from']}"
            f"{' <small>together</small>' if point['pooled'] else ''}</td>"
            f'<td class="rare">{_beyond(point)}</td></tr>'
            for point in points
        )

    body = rows(calibration.as_dict()["operating_points"], "all known kinds")
    if calibration.unseen is not None:
        everyone = calibration.unseen.as_dict()["operating_points"][:1]
        body += rows(everyone, "kinds not seen in training")
    return (
        "<h2>Operating points</h2><p class=soft>Above its line an image is anomalous; farther from every known kind "
        "than the last number, it is unknown. A kind with too few held-out good parts shares a line.</p>"
        f'<div class="scroll"><table><thead><tr><th class="text">Kind</th><th class="rare">held-out good parts</th>'
        f'<th>line</th><th>drawn from</th><th class="rare">unknown beyond</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _beyond(point: Mapping[str, Any]) -> str:
    return "–" if point["unknown_beyond"] is None else f"{point['unknown_beyond']:.4g}"


def _whose(point: Mapping[str, Any], whose: str) -> str:
    if point["subclass"] is not None:
        return str(point["subclass"])
    return f"{point['category']}, all kinds" if point.get("category") else whose


def _trained(record: Mapping[str, Any], bundle_hash: str | None) -> str:
    """What the bundle says of itself."""
    kinds = "".join(
        f'<span class="tag plain">{escape(joined(category, subclass))}</span>'
        for category, subclasses in record["categories"].items()
        for subclass in (subclasses or [None])
    )
    software = " · ".join(f"{name} {version}" for name, version in record["software"].items())
    facts = (
        ("Model", record["model"]),
        (
            "Backbone",
            record["config"]["features"].get("backbone", record["config"]["features"].get("kind", "–")),
        ),
        ("Good parts that taught it", record["fit_images"]),
        ("Good parts held out for the line", record["calibration_images"]),
        ("Input", f"{record['preparation']['width']} × {record['preparation']['height']} pixels"),
        ("Seed", record["seed"]),
        ("Software", software),
        ("Data fingerprint", record["data_fingerprint"]),
        ("Bundle", bundle_hash),
    )
    items = "".join(f"<dt>{name}</dt><dd>{escape(str(told))}</dd>" for name, told in facts)
    return (
        f'<h2>What it was made from</h2><div class="kinds">{kinds}</div><dl class="facts wide">{items}</dl>'
    )
