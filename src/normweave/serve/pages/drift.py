"""Drift: what changed on the line since the calibration, since when, why, and pictures of it."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlencode

import numpy as np
from nicegui import ui
from numpy.typing import NDArray

from normweave.drift.causes import Finding
from normweave.drift.evidence import odds
from normweave.drift.monitor import TESTED, Monitor
from normweave.drift.reference import Product
from normweave.serve.pages import verdict
from normweave.serve.pages.frame import Page
from normweave.serve.templating import render_macro

TEMPLATE = "drift.html"
REFRESH_SECONDS = 15.0
"""Time between two looks at the findings."""
WINDOWS = 48
"""Hours of the small charts, the newest."""
REACH = 6.0
"""Standard deviations at the top and the bottom of a small chart."""
WIDE, HIGH = 84, 30
"""Pixels of a small chart."""
FEWEST = 19
"""Independent calibration images of a subclass from which small changes of it can be noticed."""
WORDS = {"map_level": "level of map", "distance": "distance from known"}
"""Names of the statistics for people; others are their own."""


class DriftPage(Page):
    """The findings with pictures, and a table of subclasses and statistics."""

    path = "/drift"
    title = "Drift"
    purpose = "What changed on the line since the calibration, since when, and why."
    position = 5
    engineers_only = True

    async def content(self) -> None:
        """Build the findings and the table."""
        self.heading()
        self._found = ui.html().props('aria-live="polite"')
        with ui.element("section").classes("sheet"):
            self._table = ui.html()
        await self._update()
        ui.timer(REFRESH_SECONDS, self._update, immediate=False)

    async def _update(self) -> None:
        found, monitor = await asyncio.to_thread(self._drift.state)
        self._found.set_content(findings_html(found, monitor, refusal=self._drift.refusal))
        self._table.set_content(table(monitor))


def findings_html(found: list[Finding], monitor: Monitor | None, *, refusal: str | None = None) -> str:
    """Return the findings as HTML, or a sentence that there are none."""
    cards = [
        {
            "finding": one,
            "products": [(verdict.product(*product), history_link(product)) for product in one.products],
            "evidence": None if one.evidence is None else odds(one.evidence),
        }
        for one in found
    ]
    count = 0 if monitor is None else monitor.count
    limit = "" if monitor is None else f"{monitor.limit:,.0f}"
    return render_macro(TEMPLATE, "findings", cards=cards, count=f"{count:,}", limit=limit, refusal=refusal)


def few(monitor: Monitor) -> list[tuple[str, int]]:
    """Return the subclasses with less than `FEWEST` independent calibration images, and how many these are."""
    independent = {
        one.product: len(np.unique(one.reference.groups))
        for one in monitor.watched.values()
        if one.reference is not None
    }
    return [(verdict.product(*product), n) for product, n in independent.items() if n < FEWEST]


def history_link(product: Product) -> str:
    """Return the address of the inspections of a subclass on the page History."""
    return "/history?" + urlencode({"days": "", "product": "\n".join(filter(None, product))})


def table(monitor: Monitor | None) -> str:
    """Return a table with a row for each subclass and a small chart of the windows for each statistic."""
    rows: list[dict[str, Any]] = []
    for watched in () if monitor is None else monitor.subclasses:
        assert monitor is not None
        windows = [(name, of[watched.product]) for name, of in monitor.windows.items() if watched.product in of][
            -WINDOWS:
        ]
        means = np.array([window.sums / window.n for _, window in windows])
        raised = {alarm.statistic for alarm in monitor.alarms if alarm.product in (None, watched.product)}
        rows.append(
            {
                "product": verdict.product(*watched.product),
                "link": history_link(watched.product),
                "count": f"{watched.tests.evidence.count:,}",
                "charts": [
                    {
                        "points": points(means[:, index]),
                        "last": f"{means[-1, index]:+.1f}",
                        "alarm": name in raised,
                        "title": f"{windows[0][0]} to {windows[-1][0]}",
                    }
                    for index, name in enumerate(TESTED)
                ],
            }
        )
    names = [WORDS.get(name, name) for name in TESTED]
    given = {"rows": rows, "names": names, "few": [] if monitor is None else few(monitor)}
    return render_macro(TEMPLATE, "table", **given, wide=WIDE, high=HIGH)


def points(means: NDArray[np.float64]) -> str:
    """Return the points of the line of a small chart; windows from left to right."""
    clipped = np.clip(means, -REACH, REACH)
    x = np.linspace(3, WIDE - 3, len(means)) if len(means) > 1 else np.array([WIDE / 2])
    y = HIGH / 2 - clipped / REACH * (HIGH / 2 - 3)
    return " ".join(f"{across:.1f},{down:.1f}" for across, down in zip(x, y, strict=True))
