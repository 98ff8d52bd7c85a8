"""Thresholds between normal and anomalous images, and their guaranteed false-alarm rates.

Every threshold is a split-conformal quantile of the scores of held-out normal images: a new normal image is as likely
as any of the n held-out images to have the highest, the second highest, … score. Bates et al. 2023, "Testing for
outliers with conformal p-values" (arXiv 2104.08279), section 2.
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
"""Tolerance within which (n + 1) · rate counts as an integer: 100 · 0.29 is 28.999999999999996."""

LOWEST_RATE = 1e-9
"""The lowest false-alarm rate that is accepted. It needs a billion held-out normal images."""

_Group = int | str | None
"""A set of held-out normal images: of a subclass (its index), of a category (its name), or all (None)."""


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """A threshold and its false-alarm rate. An image is anomalous if its score exceeds the threshold."""

    threshold: float
    false_alarm_rate: float
    """The highest expected share of new normal images above the threshold, in (0, 1)."""
    drawn_from: int
    """The number of held-out normal images from which the threshold was computed."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The verdict on one image and the values it follows from."""

    verdict: Verdict
    p_value: float
    """In (0, 1]. At most `false_alarm_rate` exactly when the score exceeds `threshold`."""
    threshold: float
    false_alarm_rate: float
    pooled_over: Literal["subclass", "category", "all"]
    """The held-out normal images that gave the threshold: of the image's subclass, of its category, or all."""
    subclass_p_value: float | None
    """The p-value of the routing distance. None if the head does not route."""
    unseen: bool = False
    """The image was compared with leave-one-subclass-out scores, as an image of an unseen subclass."""

    @property
    def pooled(self) -> bool:
        """Whether the threshold is not of the image's own subclass."""
        return self.pooled_over != "subclass"


def images_needed(false_alarm_rate: float) -> int:
    """Return the number of held-out normal images that this rate needs: ceil(1 / rate) − 1.

    Raises:
        ConfigError: the rate is outside (0, 1) or below `LOWEST_RATE`.
    """
    if 0 < false_alarm_rate < LOWEST_RATE:
        raise ConfigError(f"A false-alarm rate must be at least {LOWEST_RATE:g}, got {false_alarm_rate:g}.")
    if not 0 < false_alarm_rate < 1:
        raise ConfigError(f"A false-alarm rate must be in (0, 1), got {false_alarm_rate}.")
    return max(1, math.ceil(1 / false_alarm_rate - ROUNDING) - 1)


def draw_threshold(normal_scores: ArrayLike, *, false_alarm_rate: float) -> OperatingPoint:
    """Return the lowest threshold that at most `false_alarm_rate` of new normal images exceed.

    The threshold is the ceil((n + 1)(1 − a))-th smallest of the n scores.

    Args:
        normal_scores: (n,) scores of held-out normal images.
        false_alarm_rate: a, 0 < a < 1.

    Raises:
        CheckError: n is too small for this rate.
    """
    scores = _finite(normal_scores, "scores of held-out normal images")
    n, need = len(scores), images_needed(false_alarm_rate)
    if n < need:
        raise CheckError(
            f"A false-alarm rate of {false_alarm_rate:g} needs at least {need} held-out normal images, "
            f"got {n}. Hold out more (data.calibration_share), add good images, "
            "or accept a higher rate (outcome.false_alarm_rate)."
        )
    above = math.floor((n + 1) * false_alarm_rate + ROUNDING)  # >= 1: the new image counts as one of them
    threshold = float(np.partition(scores, n - above)[n - above])
    return OperatingPoint(threshold=threshold, false_alarm_rate=false_alarm_rate, drawn_from=n)


def p_value(score: float, normal_scores: ArrayLike) -> float:
    """Return (1 + the number of held-out normal images with at least this score) / (n + 1)."""
    scores = np.asarray(normal_scores, dtype=np.float64)
    return (1 + int(np.count_nonzero(scores >= score))) / (len(scores) + 1)


class Calibration:
    """The scores of a detector's held-out normal images, and the operating points computed from them.

    If the head routes, each subclass with enough held-out normal images has its own operating point, and its
    false-alarm rate holds for new normal images of that subclass. A subclass with too few uses the operating point of
    its category, and a category with too few uses that of all images. Such a pooled rate holds for the pooled images
    together, not for each subclass; `Decision.pooled_over` reports it. Categories are used only if there are several
    and only where a category has several subclasses.

    An image is `unknown` if its routing distance exceeds the threshold for `unknown_rate`, computed by the same rule.
    If there are too few images for that rate, the threshold is the largest distance of all, with the lowest rate that
    n images allow, 1/(n + 1). `as_dict` contains the rate that holds.

    With `unseen`, an image beyond that threshold is first compared with the leave-one-subclass-out scores of its
    category. A category with a single subclass has no such scores, because without that subclass the
    head has no expert for the category.

    Args:
        scores: (n,) anomaly scores of held-out normal images.
        distances: (n,) routing distances to the nearest subclass. None if the head does not route.
        subclasses: (n,) the subclass of each image by the routing, an index into `subclass_names`, or None likewise.
        subclass_categories: the category of each of the `subclass_names`. Empty if there is one category.
        unseen: leave-one-subclass-out scores: the same images, each scored without the experts of its own subclass.

    Raises:
        CheckError: there are too few images for the false-alarm rate.
        DataError: lengths differ, or a value is not finite.
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
        unseen: Calibration | None = None,
    ) -> None:
        self.unseen = unseen
        given = _finite(scores, "scores of held-out normal images")
        n = len(given)
        for name, values in (("distances", distances), ("subclasses", subclasses)):
            if values is not None and len(np.asarray(values)) != n:
                raise DataError(f"Held-out normal images have {n} scores but {len(np.asarray(values))} {name}.")
        order = np.lexsort((given,))  # stable
        self.scores = given[order]  # (n,) ascending
        self.distances: NDArray[np.float64] | None = None  # (n,) in the order of scores
        self.subclasses: NDArray[np.int64] | None = None  # (n,) in the order of scores
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
        unknown_needs = images_needed(unknown_rate)
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

        self._members: dict[_Group, NDArray[np.bool_]] = {None: np.ones(n, dtype=bool)}
        if self.subclasses is not None:
            for category, count in Counter(self.subclass_categories).items():
                if count > 1:
                    indices = [k for k, name in enumerate(self.subclass_categories) if name == category]
                    self._members[category] = np.isin(self.subclasses, indices)
            for k in range(len(self.subclass_names)):
                self._members[k] = self.subclasses == k
        self._score_points: dict[_Group, OperatingPoint] = {
            None: draw_threshold(self.scores, false_alarm_rate=false_alarm_rate)
        }
        self._distance_points: dict[_Group, OperatingPoint] = {}
        if self.distances is not None:
            attainable = max(unknown_rate, 1 / (n + 1))
            self._distance_points[None] = draw_threshold(self.distances, false_alarm_rate=attainable)
        for group, members in self._members.items():
            if group is not None and members.sum() >= images_needed(false_alarm_rate):
                self._score_points[group] = draw_threshold(self.scores[members], false_alarm_rate=false_alarm_rate)
            if group is not None and self.distances is not None and members.sum() >= unknown_needs:
                self._distance_points[group] = draw_threshold(self.distances[members], false_alarm_rate=unknown_rate)

    def __len__(self) -> int:
        """Return the number of held-out normal images."""
        return len(self.scores)

    def point(self, subclass: int | None = None) -> OperatingPoint:
        """Return the operating point for images of this subclass, its own or a pooled one."""
        return self._score_points[self._available(self._score_points, subclass)]

    def decide(self, *, score: float, distance: float | None = None, subclass: int | None = None) -> Decision:
        """Return the verdict on an image with this score and this routing distance to `subclass`.

        Raises:
            DataError: the score or the distance is not finite.
        """
        if not math.isfinite(score) or not (distance is None or math.isfinite(distance)):
            raise DataError(f"Score and distance of an image must be finite, got {score} and {distance}.")
        return self._decide(float(score), None if distance is None else float(distance), subclass)

    def _decide(self, score: float, distance: float | None, group: _Group) -> Decision:
        pool = self._available(self._score_points, group)
        point = self._score_points[pool]
        subclass_p_value, unknown = None, False
        if distance is not None and self.distances is not None:
            near = self._available(self._distance_points, group)
            subclass_p_value = p_value(distance, self.distances[self._members[near]])
            unknown = distance > self._distance_points[near].threshold
        if unknown and self.unseen is not None:
            category = self._category(group)
            if category is not None or not self.subclass_categories:
                decision = self.unseen._decide(score, distance, category)
                return replace(decision, subclass_p_value=subclass_p_value, unseen=True)
        return Decision(
            verdict="unknown" if unknown else "anomalous" if score > point.threshold else "normal",
            p_value=p_value(score, self.scores[self._members[pool]]),
            threshold=point.threshold,
            false_alarm_rate=point.false_alarm_rate,
            pooled_over=_pooled_over(pool),
            subclass_p_value=subclass_p_value,
        )

    def _category(self, group: _Group) -> str | None:
        """Return the category of a group, or None if no other subclass shares it."""
        if group is None or not self.subclass_categories:
            return None
        category = group if isinstance(group, str) else self.subclass_categories[group]
        return category if category in self._members else None

    def _available(self, points: Container[_Group], group: _Group) -> _Group:
        """Return the smallest group around `group` that has an operating point: itself, its category, or all."""
        return next((pool for pool in (group, self._category(group)) if pool in points), None)

    def with_rate(self, false_alarm_rate: float) -> Calibration:
        """Return a calibration of the same scores with thresholds for another false-alarm rate.

        It has no `unseen` if there are too few leave-one-subclass-out scores for the rate.

        Raises:
            CheckError: there are too few held-out normal images for this rate.
        """
        enough = self.unseen is not None and len(self.unseen) >= images_needed(false_alarm_rate)
        return Calibration(
            scores=self.scores,
            distances=self.distances,
            subclasses=self.subclasses,
            subclass_names=self.subclass_names,
            subclass_categories=self.subclass_categories,
            false_alarm_rate=false_alarm_rate,
            unknown_rate=self.unknown_rate,
            unseen=self.unseen.with_rate(false_alarm_rate) if self.unseen and enough else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values in full precision, the operating points first.

        With several categories the record contains `subclass_categories`, and each operating point its `category` and
        `pooled_over`.
        """
        points = []
        for group, members in self._members.items():
            pool = self._available(self._score_points, group)
            limit = self._distance_points.get(self._available(self._distance_points, group))
            point = {
                "subclass": self.subclass_names[group] if isinstance(group, int) else None,
                "normals": int(members.sum()),
                "pooled": pool is None or pool != group,
                "threshold": self._score_points[pool].threshold,
                "drawn_from": self._score_points[pool].drawn_from,
                "unknown_beyond": None if limit is None else limit.threshold,
                "unknown_rate": None if limit is None else limit.false_alarm_rate,
            }
            if self.subclass_categories:
                category = self.subclass_categories[group] if isinstance(group, int) else group
                point |= {"category": category, "pooled_over": _pooled_over(pool)}
            points.append(point)
        record = {
            "false_alarm_rate": self.false_alarm_rate,
            "unknown_rate": self.unknown_rate,
            "operating_points": points,
            "subclass_names": list(self.subclass_names),
            "scores": self.scores.tolist(),
            "distances": None if self.distances is None else self.distances.tolist(),
            "subclasses": None if self.subclasses is None else self.subclasses.tolist(),
            "unseen": self.unseen and self.unseen.as_dict(),
        }
        if self.subclass_categories:
            record["subclass_categories"] = list(self.subclass_categories)
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Calibration:
        """Return the calibration that `as_dict` wrote.

        Raises:
            BundleError: a value is missing, not finite, out of order, or contradicts the operating points.
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
                unseen=None if record["unseen"] is None else cls.from_dict(record["unseen"]),
            )
            consistent = calibration.as_dict() == dict(record)
        except KeyError as error:
            raise BundleError(f"The detector's calibration is damaged: {error} is missing.") from error
        except (NormweaveError, TypeError, ValueError) as error:
            raise BundleError(f"The detector's calibration is damaged: {error}") from error
        if not consistent:
            raise BundleError(
                "The detector's calibration is damaged: its scores are out of order or its operating points "
                "do not follow from them. Compute them again with: normweave calibrate"
            )
        return calibration


def _pooled_over(pool: _Group) -> Literal["subclass", "category", "all"]:
    return "all" if pool is None else "category" if isinstance(pool, str) else "subclass"


def _finite(values: ArrayLike, what: str) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1:
        raise DataError(f"The {what} must be one number per image, got shape {numbers.shape}.")
    if not np.isfinite(numbers).all():
        raise DataError(f"The {what} must be finite, got {int((~np.isfinite(numbers)).sum())} that are not.")
    return numbers
