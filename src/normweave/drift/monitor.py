"""Follow the images of a line: evidence that their statistics have changed since the calibration.

Each image is ranked among those of its own subclass. The ranks are tested for each subclass, and together for the
whole line: a lamp changes the images of all subclasses at once, so that fewer of them are needed.

All tests share one false-alarm rate: each of n tests raises an alarm when its e-value exceeds n / rate. So an unchanged
line ever raises one with at most this probability, as long as the images of a subclass are exchangeable with its
calibration images, one image of each group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave.drift.evidence import Evidence, Ranks
from normweave.drift.reference import COLUMNS, Product, Reference
from normweave.drift.statistics import ImageStatistics

ALARM_RATE = 0.01
"""Probability that an unchanged line ever raises an alarm."""
SEED = 0
"""Of ties between ranks, and of the images that are drawn from groups."""
IMAGE = ImageStatistics._fields
TESTED = (*IMAGE, "map_level", "score", "distance")
"""The statistics whose ranks are tested; `place` is tested beside them."""
PLACE = "place"
CELLS = 8
"""The place of the highest patch score is one of 8 x 8 fields of the image."""
RECENT = 1000
"""Images that are kept to measure a change, the newest."""
FEW = 20
"""Images of a subclass below which their median deviation may be far too small."""
WINDOWS = 400
"""Windows that are kept, the newest."""
FORMAT = 1
_INDEX = [COLUMNS.index(name) for name in TESTED]
_X, _Y = COLUMNS.index("peak_x"), COLUMNS.index("peak_y")
_LEAST_SPREAD = {"brightness": 0.002, "contrast": 0.001, "warmth": 0.003, "tint": 0.003, "sharpness": 0.005}
"""Smallest standard deviation of a statistic: that of rounding and compression."""


class Image(NamedTuple):
    """An image of the line."""

    name: str
    """Path, or id of the inspection."""
    product: Product
    verdict: str
    unseen: bool
    numbers: NDArray[np.float64]
    """(10,) in the order of `reference.COLUMNS`."""
    at: str = ""
    """When it was inspected, for people; empty: not known."""
    window: str = ""
    """The hour, shift, camera or range of images that it belongs to."""
    boxes: tuple[int, ...] = ()
    """Fields of the image, by `cell_at`, in which the middles of its boxes lie."""


class Seen(NamedTuple):
    """What is kept of an image."""

    name: str
    at: str
    number: int
    """Its number on the line, from 1."""
    product: Product
    far: bool
    """It belongs to no known subclass."""
    numbers: tuple[float, ...]
    boxes: tuple[int, ...] = ()


class Alarm(NamedTuple):
    """A test whose e-value has exceeded its limit."""

    product: Product | None
    """None: the whole line."""
    statistic: str
    sign: int
    """1: higher than before, −1: lower."""
    since: int
    """Number on the line of the image with which the change began, by estimate."""
    since_name: str
    since_at: str
    raised: int
    """Number on the line of the image with which the alarm was raised."""
    raised_at: str
    evidence: float
    """The e-value, the highest so far."""


class Tests:
    """The tests of one subclass, or of the whole line."""

    def __init__(self, product: Product | None) -> None:
        self.product = product
        self.evidence = Evidence(len(TESTED))
        self.places = Evidence(CELLS * CELLS)
        self.numbers: deque[int] = deque(maxlen=RECENT)
        """Numbers on the line of the newest images."""
        self.alarms: dict[str, Alarm] = {}

    def add(self, ranks: NDArray[np.float64], places: NDArray[np.float64], number: int) -> None:
        """Bet on the ranks (8,) of the statistics and (fields,) of the place of an image."""
        self.evidence.add(ranks)
        self.places.add(places)
        self.numbers.append(number)

    def raise_alarms(self, seen: Seen, find: Callable[[int], Seen], *, limit: float) -> None:
        """Raise an alarm for each test whose e-value has reached the limit, once.

        Args:
            seen: the newest image.
            find: returns an image by its number on the line, or the oldest one that is kept.
        """
        values = np.append(self.evidence.values, self.places.values.mean())
        for index in np.flatnonzero(values >= limit):
            name = (*TESTED, PLACE)[index]
            if (before := self.alarms.get(name)) is not None:
                self.alarms[name] = before._replace(evidence=max(before.evidence, float(values[index])))
                continue
            place = int(self.places.values.argmax())
            since, sign = self.places.best(place) if name == PLACE else self.evidence.best(int(index))
            back = self.evidence.count - since  # images of this subclass since then
            first = find(self.numbers[-min(back + 1, len(self.numbers))])
            self.alarms[name] = Alarm(
                self.product, name, sign, first.number, first.name, first.at, seen.number, seen.at, float(values[index])
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "evidence": self.evidence.as_dict(),
            "places": self.places.as_dict(),
            "numbers": list(self.numbers),
            "alarms": [list(alarm[1:]) for alarm in self.alarms.values()],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `as_dict` described."""
        self.evidence = Evidence.from_dict(state["evidence"])
        self.places = Evidence.from_dict(state["places"])
        self.numbers.extend(state["numbers"])
        alarms = [Alarm(self.product, *each) for each in state["alarms"]]
        self.alarms = {alarm.statistic: alarm for alarm in alarms}


class Window:
    """The images of one subclass in an hour, a shift, or another window."""

    def __init__(self, *, n: int = 0, not_good: int = 0, far: int = 0, sums: Sequence[float] = (0.0,) * len(TESTED)):
        self.n, self.not_good, self.far = n, not_good, far
        self.sums = np.array(sums, dtype=np.float64)
        """Sum of the distances of each statistic from its median in calibration, in standard deviations, at most 20."""

    def as_dict(self) -> dict[str, Any]:
        """Return the counts and sums as JSON values."""
        return {"n": self.n, "not_good": self.not_good, "far": self.far, "sums": self.sums.tolist()}


class Watched:
    """One subclass: the reference, the ranks of its images, and its tests.

    Args:
        reference: None: it has no calibration images, so its images are compared with those before them only.
    """

    def __init__(self, product: Product, reference: Reference | None, *, seed: int) -> None:
        self.product = product
        self.reference = reference
        self.ranks = [Ranks() for _ in TESTED]
        self.cells = np.zeros(CELLS * CELLS, dtype=np.int64)
        self.tests = Tests(product)
        self._rng = np.random.default_rng(seed)
        self.median, self.spread = np.zeros(len(TESTED)), np.ones(len(TESTED))
        if reference is not None:
            self._begin(reference.one_of_each_group(seed), reference)

    def _begin(self, values: NDArray[np.float64], reference: Reference) -> None:
        self.median, self.spread = scale(reference.values)
        for row in values:
            for column, (name, ranks) in enumerate(zip(TESTED, self.ranks, strict=True)):
                # Scores of a cross-validation are of other heads, so they are not exchangeable with new ones.
                value = row[_INDEX[column]]
                if np.isfinite(value) and (name in IMAGE or not reference.cross_validated):
                    ranks.add(value, 0.5)
            if not reference.cross_validated:
                self.cells[cell_of(row)] += 1

    def standardized(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the distances (8,) from the medians of the calibration images in standard deviations; 0 for NaN."""
        return np.nan_to_num((numbers[_INDEX] - self.median) / self.spread)

    def rank(self, numbers: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the ranks (8,) of the statistics of an image and (fields,) of its place, among all before it."""
        ties = self._rng.random(len(TESTED) + CELLS * CELLS)
        ranks = ties[: len(TESTED)].copy()  # of a statistic that the head does not have
        for column, each in enumerate(self.ranks):
            value = float(numbers[_INDEX[column]])
            if np.isfinite(value):
                ranks[column] = each.add(value, ties[column])
        return ranks, self._place_ranks(cell_of(numbers), ties[len(TESTED) :])

    def _place_ranks(self, cell: int, ties: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the rank (fields,) of "the highest score lies in this field", high if it does."""
        hit = np.zeros(len(self.cells), dtype=bool)
        hit[cell] = True
        self.cells[cell] += 1
        total = self.cells.sum()
        ranks: NDArray[np.float64] = (
            np.where(hit, total - self.cells + ties * self.cells, ties * (total - self.cells)) / total
        )
        return ranks

    def as_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "product": list(self.product),
            "ranks": [ranks.as_dict() for ranks in self.ranks],
            "cells": self.cells.tolist(),
            "tests": self.tests.as_dict(),
            "random": self._rng.bit_generator.state,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `as_dict` described."""
        self.ranks = [Ranks.from_dict(one) for one in state["ranks"]]
        self.cells = np.array(state["cells"], dtype=np.int64)
        self.tests.load(state["tests"])
        self._rng.bit_generator.state = state["random"]


class Monitor:
    """The tests of all subclasses of a bundle.

    Images of subclasses without calibration images are tested together, against the images before them.

    Args:
        references: of the bundle.
        alarm_rate: probability that an unchanged line ever raises an alarm, over all tests.
        seed: of the ties between ranks.
    """

    def __init__(self, references: Sequence[Reference], *, alarm_rate: float = ALARM_RATE, seed: int = SEED) -> None:
        self.alarm_rate = alarm_rate
        self.watched = {
            one.product: Watched(one.product, one, seed=seed + number) for number, one in enumerate(references)
        }
        self._others = Watched((None, None), None, seed=seed + len(references))
        self.line = Tests(None)
        self.recent: deque[Seen] = deque(maxlen=RECENT)
        self.windows: dict[str, dict[Product, Window]] = {}
        self.count = 0

    @property
    def tests(self) -> int:
        """The number of tests that share the false-alarm rate: of each subclass, of the others, and of the line."""
        return (len(self.watched) + 2) * (len(TESTED) + 1)

    @property
    def limit(self) -> float:
        """The e-value at which a test raises an alarm."""
        return self.tests / self.alarm_rate

    @property
    def subclasses(self) -> list[Watched]:
        """All subclasses with images so far."""
        return [one for one in (*self.watched.values(), self._others) if one.tests.evidence.count]

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms so far, those of the whole line first."""
        return [
            alarm for one in (self.line, *(each.tests for each in self.subclasses)) for alarm in one.alarms.values()
        ]

    def of(self, product: Product) -> Watched:
        """Return the subclass of an image; those without calibration images are one."""
        return self.watched.get(product, self._others)

    def add(self, image: Image) -> None:
        """Test one image; images come in the order of their time."""
        watched = self.of(image.product)
        self.count += 1
        far = image.unseen or image.verdict == "unknown"
        numbers = tuple(float(f"{value:.6g}") for value in image.numbers)
        seen = Seen(image.name, image.at, self.count, watched.product, far, numbers, image.boxes)
        self.recent.append(seen)
        ranks, places = watched.rank(image.numbers)
        for tests in (watched.tests, self.line):
            tests.add(ranks, places, self.count)
            tests.raise_alarms(seen, self._find, limit=self.limit)
        self._count(image, watched, far)

    def _find(self, number: int) -> Seen:
        return self.recent[max(0, number - self.recent[0].number)]

    def _count(self, image: Image, watched: Watched, far: bool) -> None:
        window = self.windows.setdefault(image.window, {}).setdefault(watched.product, Window())
        window.n += 1
        window.not_good += image.verdict != "normal"
        window.far += far
        window.sums += np.clip(watched.standardized(image.numbers), -20, 20)
        while len(self.windows) > WINDOWS:
            del self.windows[next(iter(self.windows))]

    def as_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, to continue after a restart."""
        return {
            "format": FORMAT,
            "count": self.count,
            "subclasses": [one.as_dict() for one in (*self.watched.values(), self._others)],
            "line": self.line.as_dict(),
            "recent": [list(seen) for seen in self.recent],
            "windows": [
                [name, [[list(product), window.as_dict()] for product, window in of.items()]]
                for name, of in self.windows.items()
            ],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `as_dict` described, of the same references.

        Raises:
            KeyError, TypeError, ValueError: it is of another version, or of other references.
        """
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}")
        self.count = int(state["count"])
        for one, held in zip((*self.watched.values(), self._others), state["subclasses"], strict=True):
            if tuple(held["product"]) != one.product:
                raise ValueError(f"subclass {held['product']}")
            one.load(held)
        self.line.load(state["line"])
        for name, at, number, product, far, numbers, *boxes in state["recent"]:  # no boxes: an earlier version
            known = tuple(boxes[0]) if boxes else ()
            self.recent.append(Seen(name, at, number, (product[0], product[1]), far, tuple(numbers), known))
        self.windows = {
            name: {(product[0], product[1]): Window(**values) for product, values in of}
            for name, of in state["windows"]
        }


def scale(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return median and robust standard deviation (8,) of each tested statistic of the images (n, 10)."""
    chosen = values[:, _INDEX]
    median = np.median(chosen, axis=0)
    spread = 1.4826 * np.median(np.abs(chosen - median), axis=0)
    if len(chosen) < FEW:
        spread = np.maximum(spread, chosen.std(axis=0))
    least = [_LEAST_SPREAD.get(name, 1e-3 * abs(float(at)) + 1e-9) for name, at in zip(TESTED, median, strict=True)]
    return median, np.maximum(np.nan_to_num(spread, nan=1.0), np.nan_to_num(least, nan=1.0))


def cell_of(numbers: NDArray[np.float64]) -> int:
    """Return the field of the image in which the highest patch score lies."""
    return cell_at(numbers[_X], numbers[_Y])


def cell_at(x: float, y: float) -> int:
    """Return the number of the field at a place (0..1 of width and height), row by row."""
    column, row = (min(max(int(share * CELLS), 0), CELLS - 1) for share in (x, y))
    return row * CELLS + column
