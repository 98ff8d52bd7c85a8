"""Model: the training data, the limits, and the effect of another false-alarm rate."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from nicegui import ui
from numpy.typing import NDArray

from normweave.errors import NormweaveError
from normweave.outcome.operating_point import Calibration
from normweave.serve.pages import charts
from normweave.serve.pages.frame import Page, notify_error
from normweave.serve.pages.verdict import Result, product
from normweave.serve.records import Token
from normweave.serve.service import PREVIEW_IMAGES, InspectionService
from normweave.serve.templating import percent, render_macro
from normweave.serve.watch import Watch
from normweave.validation import DISCRIMINATOR

TEMPLATE = "model.html"
LOWEST, HIGHEST = 1e-4, 0.5
"""Ends of the slider."""
SETTLE_SECONDS = 0.4
"""Pause of the slider after which the stored inspections are classified at the new rate."""
CONNECT_SECONDS = 30.0
"""How long the page waits for the browser before it reads the stored inspections."""
ALL, UNSEEN = "all", "unseen"


class Stored(NamedTuple):
    """Scores of the newest inspections with this bundle."""

    scores: NDArray[np.float64]  # (n,)
    subclasses: NDArray[np.int64]  # (n,) index of the subclass, -1 if the head does not route
    unseen: NDArray[np.bool_]  # (n,)


class ModelPage(Page):
    """The false-alarm rate with a preview of another one, the limits and the training data."""

    path = "/model"
    title = "Model"
    purpose = "The limits of the detector, and what it was trained on."
    position = 3

    def __init__(self, service: InspectionService, token: Token, watch: Watch | None) -> None:
        super().__init__(service, token, watch)
        self._rate = self._calibration.false_alarm_rate
        self._requested = 0  # number of the newest preview; the results of earlier ones are dropped
        self._stored = Stored(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.bool_))

    @property
    def _calibration(self) -> Calibration:
        calibration = self._service.detector.calibration
        assert calibration is not None  # a service has thresholds
        return calibration

    async def content(self) -> None:
        """Build the controls, then read the stored inspections once the browser is connected."""
        self.heading()
        with ui.element("section").classes("sheet"):
            ui.html("<h2>False-alarm rate</h2>")
            ui.html(
                "At most this share of the good parts is rejected by mistake. "
                "A lower rate rejects fewer good parts and misses more defects."
            ).classes("soft")
            self._controls()
            self._effect = ui.html().classes("preview").props('aria-live="polite"')
            with ui.element("div").classes("list-head"):
                ui.html("<h3>Scores and limit</h3>")
                self._group = ui.select(self._groups(), value=ALL, label="Product", on_change=self._draw)
                self._group.props("outlined dense options-dense").classes("choice")
            self._histogram = ui.html()
        self._limits = ui.html().classes("sheet")
        detector = self._service.detector
        if fusion := detector.record.get("notes", {}).get("fusion"):
            ui.html(weights(fusion)).classes("sheet")
        ui.html(training(detector.record, detector.bundle_hash)).classes("sheet")
        self._draw()
        await ui.context.client.connected(CONNECT_SECONDS)
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
        self._role = ui.label().classes("soft")
        # A value that the page sets is reported as a change too: `_move` ignores values that do not differ.
        self._slider.on_value_change(lambda change: self._move(float(f"{10 ** float(change.value):.3g}")))
        self._number.on_value_change(lambda change: self._move((change.value or 0) / 100))

    async def _move(self, rate: float) -> None:
        """Show another rate from the slider or the number, and set the other of the two."""
        if math.isclose(rate, self._rate, rel_tol=0.012):  # the step of the slider
            return
        self._rate = rate
        self._number.set_value(100 * rate)
        if rate > 0:
            self._slider.set_value(min(max(math.log10(rate), math.log10(LOWEST)), math.log10(HIGHEST)))
        self._draw()
        self._requested += 1
        requested = self._requested
        await asyncio.sleep(SETTLE_SECONDS)
        if requested == self._requested:
            await self._preview()

    async def _preview(self) -> None:
        self._requested += 1
        requested = self._requested
        try:
            preview = await self._service.preview_rate(self._rate)
        except NormweaveError as error:
            possible, text = False, render_macro(TEMPLATE, "refused", reason=str(error))
        else:
            rate, results = self._calibration.false_alarm_rate, list(Result)[:3]
            possible = True
            text = render_macro(TEMPLATE, "preview", preview=preview, rate=rate, results=results)
        if requested == self._requested:
            self._effect.set_content(text)
            self._allow(possible=possible)

    def _allow(self, *, possible: bool) -> None:
        engineer = self._token.role == "engineer"
        moved = self._rate != self._calibration.false_alarm_rate
        self._apply.set_enabled(engineer and possible and moved)
        self._apply.set_text(f"Apply {percent(self._rate)}" if moved and possible else "Apply")
        if not engineer:
            self._role.set_text("Only an engineer may apply another rate. You can look at its effect.")

    async def _change(self) -> None:
        if self._token.role != "engineer":
            return  # the button is disabled, but a browser can send the event all the same
        try:
            await self._service.change_rate(self._rate, actor=self._token.name, token=self._token.id)
        except NormweaveError as error:
            notify_error(error)
            return
        ui.notify(f"From now on at most {percent(self._rate)} of good parts are rejected.", type="positive")
        self._draw()
        await self._preview()

    # ── histogram and limits ─────────────────────────────────────────────────────────────────────────────────────────

    def _groups(self) -> dict[str, str]:
        calibration = self._calibration
        groups = {ALL: "All products in training"}
        if calibration.subclasses is not None:
            groups |= {str(k): name for k, name in enumerate(calibration.subclass_names)}
        if calibration.unseen is not None:
            groups[UNSEEN] = "Products not in training"
        return groups

    def _read_stored(self) -> Stored:
        rows = self._service.store.scored_images(self._service.detector.bundle_hash or "", newest=PREVIEW_IMAGES)
        return Stored(
            np.array([row.score for row in rows], dtype=np.float64),
            np.array([-1 if row.routed is None else row.routed for row in rows], dtype=np.int64),
            np.array([row.unseen for row in rows], dtype=np.bool_),
        )

    def _draw(self) -> None:
        calibration, group, stored = self._calibration, str(self._group.value), self._stored
        try:
            moved = calibration.with_rate(self._rate)
        except NormweaveError:  # `_preview` shows the reason
            moved = calibration
        subclass = int(group) if group.isdigit() else None
        if group == UNSEEN and calibration.unseen is not None:
            normals, selected = calibration.unseen.scores, stored.unseen
            limit = calibration.unseen.point().threshold
            new_limit = limit if moved.unseen is None else moved.unseen.point().threshold
        else:
            normals, selected = calibration.scores, ~stored.unseen
            limit, new_limit = calibration.point(subclass).threshold, moved.point(subclass).threshold
            if subclass is not None:
                assert calibration.subclasses is not None  # else the subclass is not in the list
                normals = normals[calibration.subclasses == subclass]
                selected = selected & (stored.subclasses == subclass)
        self._histogram.set_content(
            charts.histogram(
                normals,
                stored.scores[selected],
                limit=limit,
                moved=None if new_limit == limit else new_limit,
            )
        )
        self._limits.set_content(limits(calibration))


def limits(calibration: Calibration) -> str:
    """Return the table of operating points, one row for each product."""
    points = calibration.as_dict()["operating_points"]
    rows = [(_product_of(point), point) for point in points]
    if calibration.unseen is not None:
        rows.append(("products not in training", calibration.unseen.as_dict()["operating_points"][0]))
    return render_macro(TEMPLATE, "limits", rows=rows)


def _product_of(point: Mapping[str, Any]) -> str:
    if point["subclass"] is not None:
        return str(point["subclass"])
    return f"{point['category']}, all products" if point.get("category") else "all products in training"


def weights(fusion: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the weights with which the scores of the experts are added, one row for each category."""
    return render_macro(TEMPLATE, "weights", fusion=fusion)


def training(record: Mapping[str, Any], bundle_hash: str | None) -> str:
    """Return the products and the facts that are recorded in the bundle."""
    products = [
        product(category, subclass)
        for category, subclasses in record["categories"].items()
        for subclass in (subclasses or [None])
    ]
    features, preparation = record["config"]["features"], record["preparation"]
    facts = {
        "Model": record["model"],
        "Backbone": features.get("backbone", features.get(DISCRIMINATOR, "–")),
        "Good parts in training": record["fit_images"],
        "Good parts held out for the limits": record["calibration_images"],
        "Input": f"{preparation['width']} × {preparation['height']} pixels",
        "Seed": record["seed"],
        "Software": " · ".join(f"{name} {version}" for name, version in record["software"].items()),
        "Data fingerprint": record["data_fingerprint"],
        "Bundle": bundle_hash,
    }
    return render_macro(TEMPLATE, "training", products=products, facts=list(facts.items()))
