"""Section of the page Model: how many defective parts are found, and how many good ones rejected, by the reviews."""

from __future__ import annotations

from normweave.outcome.measured import Shown
from normweave.serve.rates import ReviewRates
from normweave.serve.templating import render_macro

TEMPLATE = "measured.html"
SHOWN: dict[Shown, str] = {
    "normal": "good",
    "borderline": "good, close to the limit",
    "anomalous": "defective",
    "unknown": "unknown product",
}


def measured(rates: ReviewRates) -> str:
    """Return the measured rates with their intervals, and a table of other false-alarm rates, as HTML."""
    return render_macro(TEMPLATE, "measured", found=rates, shown=SHOWN)
