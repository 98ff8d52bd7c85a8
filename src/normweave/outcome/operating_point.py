"""Where the line between normal and anomalous lies, and what that line promises.

Everything here is a split-conformal quantile of normal images that no fit has seen: a new normal image is as
likely as any of the n held-out ones to have the highest, the second highest, … score. Bates et al. 2023,
"Testing for outliers with conformal p-values" (arXiv 2104.08279), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normweave.errors import BundleError, ConfigError, DataError, GateError, NormweaveError
from normweave.types import Verdict

ROUNDING = 1e-9
"""(n + 1) · rate counts as the whole number that it is this near to: 100 · 0.29 is 28.999999999999996."""


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """Scores above `threshold` are anomalous; a score that equals it is not."""

    threshold: float
    false_alarm_rate: float
    """Share of new normal images that may lie above, in (0, 1)."""
    drawn_from: int
    """n held-out normal images."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the operating point says of one image."""

    verdict: Verdict
    p_value: float
    """In (0, 1]; at or below `false_alarm_rate` exactly when the score lies above `threshold`."""
    threshold: float
    false_alarm_rate: float
    pooled: bool
    """The line was drawn from all held-out normals: the image's subclass has too few, or there are none."""
    subclass_p_value: float | None
    """The same of the routing distance; None where the head does not route."""
    unseen: bool = False
    """Judged as a kind of normal that was never seen: by the line of normals scored as strangers."""


def needed(false_alarm_rate: float) -> int:
    """How many held-out normal images a promise of this rate takes: ceil(1 / rate) − 1.

    Raises:
        ConfigError: the rate does not lie in (0, 1).
    """
    if not 0 < false_alarm_rate < 1:
        raise ConfigError(f"A false-alarm rate must lie in (0, 1), got {false_alarm_rate}.")
    return max(1, math.ceil(1 / false_alarm_rate - ROUNDING) - 1)


def draw(normal_scores: ArrayLike, *, false_alarm_rate: float) -> OperatingPoint:
    """Put the line so that at most `false_alarm_rate` of new normal images lie above it.

    The threshold is the ceil((n + 1)(1 − a))-th smallest of the n scores, the lowest that keeps the promise.

    Args:
        normal_scores: (n,) scores of normal images that no fit has seen.
        false_alarm_rate: a, 0 < a < 1.

    Raises:
        GateError: n is too small for this rate.
    """
    scores = _finite(normal_scores, "scores of held-out normal images")
    n, need = len(scores), needed(false_alarm_rate)
    if n < need:
        raise GateError(
            f"A false-alarm rate of {false_alarm_rate:g} needs at least {need} held-out normal images, "
            f"got {n}. Hold out more (data.calibration_share), add good images, "
            "or accept a higher rate (outcome.false_alarm_rate)."
        )
    above = math.floor((n + 1) * false_alarm_rate + ROUNDING)  # >= 1: the new image itself may be one of them
    threshold = float(np.partition(scores, n - above)[n - above])
    return OperatingPoint(threshold=threshold, false_alarm_rate=false_alarm_rate, drawn_from=n)


def p_value(score: float, normal_scores: ArrayLike) -> float:
    """(1 + how many held-out normals score at least as high) / (n + 1)."""
    scores = np.asarray(normal_scores, dtype=np.float64)
    return (1 + int(np.count_nonzero(scores >= score))) / (len(scores) + 1)


class Calibration:
    """The held-out normal images of a detector, and the lines drawn from them.

    Where the head routes, each subclass that enough held-out normals were routed to has a line of its own,
    which keeps the promise for new normals routed there. The others share the line of all held-out normals:
    that one cannot speak for a subclass that scores unlike the rest, and judgements by it say so (`pooled`).

    An image is `unknown` when its routing distance lies beyond the line for `unknown_rate`. Fewer normals
    than that rate needs put the line at the farthest of them all, which keeps the lowest rate that n images
    can promise, 1/(n + 1); `as_dict` names the rate that holds.

    Args:
        scores: (n,) of normal images that no fit has seen.
        distances: (n,) how far each lies from what the head knows; None where the head does not route.
        subclasses: (n,) where the head routed each, an index into `subclass_names`; None likewise.
        strangers: the same normals without what the head knows of their subclass.

    Raises:
        GateError: too few images for the false-alarm rate.
        DataError: lengths differ, or a number is not finite.
    """

    def __init__(
        self,
        *,
        scores: ArrayLike,
        distances: ArrayLike | None = None,
        subclasses: ArrayLike | None = None,
        subclass_names: tuple[str, ...] = (),
        false_alarm_rate: float,
        unknown_rate: float,
        strangers: Calibration | None = None,
    ) -> None:
        self.strangers = strangers
        given = _finite(scores, "scores of held-out normal images")
        n = len(given)
        for what, values in (("distances", distances), ("subclasses", subclasses)):
            if values is not None and len(np.asarray(values)) != n:
                raise DataError(
                    f"Held-out normal images have {n} scores but {len(np.asarray(values))} {what}."
                )
        order = np.argsort(given, kind="stable")
        self.scores = given[order]  # (n,) ascending
        self.distances: NDArray[np.float64] | None = None  # (n,) in the order of scores
        self.subclasses: NDArray[np.int64] | None = None  # (n,) likewise
        self.subclass_names = tuple(subclass_names)
        self.false_alarm_rate = false_alarm_rate
        self.unknown_rate = unknown_rate
        needed(unknown_rate)
        if distances is not None:
            self.distances = _finite(distances, "distances of held-out normal images")[order]
        if subclasses is not None:
            index = np.asarray(subclasses, dtype=np.int64)
            if index.size and not 0 <= index.min() <= index.max() < len(self.subclass_names):
                raise DataError(
                    f"Subclasses must be indices into {len(self.subclass_names)} names, "
                    f"got {index.min()}..{index.max()}."
                )
            self.subclasses = index[order]

        everyone = np.ones(n, dtype=bool)
        self._groups: dict[int | None, NDArray[np.bool_]] = {None: everyone}
        if self.subclasses is not None:
            self._groups |= {k: self.subclasses == k for k in range(len(self.subclass_names))}
        self._points: dict[int | None, OperatingPoint] = {
            None: draw(self.scores, false_alarm_rate=false_alarm_rate)
        }
        self._reaches: dict[int | None, OperatingPoint] = {}
        if self.distances is not None:
            attainable = max(unknown_rate, 1 / (n + 1))
            self._reaches[None] = draw(self.distances, false_alarm_rate=attainable)
        for k, members in self._groups.items():
            if k is not None and members.sum() >= needed(false_alarm_rate):
                self._points[k] = draw(self.scores[members], false_alarm_rate=false_alarm_rate)
            if k is not None and self.distances is not None and members.sum() >= needed(unknown_rate):
                self._reaches[k] = draw(self.distances[members], false_alarm_rate=unknown_rate)

    def __len__(self) -> int:
        """How many held-out normal images."""
        return len(self.scores)

    def point(self, subclass: int | None = None) -> OperatingPoint:
        """The line for images routed to this subclass; None or too few normals: the line of them all."""
        return self._points.get(subclass, self._points[None])

    def judge(self, *, score: float, distance: float | None = None, subclass: int | None = None) -> Judgement:
        """The verdict on an image with this score, routed to `subclass` at this distance.

        Raises:
            DataError: score or distance is not finite, so that nothing can be said.
        """
        if not math.isfinite(score) or not (distance is None or math.isfinite(distance)):
            raise DataError(f"Score and distance of an image must be finite, got {score} and {distance}.")
        score, distance = float(score), None if distance is None else float(distance)
        pool = subclass if subclass in self._points else None
        point = self._points[pool]
        subclass_p_value, unknown = None, False
        if distance is not None and self.distances is not None:
            near = subclass if subclass in self._reaches else None
            subclass_p_value = p_value(distance, self.distances[self._groups[near]])
            unknown = distance > self._reaches[near].threshold
        if unknown and self.strangers is not None:
            kin = self.strangers.judge(score=score, distance=distance)
            return replace(kin, subclass_p_value=subclass_p_value, unseen=True)
        return Judgement(
            verdict="unknown" if unknown else "anomalous" if score > point.threshold else "normal",
            p_value=p_value(score, self.scores[self._groups[pool]]),
            threshold=point.threshold,
            false_alarm_rate=point.false_alarm_rate,
            pooled=pool is None,
            subclass_p_value=subclass_p_value,
        )

    def with_rate(self, false_alarm_rate: float) -> Calibration:
        """The same held-out normals with their lines drawn anew.

        Raises:
            GateError: they are too few for this rate.
        """
        return Calibration(
            scores=self.scores,
            distances=self.distances,
            subclasses=self.subclasses,
            subclass_names=self.subclass_names,
            false_alarm_rate=false_alarm_rate,
            unknown_rate=self.unknown_rate,
            strangers=self.strangers and self.strangers.with_rate(false_alarm_rate),
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it, in full precision; first what a reader looks for, the lines."""
        points = []
        for k, members in self._groups.items():
            reach = self._reaches.get(k, self._reaches.get(None))
            points.append(
                {
                    "subclass": None if k is None else self.subclass_names[k],
                    "normals": int(members.sum()),
                    "pooled": k not in self._points or k is None,
                    "threshold": self.point(k).threshold,
                    "drawn_from": self.point(k).drawn_from,
                    "unknown_beyond": None if reach is None else reach.threshold,
                    "unknown_rate": None if reach is None else reach.false_alarm_rate,
                }
            )
        return {
            "false_alarm_rate": self.false_alarm_rate,
            "unknown_rate": self.unknown_rate,
            "operating_points": points,
            "subclass_names": list(self.subclass_names),
            "scores": self.scores.tolist(),
            "distances": None if self.distances is None else self.distances.tolist(),
            "subclasses": None if self.subclasses is None else self.subclasses.tolist(),
            "strangers": self.strangers and self.strangers.as_dict(),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Calibration:
        """What `as_dict` wrote.

        Raises:
            BundleError: something is missing, not finite, out of order, or at odds with the lines.
        """
        try:
            calibration = cls(
                scores=record["scores"],
                distances=record["distances"],
                subclasses=record["subclasses"],
                subclass_names=tuple(record["subclass_names"]),
                false_alarm_rate=record["false_alarm_rate"],
                unknown_rate=record["unknown_rate"],
                strangers=None if record["strangers"] is None else cls.from_dict(record["strangers"]),
            )
            faithful = calibration.as_dict() == dict(record)
        except KeyError as error:
            raise BundleError(f"The detector's calibration is damaged: {error} is missing.") from error
        except (NormweaveError, TypeError, ValueError) as error:
            raise BundleError(f"The detector's calibration is damaged: {error}") from error
        if not faithful:
            raise BundleError(
                "The detector's calibration is damaged: its scores are out of order or its operating points "
                "do not follow from them. Draw them anew with: normweave calibrate"
            )
        return calibration


def _finite(values: ArrayLike, what: str) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1:
        raise DataError(f"The {what} must be one number an image, got shape {numbers.shape}.")
    if not np.isfinite(numbers).all():
        raise DataError(f"The {what} must be finite, got {int((~np.isfinite(numbers)).sum())} that are not.")
    return numbers
