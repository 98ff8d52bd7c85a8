"""What is said of an inspection, in words and shapes that the person at the line understands.

HTML as text: everything that came from outside is escaped here, and cleaned once more in the browser.
A verdict is never a colour alone: each has a word and an outline of its own (circle, octagon, diamond, square).
"""

from __future__ import annotations

import math
from datetime import datetime
from html import escape
from typing import Literal

from normweave.serve.records import Inspection, Source
from normweave.types import Outcome

Kind = Literal["normal", "anomalous", "unknown", "unreadable"]
KINDS: tuple[Kind, ...] = ("normal", "anomalous", "unknown", "unreadable")

WORDS: dict[Kind, str] = {
    "normal": "Normal",
    "anomalous": "Anomalous",
    "unknown": "Unknown",
    "unreadable": "Not readable",
}
MEANING: dict[Kind, str] = {
    "normal": "It looks like the good parts.",
    "anomalous": "Something differs from the good parts. Look at the marked places.",
    "unknown": "It is of no kind that the model knows. Judge it yourself.",
    "unreadable": "The image could not be read, so nothing was judged.",
}
DOORS: dict[Source, str] = {
    "page": "on this page",
    "folder": "out of the watched folder",
    "api": "from another program",
}
BORDERLINE = 2.0
"""A normal image is borderline when its p-value lies at or below this many times the false-alarm rate."""
HEARD = 0.005
"""Experts with less weight are not listed."""
LINE_AT = 60.0
"""Where the line stands in the bar of a score, in percent of its width."""

_SHAPES: dict[Kind, str] = {
    "normal": '<circle cx="12" cy="12" r="10"/><path class="mark" d="M7 12.5l3.5 3.5L17 9"/>',
    "anomalous": '<path d="M8 2h8l6 6v8l-6 6H8l-6-6V8z"/><path class="mark" d="M8.5 8.5l7 7M15.5 8.5l-7 7"/>',
    "unknown": (
        '<path d="M12 1l11 11-11 11L1 12z"/>'
        '<path class="mark" d="M9.3 9.8a2.8 2.8 0 1 1 4 2.6c-.9.5-1.3 1-1.3 2M12 17.6v.2"/>'
    ),
    "unreadable": '<rect x="2" y="2" width="20" height="20" rx="3"/><path class="mark" d="M12 6.5v7M12 17.3v.2"/>',
}


def kind_of(outcome: Outcome) -> Kind:
    """The verdict, or that there is none."""
    return "unreadable" if outcome.verdict is None else outcome.verdict


def is_borderline(outcome: Outcome) -> bool:
    """Normal, but not far from the line."""
    return (
        outcome.verdict == "normal"
        and outcome.p_value is not None
        and outcome.false_alarm_rate is not None
        and outcome.p_value <= BORDERLINE * outcome.false_alarm_rate
    )


def icon(kind: Kind) -> str:
    """The outline of a verdict, beside its word."""
    return f'<svg class="icon {kind}" viewBox="0 0 24 24" aria-hidden="true">{_SHAPES[kind]}</svg>'


def tag(kind: Kind) -> str:
    """Outline and word of a verdict, in its colour."""
    return f'<span class="tag {kind}">{icon(kind)}{WORDS[kind]}</span>'


def oddness(p_value: float) -> str:
    """A p-value as a share of good parts: what a person at the line can picture."""
    if p_value >= 0.1:
        return f"About {round(10 * p_value)} in 10 good parts look at least this odd."
    return f"At most 1 in {math.floor(1 / p_value + 1e-9)} good parts looks this odd."


def banner(inspection: Inspection) -> str:
    """The verdict, large, and what it means."""
    outcome = inspection.outcome
    kind = kind_of(outcome)
    meaning = MEANING[kind]
    if outcome.error is not None:
        meaning += f" {outcome.error}"
    if outcome.unseen and kind != "unknown":
        meaning += " It was taken for a kind not seen in training, and judged by the line for those."
    close = ' <span class="close">Close to the line.</span>' if is_borderline(outcome) else ""
    return (
        f'<div class="banner {kind}">{icon(kind)}<div><div class="word">{WORDS[kind]}</div>'
        f'<div class="meaning">{escape(meaning)}{close}</div></div></div>'
    )


def details(inspection: Inspection) -> str:
    """Everything that is known of an inspection: score against line, oddness, kind, experts, origin, review."""
    outcome = inspection.outcome
    facts: list[tuple[str, str]] = []
    if outcome.pred_score is not None and outcome.threshold is not None:
        facts.append(("Score", _score(outcome.pred_score, outcome.threshold)))
    if outcome.p_value is not None:
        facts.append(
            ("How odd", f"{escape(oddness(outcome.p_value))} <small>p = {outcome.p_value:.3g}</small>")
        )
    if outcome.false_alarm_rate is not None:
        facts.append(("Promise", f"at most {percent(outcome.false_alarm_rate)} of good parts are stopped"))
    if outcome.category is not None:
        facts.append(("Looks like", escape(joined(outcome.category, outcome.subclass))))
    if experts := [expert for expert in outcome.experts if expert[1] >= HEARD]:
        facts.append(("Experts", "".join(_expert(*expert) for expert in experts)))
    if outcome.verdict is not None:
        unseen = "yes, judged by the line for kinds not seen in training" if outcome.unseen else "no"
        facts.append(("Unseen kind", unseen))
        adapted = "yes, its look was brought nearer to the known kinds first" if outcome.adapted else "no"
        facts.append(("Adapted", adapted))
    if outcome.height is not None and outcome.width is not None:
        facts.append(("Image", f"{outcome.width} × {outcome.height} pixels"))
    came = f"{local(inspection.received_at)}, {DOORS[inspection.source]}"
    if inspection.source != "folder":
        came += f", by {escape(inspection.actor)}"
    if outcome.latency_ms is not None:
        came += f", judged in {outcome.latency_ms:.0f} ms"
    facts.append(("Came in", came))
    facts.append(("Review", _review(inspection)))
    items = "".join(f"<dt>{name}</dt><dd>{told}</dd>" for name, told in facts)
    return f'<h2 class="name">{escape(inspection.name)}</h2><dl class="facts">{items}</dl>'


def row(inspection: Inspection, *, shown: bool) -> str:
    """A line of a list; `data-id` says which inspection a click on it means."""
    kind = kind_of(inspection.outcome)
    picture = '<span class="thumb"></span>'
    if inspection.image is not None:
        address = f"/v1/inspections/{inspection.id}/image?format=png&amp;max_side=128"
        picture = f'<img class="thumb" src="{address}" alt="" loading="lazy" decoding="async">'
    return (
        f'<li><button type="button" data-id="{inspection.id}" aria-current="{"true" if shown else "false"}">'
        f'{picture}<span class="what"><span class="file">{escape(inspection.name)}</span>'
        f'<span class="soft">{inspection.received_at.astimezone():%H:%M:%S} · {_kind_told(inspection.outcome)}</span>'
        f"</span>{tag(kind)}{_decided(inspection)}</button></li>"
    )


def decision_word(inspection: Inspection) -> str:
    """What a person said of the part."""
    if inspection.review is None:
        return ""
    return "accepted" if inspection.review.decision == "accept" else "rejected"


def joined(category: str | None, subclass: str | None) -> str:
    """Category and subclass in one word; a name that holds its category already is left as it is."""
    if category is None:
        return "–"
    if subclass is None or subclass == category:
        return category
    return subclass if subclass.startswith(f"{category}/") else f"{category}/{subclass}"


def local(moment: datetime) -> str:
    """A moment by the clock of this machine."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


def percent(share: float) -> str:
    """A share, short."""
    return f"{100 * share:.3g}\u00a0%"


def _kind_told(outcome: Outcome) -> str:
    return "" if outcome.category is None else escape(joined(outcome.category, outcome.subclass))


def _decided(inspection: Inspection) -> str:
    word = decision_word(inspection)
    return f'<span class="decided">{word}</span>' if word else ""


def _score(score: float, threshold: float) -> str:
    """A bar from the lowest score that can matter to the score, and the line across it."""
    low = min(0.0, score, threshold)
    span = threshold - low
    share = LINE_AT * (score - low) / span if span > 0 else (100.0 if score > threshold else LINE_AT)
    side = "above" if score > threshold else "below"
    return (
        f'{score:.4g}, line at {threshold:.4g}<div class="bar" role="img" '
        f'aria-label="score {score:.4g}, the line is at {threshold:.4g}">'
        f'<span class="fill {side}" style="width:{min(max(share, 1.0), 100.0):.1f}%"></span>'
        f'<span class="at" style="left:{LINE_AT:g}%"></span></div>'
    )


def _expert(name: str, weight: float) -> str:
    return (
        f'<div class="expert"><span>{escape(name)}</span><span>{percent(weight)}</span><span class="bar">'
        f'<span class="fill plain" style="width:{100 * weight:.1f}%"></span></span></div>'
    )


def _review(inspection: Inspection) -> str:
    review = inspection.review
    if review is None:
        return "nobody has looked at it yet"
    word = "good part" if review.decision == "accept" else "defective part"
    comment = f": “{escape(review.comment)}”" if review.comment else ""
    return f"<b>{word}</b>, said {escape(review.reviewer)} at {local(review.at)}{comment}"
