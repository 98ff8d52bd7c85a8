"""Model: the training data, the limits, and the effect of another false-alarm rate."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from nicegui import ui
from numpy.typing import NDArray

from normweave.detector import Detector
from normweave.errors import CheckError, NormweaveError
from normweave.outcome.operating_point import LOWEST_RATE, Calibration, groups_needed
from normweave.serve.pages import charts
from normweave.serve.pages.frame import Page, Serving, notify_error, plain_button
from normweave.serve.pages.measured import measured
from normweave.serve.pages.verdict import Result, product
from normweave.serve.rates import ReviewRates, measured_rates
from normweave.serve.records import ScoredImage
from normweave.serve.service import PREVIEW_IMAGES
from normweave.serve.templating import percent, render_macro
from normweave.validation import DISCRIMINATOR

TEMPLATE = "model.html"
LOWEST, HIGHEST = 1e-4, 0.5
"""Ends of the slider."""
SETTLE_SECONDS = 0.4
"""Pause of the slider after which the stored inspections are classified at the new rate."""
REFRESH_SECONDS = 2.0
"""Interval between two checks of which bundle is active."""
CONNECT_SECONDS = 30.0
"""How long the page waits for the browser before it reads the stored inspections."""
ALL, UNSEEN = "all", "unseen"


class Stored(NamedTuple):
    """Scores of the newest inspections with this bundle that a limit was applied to."""

    scores: NDArray[np.float64]  # (n,)
    limits: NDArray[np.float64]  # (n,) the limit of each
    subclasses: NDArray[np.int64]  # (n,) index of the subclass, -1 if the head does not route
    unseen: NDArray[np.bool_]  # (n,)


class ModelPage(Page):
    """The false-alarm rate with a preview of another one, the limits and the training data."""

    path = "/model"
    title = "Model"
    purpose = "The limits of the detector, and what it was trained on."
    position = 3

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        self._rate = self._calibration.false_alarm_rate
        self._proposed: float | None = None
        self._requested = 0  # number of the newest preview; the results of earlier ones are dropped
        self._stored = decided(self._calibration, [])
        self._bundle_hash = self._service.detector.bundle_hash

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
        with ui.element("section").classes("sheet"):
            ui.html("<h2>Measured by reviews</h2>")
            ui.html(
                "How many defective parts are found and good ones rejected, by the decisions of reviewers."
            ).classes("soft")
            with ui.element("div").classes("choices"):
                self._measure = plain_button("Measure", self._show_measured)
                self._show_proposed = plain_button("", self._look_at_proposed)
                self._show_proposed.set_visibility(False)
            self._measured = ui.html().classes("measured").props('aria-live="polite"')
        self._limits = ui.html().classes("sheet")
        detector = self._service.detector
        if fusion := detector.record.get("notes", {}).get("fusion"):
            ui.html(weights(fusion)).classes("sheet")
        crossed = self._calibration.cross_validated
        ui.html(training(detector.record, detector.bundle_hash, cross_validated=crossed)).classes("sheet")
        if views := self._service.detectors.views:
            ui.html(views_with_bundles(views)).classes("sheet")
        self._draw()
        ui.timer(REFRESH_SECONDS, self._reload, immediate=False)
        await ui.context.client.connected(CONNECT_SECONDS)
        self._stored = await asyncio.to_thread(self._read_stored)
        self._draw()
        await self._preview()

    def _reload(self) -> None:
        """Load the page again after another bundle was promoted."""
        if self._service.detector.bundle_hash != self._bundle_hash:
            ui.navigate.reload()

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
        # A value that the page sets is reported as a change too, and a rate beyond the slider sets it to its end.
        self._slider.on_value_change(lambda change: self._slide(10 ** float(change.value)))
        self._number.on_value_change(lambda change: self._move((change.value or 0) / 100))

    async def _slide(self, rate: float) -> None:
        if not math.isclose(rate, _on_slider(self._rate), rel_tol=0.012):  # the step of the slider
            await self._move(float(f"{rate:.3g}"))

    async def _move(self, rate: float) -> None:
        """Show another rate from the slider or the number, and set the other of the two."""
        if math.isclose(rate, self._rate, rel_tol=1e-9):
            return
        self._rate = rate
        self._number.set_value(100 * rate)
        self._slider.set_value(math.log10(_on_slider(rate)))
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
            possible, text = (
                False,
                render_macro(TEMPLATE, "refused", reason=refusal(error, self._rate, self._calibration)),
            )
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
        if self._service.detector.bundle_hash != self._bundle_hash:
            return  # the rate was chosen for another bundle; `_reload` shows the new one
        try:
            await self._service.change_rate(self._rate, actor=self._token.name, token=self._token.id)
        except NormweaveError as error:
            notify_error(refusal(error, self._rate, self._calibration))
            return
        ui.notify(f"From now on at most {percent(self._rate)} of good parts are rejected.", type="positive")
        self._stored = await asyncio.to_thread(self._read_stored)
        self._draw()
        await self._preview()

    # ── the reviews ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _show_measured(self) -> None:
        self._measure.disable()
        try:
            rates = await asyncio.to_thread(self._read_measured)
        except NormweaveError as error:
            notify_error(str(error))
            return
        finally:
            self._measure.enable()
        self._proposed = rates.proposed
        self._measured.set_content(measured(rates))
        differs = rates.proposed is not None and rates.proposed != rates.present
        self._show_proposed.set_text(f"Look at {percent(rates.proposed)}" if rates.proposed is not None else "")
        self._show_proposed.set_visibility(differs)

    def _read_measured(self) -> ReviewRates:
        bundle_hash = self._service.detector.bundle_hash or ""
        return measured_rates(self._service.store, bundle_hash, calibration=self._calibration)

    async def _look_at_proposed(self) -> None:
        if self._proposed is not None:
            await self._move(self._proposed)

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
        bundle_hash = self._service.detector.bundle_hash or ""
        return decided(self._calibration, self._service.store.scored_images(bundle_hash, newest=PREVIEW_IMAGES))

    def _draw(self) -> None:
        calibration = self._calibration
        try:
            moved = calibration.with_rate(self._rate)
        except NormweaveError:  # `_preview` shows the reason
            moved = calibration
        self._histogram.set_content(score_chart(calibration, moved, self._stored, str(self._group.value)))
        self._limits.set_content(limits(calibration, self._service.detector.subclass_names))


def decided(calibration: Calibration, images: Sequence[ScoredImage]) -> Stored:
    """Return the images that the calibration compares with a limit; not those of unknown products."""
    rows = []
    for one in images:
        decision = calibration.decide(score=one.score, distance=one.distance, subclass=one.routed)
        if decision.verdict != "unknown":
            subclass = -1 if one.routed is None else one.routed
            rows.append((one.score, decision.threshold, subclass, decision.unseen))
    scores, thresholds, subclasses, unseen = zip(*rows, strict=True) if rows else ((),) * 4
    return Stored(
        np.array(scores, dtype=np.float64),
        np.array(thresholds, dtype=np.float64),
        np.array(subclasses, dtype=np.int64),
        np.array(unseen, dtype=np.bool_),
    )


def score_chart(calibration: Calibration, moved: Calibration, stored: Stored, group: str) -> str:
    """Return the histogram of a group of products.

    If they have several limits, it shows how far each score is from its own limit.

    Args:
        moved: with the limits of another rate.
        group: ALL, UNSEEN, or the index of a subclass.
    """
    normals, own = _held_out(calibration, group)
    _, new = _held_out(moved, group)
    subclass = int(group) if group.isdigit() else None
    chosen = (stored.unseen if group == UNSEEN else ~stored.unseen) & (
        subclass is None or stored.subclasses == subclass
    )
    scores, their = stored.scores[chosen], stored.limits[chosen]
    texts = _span(own), None if np.array_equal(own, new) else _span(new)
    if len(np.unique(np.concatenate([own, their]))) > 1:
        return charts.histogram(normals - own, scores - their, limit=0.0, moved=None, relative=True, limits=texts)
    single = len(np.unique(new)) == 1 and new[0] != own[0]
    return charts.histogram(normals, scores, limit=float(own[0]), moved=float(new[0]) if single else None, limits=texts)


def _span(limits: NDArray[np.float64]) -> str:
    low, high = float(limits.min()), float(limits.max())
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, by product"


def _held_out(calibration: Calibration, group: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the scores of the held-out good parts of a group, (n,), and the limit of each, (n,)."""
    if group == UNSEEN and calibration.unseen is not None:
        unseen = calibration.unseen
        points = unseen.as_dict()["operating_points"]
        shared = {point.get("category"): point["threshold"] for point in points if point["subclass"] is None}
        limits = np.full(len(unseen.scores), shared[None])
        if unseen.subclasses is not None and unseen.subclass_categories:  # an image of a new product: of its category
            names = [unseen.subclass_categories[k] for k in unseen.subclasses]
            limits = np.array([shared.get(name, shared[None]) for name in names])
        return unseen.scores, limits
    if calibration.subclasses is None:
        return calibration.scores, np.full(len(calibration.scores), calibration.point().threshold)
    own = np.array([calibration.point(k).threshold for k in range(len(calibration.subclass_names))])
    members = calibration.subclasses == int(group) if group.isdigit() else np.ones(len(calibration.scores), np.bool_)
    return calibration.scores[members], own[calibration.subclasses[members]]


def refusal(error: NormweaveError, rate: float, calibration: Calibration) -> str:
    """Return why a rate cannot be used, in the terms of the page."""
    if not LOWEST_RATE <= rate < 1:
        return f"The rate must be above 0\u00a0% and below 100\u00a0%, and is {percent(rate)}."
    groups, needed = calibration.independent_groups, groups_needed(rate)
    if not isinstance(error, CheckError):
        return str(error)
    return (
        f"A rate of {percent(rate)} needs at least {needed:,} independent groups of good parts held out in training; "
        f"this model has {groups:,}. Its lowest possible rate is {percent(1 / (groups + 1))}. For a lower one, train "
        "or calibrate with more good parts."
    )


def _on_slider(rate: float) -> float:
    return min(max(rate, LOWEST), HIGHEST)


def limits(calibration: Calibration, names: Sequence[str] = ()) -> str:
    """Return the table of operating points, one row for each product.

    Args:
        names: of all subclasses, those that were added last.
    """
    points = calibration.table(names)
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


def views_with_bundles(views: Mapping[str, Detector]) -> str:
    """Return the views of parts that have bundles of their own."""
    rows = []
    for view, detector in sorted(views.items()):
        assert detector.calibration is not None  # a bundle without operating points is not loaded
        products = [product(*each) for each in detector.subclasses.values()] or list(detector.record["categories"])
        rows.append((view, products, detector.calibration.false_alarm_rate, detector.bundle_hash))
    return render_macro(TEMPLATE, "views", rows=rows)


def training(record: Mapping[str, Any], bundle_hash: str | None, *, cross_validated: bool) -> str:
    """Return the products and the facts that are recorded in the bundle.

    Args:
        cross_validated: whether the parts in training also gave the limits.
    """
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
        "Good parts held out for the limits": "the same, by cross-validation"
        if cross_validated
        else record["calibration_images"],
        "Input": f"{preparation['width']} × {preparation['height']} pixels",
        "Seed": record["seed"],
        "Software": " · ".join(f"{name} {version}" for name, version in record["software"].items()),
        "Data fingerprint": record["data_fingerprint"],
        "Bundle": bundle_hash,
    }
    return render_macro(TEMPLATE, "training", products=products, facts=list(facts.items()))
