"""Tests over time whose false-alarm rate holds over the whole stream, however long it is and however often one looks.

Each new number is ranked among the calibration images and all images before it (Vovk 2021, "Testing randomness
online", arXiv 1906.09256, section 2): if calibration images and stream are exchangeable, these ranks are independent
and uniform. Ranks among a fixed set are not: a long stream would take its sampling error for a change. A martingale
bets against uniform ranks (Vovk et al. 2021, "Retrain or not retrain", arXiv 2102.10439), and by Ville's inequality it
ever exceeds c with a probability of at most 1 / c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

DIGITS = 4
"""Significant digits that are compared, so that a stream of any length needs bounded memory."""
POWERS = np.array([0.8, 0.5, 0.25, 0.125])
"""Betting functions: κ u^(κ − 1) for low ranks u, and the same of 1 − u for high ones."""
PATIENCE = 100.0
"""After this many images half of the capital has been put on a change."""
MOST_ODDS = 1_000_000_000
"""Largest e-value that is shown as a number."""
_BETS = 2 * len(POWERS)
_MOST = 1e100
"""Largest capital, so that sums stay finite."""
_LEAST = 1e-12
"""Smallest rank that is bet on."""


class Ranks:
    """Values of one statistic, and the rank of each new one among all before it. Memory: the distinct values."""

    def __init__(self) -> None:
        self._values = np.zeros(0)  # ascending
        self._counts = np.zeros(0, dtype=np.int64)
        self._total = 0

    def add(self, value: float, tie: float) -> float:
        """Add a value, and return its rank in (0, 1): the share of smaller values, plus a random part of equal ones.

        Args:
            tie: uniform in (0, 1); the part.
        """
        key = float(f"{value:.{DIGITS}g}")
        place = int(self._values.searchsorted(key))
        smaller = int(self._counts[:place].sum())
        if place < len(self._values) and self._values[place] == key:
            self._counts[place] += 1
        else:
            self._values = np.concatenate([self._values[:place], [key], self._values[place:]])
            self._counts = np.concatenate([self._counts[:place], [1], self._counts[place:]])
        self._total += 1
        return (smaller + tie * int(self._counts[place])) / self._total

    def as_dict(self) -> dict[str, Any]:
        """Return the values and their counts as JSON values."""
        return {"values": self._values.tolist(), "counts": self._counts.tolist()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return what `as_dict` described."""
        ranks = cls()
        ranks._values = np.array(state["values"], dtype=np.float64)
        ranks._counts = np.array(state["counts"], dtype=np.int64)
        ranks._total = int(ranks._counts.sum())
        return ranks


def odds(evidence: float) -> str:
    """Return an e-value for people, with two digits."""
    return f"{float(f'{evidence:.2g}'):,.0f}" if evidence < MOST_ODDS else f"more than {MOST_ODDS:,}"


def bank(t: float) -> float:
    """Return the share of the capital that is not yet put on a change after t images: 1 / (1 + log2(1 + t / 100)).

    The rest was put on a change at each of the images before, so that one betting function after another begins. A
    change at image t costs only a factor of about t · log² t in evidence, and no horizon need be known.
    """
    return 1 / (1 + float(np.log2(1 + t / PATIENCE)))


class Evidence:
    """The e-values of m tests that are fed together.

    Attributes:
        count: number of images.
        start: (m, bets) image at which the evidence of each bet began to rise, from 1 (CUSUM; Page 1954).
    """

    def __init__(self, tests: int) -> None:
        self.count = 0
        self._capital = np.zeros((tests, _BETS))
        self._rise = np.zeros((tests, _BETS))
        self.start = np.ones((tests, _BETS), dtype=np.int64)

    def add(self, ranks: NDArray[np.float64]) -> None:
        """Bet on the ranks (m,) of an image."""
        inside = np.clip(ranks, _LEAST, 1 - _LEAST)[:, None]
        low = (POWERS - 1) * np.log(inside) + np.log(POWERS)
        high = (POWERS - 1) * np.log1p(-inside) + np.log(POWERS)
        gain = np.concatenate([low, high], axis=1)  # (m, bets) logarithms of the factors
        self.count += 1
        released = (bank(self.count - 1) - bank(self.count)) / _BETS
        self._capital = np.minimum((self._capital + released) * np.exp(gain), _MOST)
        fresh = self._rise <= 0
        self.start[fresh] = self.count
        self._rise = np.where(fresh, 0.0, self._rise) + gain

    @property
    def values(self) -> NDArray[np.float64]:
        """(m,) the e-value of each test: the capital from a start of 1."""
        values: NDArray[np.float64] = bank(self.count) + self._capital.sum(axis=1)
        return values

    def best(self, test: int) -> tuple[int, int]:
        """Return since which image the evidence of a test has risen, and the sign of the change: 1 higher, −1 lower."""
        bet = int(self._capital[test].argmax())
        return int(self.start[test, bet]), 1 if bet >= len(POWERS) else -1

    def as_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        arrays = {"capital": self._capital, "rise": self._rise, "start": self.start}
        return {"count": self.count} | {name: array.tolist() for name, array in arrays.items()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return what `as_dict` described."""
        evidence = cls(len(state["capital"]))
        evidence.count = int(state["count"])
        evidence._capital = np.array(state["capital"], dtype=np.float64)
        evidence._rise = np.array(state["rise"], dtype=np.float64)
        evidence.start = np.array(state["start"], dtype=np.int64)
        return evidence
