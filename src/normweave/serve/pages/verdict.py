"""Text and HTML for the result of one inspection."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Self

from normweave.references import References
from normweave.serve.rates import BORDERLINE
from normweave.serve.records import Inspection, Source
from normweave.serve.templating import render_macro
from normweave.types import Outcome

TEMPLATE = "verdict.html"
SOURCES: dict[Source, str] = {
    "page": "uploaded on this page",
    "folder": "from the watched folder",
    "api": "sent by another program",
    "camera": "from a camera",
    "video": "from a video file",
    "mqtt": "from an MQTT message",
    "http": "from an address",
}
SHORT_SOURCES: dict[Source, str] = {
    "page": "uploaded",
    "folder": "watched folder",
    "api": "other program",
    "camera": "camera",
    "video": "video file",
    "mqtt": "MQTT",
    "http": "address",
}
LEAST_WEIGHT = 0.005
"""Products with a smaller weight are not listed."""
MOST_COMPARED = 3
"""Boxes that are shown beside a good image, those with the highest peaks."""
LIMIT_AT = 60.0
"""Position of the limit in the bar of a score, in percent of the width."""


class Result(StrEnum):
    """The verdict on an image, or `unreadable` if there is none.

    Attributes:
        word: the text that an operator reads.
        meaning: a sentence that explains it.
    """

    word: str
    meaning: str

    NORMAL = "normal", "Good", "It looks like the good parts."
    ANOMALOUS = "anomalous", "Defective", "It differs from the good parts. Look at the marked regions."
    UNKNOWN = "unknown", "Unknown product", "The model does not know this product. Decide yourself."
    UNREADABLE = "unreadable", "Not readable", "The image could not be read, so it was not inspected."

    def __new__(cls, value: str, word: str, meaning: str) -> Self:
        """Return a member whose value is the name of the result."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.word, member.meaning = word, meaning
        return member


def result_of(outcome: Outcome) -> Result:
    """Return the result of an outcome."""
    return Result(outcome.verdict or "unreadable")  # type: ignore[call-arg]  # a look-up, which takes the value alone


def is_borderline(outcome: Outcome) -> bool:
    """Return whether an image is good but close to the limit."""
    return (
        outcome.verdict == "normal"
        and outcome.p_value is not None
        and outcome.false_alarm_rate is not None
        and outcome.p_value <= BORDERLINE * outcome.false_alarm_rate
    )


def rarity(p_value: float) -> str:
    """Return a p-value as a share of the good parts."""
    if p_value >= 0.1:
        return f"About {round(10 * p_value)} in 10 good parts score at least this high."
    return f"At most 1 in {math.floor(1 / p_value + 1e-9)} good parts scores this high."


def product(category: str | None, subclass: str | None) -> str:
    """Return category and subclass as one name; a subclass name that starts with the category stays as it is."""
    if category is None:
        return "–"
    if subclass is None or subclass == category:
        return category
    return subclass if subclass.startswith(f"{category}/") else f"{category}/{subclass}"


def decision_word(inspection: Inspection) -> str:
    """Return the decision of the last review; an empty string if there is none."""
    if inspection.review is None:
        return ""
    return "accepted" if inspection.review.decision == "accept" else "rejected"


def banner(inspection: Inspection) -> str:
    """Return the result in large letters with its meaning."""
    outcome = inspection.outcome
    values = {"result": result_of(outcome), "outcome": outcome, "borderline": is_borderline(outcome)}
    return render_macro(TEMPLATE, "banner", **values)


def details(inspection: Inspection, references: References | None = None) -> str:
    """Return all facts of an inspection: boxes beside good images, score, p-value, product, origin, review.

    Args:
        references: the good images that its boxes refer to.
    """
    outcome = inspection.outcome
    scored = outcome.pred_score is not None and outcome.threshold is not None
    return render_macro(
        TEMPLATE,
        "details",
        inspection=inspection,
        outcome=outcome,
        product=product(outcome.category, outcome.subclass),
        source=SOURCES[inspection.source],
        fill=_fill(outcome.pred_score, outcome.threshold) if scored else None,  # type: ignore[arg-type]  # checked
        limit_at=LIMIT_AT,
        rarity=None if outcome.p_value is None else rarity(outcome.p_value),
        compared=[
            (number, box.reference)
            for number, box in enumerate(outcome.boxes)
            if references is not None and inspection.image is not None and references.shows(box)
        ][:MOST_COMPARED],
        weights=[(name, weight) for name, weight in outcome.experts if weight >= LEAST_WEIGHT],
    )


def _fill(score: float, threshold: float) -> float:
    """Return the filled width of the bar of a score in percent, from 1 to 100; the limit is at `LIMIT_AT`."""
    low = min(0.0, score, threshold)
    span = threshold - low
    share = LIMIT_AT * (score - low) / span if span > 0 else (100.0 if score > threshold else LIMIT_AT)
    return min(max(share, 1.0), 100.0)


def row(inspection: Inspection, *, shown: bool) -> str:
    """Return a row of a list; `data-id` is the id of the inspection that a click selects."""
    outcome = inspection.outcome
    return render_macro(
        TEMPLATE,
        "row",
        inspection=inspection,
        result=result_of(outcome),
        product="" if outcome.category is None else product(outcome.category, outcome.subclass),
        source=SHORT_SOURCES[inspection.source],
        decision=decision_word(inspection),
        shown=shown,
    )
