"""Detection rate and false-alarm rate measured by reviewer decisions, with intervals.

Reviewers see mostly what was reported, so that missed defects are rare among the reviewed images. Therefore images are
divided into strata by what the reviewer saw (the verdict, and whether a good one is close to the limit), and by whether
the operating point that is measured reports them. In each stratum the reviewed images are taken as a random sample: of
N images, n are reviewed, and y of these are defective, so that N·y/n are expected to be (Horvitz and Thompson 1952, "A
generalization of sampling without replacement from a finite universe"). The detection rate is the expected number of
reported defective images divided by that of all defective images.

Intervals: the share of defective images of each of K strata, and the share of images that are reported, have exact
binomial intervals (Clopper and Pearson 1934) at the level 1 − (1 − level)/(K + 1), so that all hold together
(Bonferroni). If at most a share e of the decisions is wrong, a true share p gives an expected share q of decisions with
(1 − e)·p ≤ q ≤ (1 − e)·p + e, so that the interval [q₁, q₂] of q becomes [(q₁ − e)/(1 − e), q₂/(1 − e)]. The rate
increases with the shares of strata that are reported, and with the share that is reported, and decreases with the
others, so that its interval has its ends at theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from normweave.errors import ConfigError, DataError
from normweave.types import Label

WRONG_REVIEWS = 0.05
"""Default of the largest share of wrong decisions."""
LEVEL = 0.95
"""Default level of the intervals."""
Shown = Literal["normal", "borderline", "anomalous", "unknown"]
"""What the reviewer saw: the verdict; borderline: normal, but close to the limit, as the page Review lists it."""
_PASSED: tuple[Shown, ...] = ("normal", "borderline")
_BISECTIONS = 60


class JudgedImage(NamedTuple):
    """An image with its verdict, and its review if it has one. Images of one part are one `JudgedImage`."""

    shown: Shown
    """Reviews are sampled by it."""
    reported: bool
    """Whether the image is anomalous or unknown at the operating point that is measured."""
    label: Label | None = None
    """Decision of the last review; None: not reviewed."""
    subclass: str = ""
    """`category/subclass` that it was routed to."""
    defect: str = ""
    """Name that the reviewer gave to the defect; empty: none."""


class Rate(NamedTuple):
    """A measured rate with its interval, all in [0, 1]."""

    estimate: float | None
    """As if every decision were right; None: it cannot be measured."""
    low: float
    high: float
    """Ends of the interval; they hold also without an estimate."""
    reviewed: int
    """Number of reviewed images that are of this class: defective ones, or good ones."""
    reason: str | None = None
    """Why it cannot be measured."""


class Stratum(NamedTuple):
    """How many images were shown so, and how many of them were reviewed."""

    shown: Shown
    images: int
    reviewed: int
    defective: int
    """Number of reviewed images that are defective."""


@dataclass(frozen=True, kw_only=True)
class MeasuredRates:
    """What reviews show about an operating point."""

    detection: Rate
    """Share of the defective images that are reported."""
    false_alarms: Rate
    """Share of the good images that are reported."""
    strata: tuple[Stratum, ...]
    detection_by_subclass: dict[str, Rate]
    """Of the subclasses with a defective reviewed image."""
    detection_by_defect: dict[str, Rate]
    """Of the names of defects that reviewers gave."""
    false_alarms_by_subclass: dict[str, Rate]
    """Of the subclasses with a good reviewed image."""
    wrong_reviews: float
    level: float


class _Cell(NamedTuple):
    """Images that were shown alike, and that are reported, or not."""

    reported: bool
    images: int
    reviewed: int
    hits: int  # of the reviewed images, those of the class
    share: float | None  # of the class among the reviewed images; None: unknown


def measure(
    images: Sequence[JudgedImage], *, wrong_reviews: float = WRONG_REVIEWS, level: float = LEVEL
) -> MeasuredRates:
    """Return the detection rate and the false-alarm rate of the operating point that gave `reported`.

    Args:
        images: all images of a period or a bundle, not only the reviewed ones.
        wrong_reviews: largest share of wrong decisions, in [0, 0.5).
        level: of the intervals, in (0, 1).

    Raises:
        ConfigError: a share is out of range.
    """
    check_wrong_reviews(wrong_reviews)
    if not 0 < level < 1:
        raise ConfigError(f"The level of an interval must be in (0, 1), got {level}.")

    def rate(chosen: Iterable[JudgedImage], label: Label, belongs: Callable[[JudgedImage], bool] | None = None) -> Rate:
        return _rate(list(chosen), label, belongs, wrong_reviews, level)

    def by_subclass(label: Label) -> dict[str, Rate]:
        names = sorted({image.subclass for image in images if image.label == label and image.subclass})
        return {name: rate((image for image in images if image.subclass == name), label) for name in names}

    defects = sorted({image.defect for image in images if image.label == "anomalous" and image.defect})
    return MeasuredRates(
        detection=rate(images, "anomalous"),
        false_alarms=rate(images, "normal"),
        strata=_strata(images),
        detection_by_subclass=by_subclass("anomalous"),
        detection_by_defect={
            name: rate(images, "anomalous", lambda image, name=name: image.defect == name)  # type: ignore[misc]
            for name in defects
        },
        false_alarms_by_subclass=by_subclass("normal"),
        wrong_reviews=wrong_reviews,
        level=level,
    )


def check_wrong_reviews(share: float) -> None:
    """Check a largest share of wrong decisions.

    Raises:
        ConfigError: it is out of range.
    """
    if not 0 <= share < 0.5:
        raise ConfigError(f"The share of wrong reviews must be in [0, 0.5), got {share}.")


def exact_interval(successes: int, trials: int, *, level: float) -> tuple[float, float]:
    """Return the confidence interval of a rate of k in n trials (Clopper and Pearson 1934); without trials (0, 1).

    The bounds are those rates at which k or more, and k or fewer, successes have the probability (1 − level)/2.

    Raises:
        DataError: not 0 <= k <= n.
    """
    if not 0 <= successes <= trials:
        raise DataError(f"An interval needs 0 <= successes <= trials, got {successes} of {trials}.")
    if not trials:
        return 0.0, 1.0
    tail = (1 - level) / 2
    steps = np.arange(trials)
    coefficients = np.append(0.0, np.cumsum(np.log((trials - steps) / (steps + 1))))  # log of n over k, (n + 1,)
    counts = np.arange(trials + 1)

    def solve(part: slice, *, rising: bool) -> float:
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            logs = coefficients[part] + counts[part] * np.log(middle) + (trials - counts[part]) * np.log1p(-middle)
            if (float(np.exp(logs).sum()) < tail) == rising:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    return (
        solve(slice(successes, None), rising=True) if successes else 0.0,
        solve(slice(successes + 1), rising=False) if successes < trials else 1.0,
    )


def _strata(images: Sequence[JudgedImage]) -> tuple[Stratum, ...]:
    counts = Counter((image.shown, image.label) for image in images)
    found = []
    for shown in get_args(Shown):
        good, defective, others = (counts[shown, label] for label in ("normal", "anomalous", None))
        found.append(Stratum(shown, good + defective + others, good + defective, defective))
    return tuple(found)


def _rate(
    images: list[JudgedImage],
    label: Label,
    belongs: Callable[[JudgedImage], bool] | None,
    wrong_reviews: float,
    level: float,
) -> Rate:
    """Return the share of the images of a class that are reported.

    Args:
        belongs: whether an image with the label is of the class; None: all are.
    """
    totals: Counter[tuple[Shown, bool]] = Counter()
    reviewed: Counter[tuple[Shown, bool]] = Counter()
    hits: Counter[tuple[Shown, bool]] = Counter()
    for image in images:
        key = image.shown, image.reported
        totals[key] += 1
        if image.label is not None:
            reviewed[key] += 1
            hits[key] += image.label == label and (belongs is None or belongs(image))
    if not (of_class := sum(hits.values())):
        word = "defective" if label == "anomalous" else "good"
        return Rate(None, 0.0, 1.0, 0, f"No reviewed image is {word}.")
    cells = []
    for key, count in totals.items():
        # A part without a reviewed image has the share of all images that were shown alike.
        alike = [key] if reviewed[key] else [other for other in totals if other[0] == key[0]]
        seen, found = sum(reviewed[other] for other in alike), sum(hits[other] for other in alike)
        cells.append(_Cell(key[1], count, reviewed[key], hits[key], found / seen if seen else None))
    each = 1 - (1 - level) / (len(cells) + 1)
    reported, passed = ([cell for cell in cells if cell.reported == side] for side in (True, False))
    (low, high), (passed_low, passed_high) = (_share(side, wrong_reviews, each) for side in (reported, passed))
    alarms = sum(cell.images for cell in reported)
    fewest, most = exact_interval(alarms, len(images), level=each)
    reason = _not_reviewed(images, label)
    return Rate(
        None if reason else _quotient(_expected(reported), _expected(passed), empty=0.0),
        _quotient(fewest * low, (1 - fewest) * passed_high, empty=0.0),
        _quotient(most * high, (1 - most) * passed_low, empty=1.0),
        of_class,
        reason,
    )


def _not_reviewed(images: Sequence[JudgedImage], label: Label) -> str | None:
    """Return why the images that passed do not show how many of the class are among them; None: they do."""
    for stratum in _strata(images):
        if stratum.shown in _PASSED and stratum.images and not stratum.reviewed:
            close = " and close to the limit" if stratum.shown == "borderline" else ""
            what = "missed defects" if label == "anomalous" else "good images"
            return (
                f"None of the {stratum.images:,} images that are normal{close} is reviewed, so that the number of "
                f"{what} is unknown. Review a random part of them."
            )
    return None


def _expected(cells: Sequence[_Cell]) -> float:
    """Return the expected number of images of the class; cells without a known share are left out."""
    return sum(cell.images * (cell.share or 0.0) for cell in cells)


def _share(cells: Sequence[_Cell], wrong_reviews: float, level: float) -> tuple[float, float]:
    """Return the bounds of the share of the class among the images of some cells; without cells (0, 1)."""
    low = high = 0.0
    for cell in cells:
        first, last = exact_interval(cell.hits, cell.reviewed, level=level)
        low += cell.images * max(0.0, first - wrong_reviews) / (1 - wrong_reviews)
        high += cell.images * min(1.0, last / (1 - wrong_reviews))
    total = sum(cell.images for cell in cells)
    return (low / total, high / total) if total else (0.0, 1.0)


def _quotient(reported: float, passed: float, *, empty: float) -> float:
    """Return the reported share of two numbers of images; `empty` if both are zero."""
    total = reported + passed
    return reported / total if total else empty
