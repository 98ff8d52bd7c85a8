"""Where the line between normal and anomalous lies, and what that line promises.

Everything here is a split-conformal quantile of normal images that no fit has seen: a new normal image is as
likely as any of the n held-out ones to have the highest, the second highest, … score. Bates et al. 2023,
"Testing for outliers with conformal p-values" (arXiv 2104.08279), section 2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normweave.errors import BundleError, CheckError, ConfigError, DataError, NormweaveError
from normweave.types import Verdict

ROUNDING = 1e-9
"""(n + 1) · rate counts as the whole number that it is this near to: 100 · 0.29 is 28.999999999999996."""

LOWEST_RATE = 1e-9
"""A promise of less would take more held-out normal images than there are photographs."""

_Group = int | str | None
"""Whose held-out normals: of a subclass, by its number, of a category, by its name, or of all."""


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
    drawn_for: Literal["subclass", "category", "all"]
    """Whose held-out normals the line was drawn from: the image's subclass, its category, or all there are."""
    subclass_p_value: float | None
    """The same of the routing distance; None where the head does not route."""
    unseen: bool = False
    """Judged as a kind of normal that was never seen: by the line of normals scored as strangers."""

    @property
    def pooled(self) -> bool:
        """The line is not the subclass's own: that has too few held-out normals, or there are no subclasses."""
        return self.drawn_for != "subclass"


def needed(false_alarm_rate: float) -> int:
    """How many held-out normal images a promise of this rate takes: ceil(1 / rate) − 1.

    Raises:
        ConfigError: the rate does not lie in (0, 1), or is one that no factory could ever check.
    """
    if 0 < false_alarm_rate < LOWEST_RATE:
        raise ConfigError(
            f"A false-alarm rate must be {LOWEST_RATE:g} or more, got {false_alarm_rate:g}: no less can be promised."
        )
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
        CheckError: n is too small for this rate.
    """
    scores = _finite(normal_scores, "scores of held-out normal images")
    n, need = len(scores), needed(false_alarm_rate)
    if n < need:
        raise CheckError(
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
    which keeps the promise for new normals routed there. A subclass with too few takes the line of its category,
    if that has enough, which keeps it for new normals of the category together; else the line of all held-out
    normals. Such a line cannot speak for a subclass that scores unlike the rest, and judgements by it say so
    (`drawn_for`). Categories count only where there are several, and where they have more than one subclass.

    An image is `unknown` when its routing distance lies beyond the line for `unknown_rate`, drawn from whom the
    same rule says. Fewer normals than that rate needs put the line at the farthest of them all, which keeps the
    lowest rate that n images can promise, 1/(n + 1); `as_dict` names the rate that holds. Where there are
    strangers, what lies beyond is first compared with those of its category; a subclass that is alone in its
    category has none, since its images, when it is taken away, are strangers of a whole category.

    Args:
        scores: (n,) of normal images that no fit has seen.
        distances: (n,) how far each lies from what the head knows; None where the head does not route.
        subclasses: (n,) where the head routed each, an index into `subclass_names`; None likewise.
        subclass_categories: the category of each of the `subclass_names`; empty = one for all.
        strangers: the same normals without what the head knows of their subclass.

    Raises:
        CheckError: too few images for the false-alarm rate.
        DataError: lengths differ, or a number is not finite.
    """

    def __init__(
        self,
        *,
        scores: ArrayLike,
        distances: ArrayLike | None = None,
        subclasses: ArrayLike | None = None,
        subclass_names: tuple[str, ...] = (),
        subclass_categories: tuple[str, ...] = (),
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
        if subclass_categories and len(subclass_categories) != len(self.subclass_names):
            raise DataError(
                f"Each of {len(self.subclass_names)} subclasses must have a category, got "
                f"{len(subclass_categories)} categories."
            )
        several = len(set(subclass_categories)) > 1
        self.subclass_categories = tuple(subclass_categories) if several else ()
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
        self._groups: dict[_Group, NDArray[np.bool_]] = {None: everyone}
        if self.subclasses is not None:
            for category, count in Counter(self.subclass_categories).items():
                if count > 1:
                    theirs = [k for k, name in enumerate(self.subclass_categories) if name == category]
                    self._groups[category] = np.isin(self.subclasses, theirs)
            for k in range(len(self.subclass_names)):
                self._groups[k] = self.subclasses == k
        self._points: dict[_Group, OperatingPoint] = {
            None: draw(self.scores, false_alarm_rate=false_alarm_rate)
        }
        self._reaches: dict[_Group, OperatingPoint] = {}
        if self.distances is not None:
            attainable = max(unknown_rate, 1 / (n + 1))
            self._reaches[None] = draw(self.distances, false_alarm_rate=attainable)
        for group, members in self._groups.items():
            if group is not None and members.sum() >= needed(false_alarm_rate):
                self._points[group] = draw(self.scores[members], false_alarm_rate=false_alarm_rate)
            if group is not None and self.distances is not None and members.sum() >= needed(unknown_rate):
                self._reaches[group] = draw(self.distances[members], false_alarm_rate=unknown_rate)

    def __len__(self) -> int:
        """How many held-out normal images."""
        return len(self.scores)

    def point(self, subclass: int | None = None) -> OperatingPoint:
        """The line for images routed to this subclass, of whatever it was drawn from."""
        return self._points[self._nearest(self._points, subclass)]

    def judge(self, *, score: float, distance: float | None = None, subclass: int | None = None) -> Judgement:
        """The verdict on an image with this score, routed to `subclass` at this distance.

        Raises:
            DataError: score or distance is not finite, so that nothing can be said.
        """
        if not math.isfinite(score) or not (distance is None or math.isfinite(distance)):
            raise DataError(f"Score and distance of an image must be finite, got {score} and {distance}.")
        return self._judge(float(score), None if distance is None else float(distance), subclass)

    def _judge(self, score: float, distance: float | None, group: _Group) -> Judgement:
        pool = self._nearest(self._points, group)
        point = self._points[pool]
        subclass_p_value, unknown = None, False
        if distance is not None and self.distances is not None:
            near = self._nearest(self._reaches, group)
            subclass_p_value = p_value(distance, self.distances[self._groups[near]])
            unknown = distance > self._reaches[near].threshold
        if unknown and self.strangers is not None:
            category = self._category(group)
            if category is not None or not self.subclass_categories:
                kin = self.strangers._judge(score, distance, category)
                return replace(kin, subclass_p_value=subclass_p_value, unseen=True)
        return Judgement(
            verdict="unknown" if unknown else "anomalous" if score > point.threshold else "normal",
            p_value=p_value(score, self.scores[self._groups[pool]]),
            threshold=point.threshold,
            false_alarm_rate=point.false_alarm_rate,
            drawn_for=_drawn_for(pool),
            subclass_p_value=subclass_p_value,
        )

    def _category(self, group: _Group) -> str | None:
        """The category that a subclass shares with others; None where there is none."""
        if group is None or not self.subclass_categories:
            return None
        category = group if isinstance(group, str) else self.subclass_categories[group]
        return category if category in self._groups else None

    def _nearest(self, lines: Container[_Group], group: _Group) -> _Group:
        """Whose line is taken for a subclass or a category: its own, else its category's, else that of all."""
        return next((nearest for nearest in (group, self._category(group)) if nearest in lines), None)

    def with_rate(self, false_alarm_rate: float) -> Calibration:
        """The same held-out normals with their lines drawn anew; strangers too few for the rate are left out.

        Raises:
            CheckError: the held-out normals are too few for this rate.
        """
        enough = self.strangers is not None and len(self.strangers) >= needed(false_alarm_rate)
        return Calibration(
            scores=self.scores,
            distances=self.distances,
            subclasses=self.subclasses,
            subclass_names=self.subclass_names,
            subclass_categories=self.subclass_categories,
            false_alarm_rate=false_alarm_rate,
            unknown_rate=self.unknown_rate,
            strangers=self.strangers.with_rate(false_alarm_rate) if self.strangers and enough else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it, in full precision; first what a reader looks for, the lines.

        With several categories each line also says the `category` and whose line is taken (`drawn_for`), and
        `subclass_categories` is written; without, all is as it was before there were any.
        """
        points = []
        for group, members in self._groups.items():
            pool = self._nearest(self._points, group)
            reach = self._reaches.get(self._nearest(self._reaches, group))
            point = {
                "subclass": self.subclass_names[group] if isinstance(group, int) else None,
                "normals": int(members.sum()),
                "pooled": pool is None or pool != group,
                "threshold": self._points[pool].threshold,
                "drawn_from": self._points[pool].drawn_from,
                "unknown_beyond": None if reach is None else reach.threshold,
                "unknown_rate": None if reach is None else reach.false_alarm_rate,
            }
            if self.subclass_categories:
                category = self.subclass_categories[group] if isinstance(group, int) else group
                point |= {"category": category, "drawn_for": _drawn_for(pool)}
            points.append(point)
        record = {
            "false_alarm_rate": self.false_alarm_rate,
            "unknown_rate": self.unknown_rate,
            "operating_points": points,
            "subclass_names": list(self.subclass_names),
            "scores": self.scores.tolist(),
            "distances": None if self.distances is None else self.distances.tolist(),
            "subclasses": None if self.subclasses is None else self.subclasses.tolist(),
            "strangers": self.strangers and self.strangers.as_dict(),
        }
        if self.subclass_categories:
            record["subclass_categories"] = list(self.subclass_categories)
        return record

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
                subclass_categories=tuple(record.get("subclass_categories", ())),
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


def _drawn_for(pool: _Group) -> Literal["subclass", "category", "all"]:
    return "all" if pool is None else "category" if isinstance(pool, str) else "subclass"


def _finite(values: ArrayLike, what: str) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1:
        raise DataError(f"The {what} must be one number an image, got shape {numbers.shape}.")
    if not np.isfinite(numbers).all():
        raise DataError(f"The {what} must be finite, got {int((~np.isfinite(numbers)).sum())} that are not.")
    return numbers
