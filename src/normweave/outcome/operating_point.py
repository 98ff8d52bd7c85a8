"""Thresholds between normal and anomalous images, and their guaranteed false-alarm rates.

Every threshold is a conformal quantile of the scores of held-out normal images. The images of one group (a physical
part, a lot, a session) resemble each other, so that groups are exchangeable and images are not: a new group is as
likely as any of the G held-out groups to have the highest, the second highest, … scores. Lee, Barber and Willett 2023,
"Distribution-free inference with hierarchical data" (arXiv 2306.06342): each of the N_g images of group g has the
weight 1 / ((G + 1) N_g), and a new group the weight 1 / (G + 1) at infinity. With one image a group this is split
conformal prediction, Bates et al. 2023, "Testing for outliers with conformal p-values" (arXiv 2104.08279), section 2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normweave.errors import BundleError, CheckError, ConfigError, DataError, NormweaveError
from normweave.types import Guarantee, Verdict

ROUNDING = 1e-9
"""Tolerance within which (G + 1) · rate counts as an integer: 100 · 0.29 is 28.999999999999996."""

LOWEST_RATE = 1e-9
"""The lowest false-alarm rate that is accepted. It needs a billion groups of held-out normal images."""

_Pool = int | str | None
"""A set of held-out normal images: of a subclass (its index), of a category (its name), or all (None)."""


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """A threshold and its false-alarm rate. An image is anomalous if its score exceeds the threshold."""

    threshold: float
    false_alarm_rate: float
    """The highest expected share of new normal images above the threshold, in (0, 1)."""
    drawn_from: int
    """The number of held-out normal images from which the threshold was computed."""
    groups: int
    """The number of independent groups of these images."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The verdict on one image and the values it follows from."""

    verdict: Verdict
    p_value: float
    """In (0, 1]. At most `false_alarm_rate` exactly when the score exceeds `threshold`."""
    threshold: float
    false_alarm_rate: float
    guarantee: Guarantee
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


def groups_needed(false_alarm_rate: float) -> int:
    """Return the number of groups of held-out normal images that this rate needs: ceil(1 / rate) − 1.

    Raises:
        ConfigError: the rate is outside (0, 1) or below `LOWEST_RATE`.
    """
    if 0 < false_alarm_rate < LOWEST_RATE:
        raise ConfigError(f"A false-alarm rate must be at least {LOWEST_RATE:g}, got {false_alarm_rate:g}.")
    if not 0 < false_alarm_rate < 1:
        raise ConfigError(f"A false-alarm rate must be in (0, 1), got {false_alarm_rate}.")
    return max(1, math.ceil(1 / false_alarm_rate - ROUNDING) - 1)


def draw_threshold(
    normal_scores: ArrayLike, *, false_alarm_rate: float, groups: ArrayLike | None = None
) -> OperatingPoint:
    """Return the lowest threshold that at most `false_alarm_rate` of new normal images exceed.

    The threshold is the smallest score s such that the images with scores up to s have a total weight of at least
    1 − a. With one image a group it is the ceil((n + 1)(1 − a))-th smallest of the n scores.

    Args:
        normal_scores: (n,) scores of held-out normal images.
        false_alarm_rate: a, 0 < a < 1.
        groups: (n,) integers, equal for images of one group. None: each image is a group of its own.

    Raises:
        CheckError: there are too few groups for this rate.
    """
    scores = _finite(normal_scores, "scores of held-out normal images")
    return _draw(scores, _weights(len(scores), groups), false_alarm_rate)


def p_value(score: float, normal_scores: ArrayLike, groups: ArrayLike | None = None) -> float:
    """Return the weight of the images with at least this score, and of the new group.

    With one image a group it is (1 + the number of held-out normal images with at least this score) / (n + 1).

    Args:
        normal_scores, groups: as in `draw_threshold`.
    """
    scores = np.asarray(normal_scores, dtype=np.float64)
    weights = _weights(len(scores), groups)
    return _p_value(score, scores, weights, _groups(weights))


def _weights(n: int, groups: ArrayLike | None) -> NDArray[np.float64]:
    """Return 1 / N_g for each of n images, (n,); the sum is the number of groups G."""
    if groups is None:
        return np.ones(n)
    _, group, sizes = np.unique(np.asarray(groups, dtype=np.int64), return_inverse=True, return_counts=True)
    weights: NDArray[np.float64] = 1 / sizes[group]
    return weights


def _groups(weights: NDArray[np.float64]) -> int:
    return round(float(weights.sum()))


def _draw(scores: NDArray[np.float64], weights: NDArray[np.float64], false_alarm_rate: float) -> OperatingPoint:
    count, need = _groups(weights), groups_needed(false_alarm_rate)
    if count < need:
        images = "" if count == len(scores) else f" of {len(scores)} images"
        raise CheckError(
            f"A false-alarm rate of {false_alarm_rate:g} needs at least {need} independent groups of held-out normal "
            f"images, got {count}{images}; an image without a group counts as one. Add good images of other groups, or "
            "accept a higher rate (outcome.false_alarm_rate)."
        )
    order = np.lexsort((scores,))
    ascending, mass = scores[order], weights[order]
    # (G + 1) times the weight above each score, with the new group at infinity; it falls with the score.
    above = 1 + np.append(np.cumsum(mass[::-1])[::-1][1:], 0.0)
    first = int(np.argmax(above <= (count + 1) * false_alarm_rate + ROUNDING))
    return OperatingPoint(
        threshold=float(ascending[first]), false_alarm_rate=false_alarm_rate, drawn_from=len(scores), groups=count
    )


def _p_value(score: float, scores: NDArray[np.float64], weights: NDArray[np.float64], groups: int) -> float:
    return min(1.0, float((1 + weights @ (scores >= score)) / (groups + 1)))  # a sum of thirds may round above 1


class Added(NamedTuple):
    """The operating points of a subclass that was added after the training."""

    calibration: Calibration
    """From held-out normal images of this subclass only, all of which were routed to it."""
    category: str
    unseen: bool
    """An image beyond the threshold of the distance is compared with leave-one-subclass-out scores of the category."""


class Calibration:
    """The scores of a detector's held-out normal images, and the operating points computed from them.

    If the head routes, each subclass with enough groups of held-out normal images has its own operating point, and its
    false-alarm rate holds for new normal images of that subclass. A subclass with too few uses the operating point of
    its category, and a category with too few uses that of all images. Such a pooled rate holds for the pooled images
    together, not for each subclass; `Decision.pooled_over` reports it. Categories are used only if there are several
    and only where a category has several subclasses.

    An image is `unknown` if its routing distance exceeds the threshold for `unknown_rate`, computed by the same rule.
    If there are too few groups for that rate, the threshold is the largest distance of all, with the lowest rate that
    G groups allow, 1/(G + 1). `as_dict` contains the rate that holds. With `attainable` the same holds for the
    false-alarm rate, and the operating point is marked `uncalibrated`.

    With `unseen`, an image beyond that threshold is first compared with the leave-one-subclass-out scores of its
    category, whose guarantee and rate it then has. A category with a single subclass has no such scores, because
    without that subclass the head has no expert for the category.

    A subclass that was added later has operating points of its own (`added`), which nothing else depends on: those of
    the others are as before.

    Args:
        scores: (n,) anomaly scores of held-out normal images.
        distances: (n,) routing distances to the nearest subclass. None if the head does not route.
        subclasses: (n,) the subclass of each image by the routing, an index into `subclass_names`, or None likewise.
        subclass_categories: the category of each of the `subclass_names`. Empty if there is one category.
        groups: (n,) integers, equal for images of one group. None: each image is a group of its own.
        cross_validated: each score is of a head that was fitted without the image's group, not of the detector's head.
        attainable: accept too few groups for the false-alarm rate, and use the lowest rate that they allow.
        unseen: leave-one-subclass-out scores: the same images, each scored without the experts of its own subclass.
        added: subclasses that follow `subclass_names`.

    Raises:
        CheckError: there are too few groups for the false-alarm rate, without `attainable`.
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
        groups: ArrayLike | None = None,
        cross_validated: bool = False,
        attainable: bool = False,
        false_alarm_rate: float,
        unknown_rate: float,
        unseen: Calibration | None = None,
        added: Sequence[Added] = (),
    ) -> None:
        self.unseen = unseen
        self.added = tuple(added)
        given = _finite(scores, "scores of held-out normal images")
        n = len(given)
        for name, values in (("distances", distances), ("subclasses", subclasses), ("groups", groups)):
            if values is not None and len(np.asarray(values)) != n:
                raise DataError(f"Held-out normal images have {n} scores but {len(np.asarray(values))} {name}.")
        order = np.lexsort((given,))  # stable
        self.scores = given[order]  # (n,) ascending
        self.distances: NDArray[np.float64] | None = None  # (n,) in the order of scores
        self.subclasses: NDArray[np.int64] | None = None  # (n,) in the order of scores
        self.groups: NDArray[np.int64] | None = None  # (n,) in the order of scores; None: one image a group
        self.cross_validated = cross_validated
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
        if groups is not None:
            found, index = np.unique(np.asarray(groups, dtype=np.int64), return_inverse=True)
            if len(found) < n:
                self.groups = index[order]
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
        self._members: dict[_Pool, NDArray[np.bool_]] = {None: np.ones(n, dtype=bool)}
        if self.subclasses is not None:
            for category, count in Counter(self.subclass_categories).items():
                if count > 1:
                    indices = [k for k, name in enumerate(self.subclass_categories) if name == category]
                    self._members[category] = np.isin(self.subclasses, indices)
            for k in range(len(self.subclass_names)):
                self._members[k] = self.subclasses == k
        self._weights = {
            pool: _weights(int(members.sum()), None if self.groups is None else self.groups[members])
            for pool, members in self._members.items()
        }
        self._counts = {pool: _groups(weights) for pool, weights in self._weights.items()}
        self._draw_points(attainable=attainable)

    def _draw_points(self, *, attainable: bool) -> None:
        """Compute the operating points of all images, and of each category and subclass with enough groups."""
        needed, unknown_needs = groups_needed(self.false_alarm_rate), groups_needed(self.unknown_rate)
        lowest = 1 / (self.independent_groups + 1)
        self.guarantee: Guarantee = "cross-validated" if self.cross_validated else "conformal"
        rate = self.false_alarm_rate
        if attainable and self.independent_groups < needed:
            self.guarantee, rate = "uncalibrated", lowest
        self._score_points: dict[_Pool, OperatingPoint] = {None: _draw(self.scores, self._weights[None], rate)}
        self._distance_points: dict[_Pool, OperatingPoint] = {}
        if self.distances is not None:
            unknown_rate = max(self.unknown_rate, lowest)
            self._distance_points[None] = _draw(self.distances, self._weights[None], unknown_rate)
        for pool, members in self._members.items():
            weights, count = self._weights[pool], self._counts[pool]
            if pool is not None and count >= needed:
                self._score_points[pool] = _draw(self.scores[members], weights, rate)
            if pool is not None and self.distances is not None and count >= unknown_needs:
                self._distance_points[pool] = _draw(self.distances[members], weights, self.unknown_rate)

    @property
    def independent_groups(self) -> int:
        """The number of groups of held-out normal images."""
        return self._counts[None]

    @property
    def promise(self) -> str:
        """What the false-alarm rate rests on, in a sentence or two for people."""
        groups, rate = self.independent_groups, f"{100 * self.false_alarm_rate:.3g} %"
        match self.guarantee:
            case "uncalibrated":
                parts = "1 independent good part" if groups == 1 else f"{groups} independent good parts"
                return (
                    f"{parts} can promise {100 * self.point().false_alarm_rate:.3g} % false "
                    f"alarms at best; {rate} needs {groups_needed(self.false_alarm_rate)}. Verdicts are marked "
                    "uncalibrated."
                )
            case "cross-validated":
                return (
                    f"About {rate} false alarms, estimated by cross-validation over {groups} independent good parts. "
                    f"This is approximate: plan for up to {200 * self.false_alarm_rate:.3g} %.{self._shared}"
                )
            case "conformal":
                return (
                    f"At most {rate} false alarms on average, computed from {groups} independent good parts that were "
                    f"not used for fitting.{self._shared}"
                )

    @property
    def _shared(self) -> str:
        """A sentence about the subclasses without an operating point of their own; empty if there are none."""
        number, pooled = len(self.subclass_names), 0
        if self.subclasses is not None:
            pooled = sum(subclass not in self._score_points for subclass in range(number))
        if pooled == 0:
            return ""
        need = groups_needed(self.false_alarm_rate)
        return (
            f" Subclasses with fewer than {need} of these parts ({pooled} of {number}) use a common threshold, whose "
            "rate holds for them all together, not for each."
        )

    def __len__(self) -> int:
        """Return the number of held-out normal images."""
        return len(self.scores)

    def point(self, subclass: int | None = None) -> OperatingPoint:
        """Return the operating point for images of this subclass, its own or a pooled one."""
        if (added := self._added(subclass)) is not None:
            return added.calibration.point()
        return self._score_points[self._available(self._score_points, subclass)]

    def decide(self, *, score: float, distance: float | None = None, subclass: int | None = None) -> Decision:
        """Return the verdict on an image with this score and this routing distance to `subclass`.

        Raises:
            DataError: the score or the distance is not finite.
        """
        if not math.isfinite(score) or not (distance is None or math.isfinite(distance)):
            raise DataError(f"Score and distance of an image must be finite, got {score} and {distance}.")
        return self._decide(float(score), None if distance is None else float(distance), subclass)

    def is_far(self, distance: float | None, subclass: int | None) -> bool:
        """Return whether an image with this routing distance to `subclass` is far from every known subclass."""
        decision = self.decide(score=0.0, distance=distance, subclass=subclass)
        return decision.unseen or decision.verdict == "unknown"

    def _added(self, own: _Pool) -> Added | None:
        """Return the added subclass of this index."""
        number = own - len(self.subclass_names) if isinstance(own, int) else -1
        return self.added[number] if number >= 0 else None

    def with_added(self, added: Sequence[Added]) -> Calibration:
        """Return the same calibration with these added subclasses."""
        other = copy(self)
        other.added = tuple(added)
        return other

    def _decide(self, score: float, distance: float | None, own: _Pool) -> Decision:
        if (added := self._added(own)) is not None:
            decision = replace(added.calibration._decide(score, distance, None), pooled_over="subclass")
            if decision.verdict == "unknown" and added.unseen and self.unseen is not None:
                pool: _Pool = added.category if added.category in self.unseen._members else None
                unseen = self.unseen._decide(score, distance, pool)
                return replace(unseen, subclass_p_value=decision.subclass_p_value, unseen=True)
            return decision
        pool = self._available(self._score_points, own)
        point = self._score_points[pool]
        subclass_p_value, unknown = None, False
        if distance is not None and self.distances is not None:
            near = self._available(self._distance_points, own)
            subclass_p_value = self._p_value(distance, self.distances, near)
            unknown = distance > self._distance_points[near].threshold
        if unknown and self.unseen is not None:
            category = self._category(own)
            if category is not None or not self.subclass_categories:
                decision = self.unseen._decide(score, distance, category)
                return replace(decision, subclass_p_value=subclass_p_value, unseen=True)
        return Decision(
            verdict="unknown" if unknown else "anomalous" if score > point.threshold else "normal",
            p_value=self._p_value(score, self.scores, pool),
            threshold=point.threshold,
            false_alarm_rate=point.false_alarm_rate,
            guarantee=self.guarantee,
            pooled_over=_pooled_over(pool),
            subclass_p_value=subclass_p_value,
        )

    def _p_value(self, value: float, values: NDArray[np.float64], pool: _Pool) -> float:
        return _p_value(value, values[self._members[pool]], self._weights[pool], self._counts[pool])

    def _category(self, own: _Pool) -> str | None:
        """Return the category of a pool, or None if no other subclass shares it."""
        if own is None or not self.subclass_categories:
            return None
        category = own if isinstance(own, str) else self.subclass_categories[own]
        return category if category in self._members else None

    def _available(self, points: Container[_Pool], own: _Pool) -> _Pool:
        """Return the smallest pool around `own` that has an operating point: itself, its category, or all."""
        return next((pool for pool in (own, self._category(own)) if pool in points), None)

    def with_rate(self, false_alarm_rate: float, *, attainable: bool = False) -> Calibration:
        """Return a calibration of the same scores with thresholds for another false-alarm rate.

        It has no `unseen` if there are too few leave-one-subclass-out scores for the rate, without `attainable`. Added
        subclasses with too few groups have the lowest rate that these allow.

        Args:
            attainable: as in the class.

        Raises:
            CheckError: there are too few groups of held-out normal images for this rate, without `attainable`.
        """
        unseen = self.unseen
        if unseen is not None and not attainable and unseen.independent_groups < groups_needed(false_alarm_rate):
            unseen = None
        return Calibration(
            scores=self.scores,
            distances=self.distances,
            subclasses=self.subclasses,
            subclass_names=self.subclass_names,
            subclass_categories=self.subclass_categories,
            groups=self.groups,
            cross_validated=self.cross_validated,
            attainable=attainable,
            false_alarm_rate=false_alarm_rate,
            unknown_rate=self.unknown_rate,
            unseen=unseen and unseen.with_rate(false_alarm_rate, attainable=attainable),
            added=[
                each._replace(calibration=each.calibration.with_rate(false_alarm_rate, attainable=True))
                for each in self.added
            ],
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values in full precision, the operating points first.

        With several categories the record contains `subclass_categories`, and each operating point its `category` and
        `pooled_over`.
        """
        points = []
        for own, members in self._members.items():
            pool = self._available(self._score_points, own)
            limit = self._distance_points.get(self._available(self._distance_points, own))
            point = {
                "subclass": self.subclass_names[own] if isinstance(own, int) else None,
                "normals": int(members.sum()),
                "groups": self._counts[own],
                "pooled": pool is None or pool != own,
                "threshold": self._score_points[pool].threshold,
                "false_alarm_rate": self._score_points[pool].false_alarm_rate,
                "drawn_from": self._score_points[pool].drawn_from,
                "unknown_beyond": None if limit is None else limit.threshold,
                "unknown_rate": None if limit is None else limit.false_alarm_rate,
            }
            if self.subclass_categories:
                category = self.subclass_categories[own] if isinstance(own, int) else own
                point |= {"category": category, "pooled_over": _pooled_over(pool)}
            points.append(point)
        record = {
            "false_alarm_rate": self.false_alarm_rate,
            "unknown_rate": self.unknown_rate,
            "guarantee": self.guarantee,
            "cross_validated": self.cross_validated,
            "operating_points": points,
            "subclass_names": list(self.subclass_names),
            "scores": self.scores.tolist(),
            "distances": None if self.distances is None else self.distances.tolist(),
            "subclasses": None if self.subclasses is None else self.subclasses.tolist(),
            "groups": None if self.groups is None else self.groups.tolist(),
            "unseen": self.unseen and self.unseen.as_dict(),
        }
        if self.subclass_categories:
            record["subclass_categories"] = list(self.subclass_categories)
        if self.added:
            record["added"] = [each._asdict() | {"calibration": each.calibration.as_dict()} for each in self.added]
        return record

    def table(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the operating points as `as_dict` does, followed by those of added subclasses.

        Args:
            names: of all subclasses, the added ones last.
        """
        rows: list[dict[str, Any]] = self.as_dict()["operating_points"]
        for name, each in zip(names[len(self.subclass_names) :], self.added, strict=True):
            (point,) = each.calibration.as_dict()["operating_points"]
            place = {"category": each.category, "pooled_over": "subclass"} if self.subclass_categories else {}
            rows.append(point | {"subclass": name, "pooled": False} | place)
        return rows

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Calibration:
        """Return the calibration that `as_dict` wrote, now or before there were groups: then each image is one.

        Raises:
            BundleError: a value is missing, not finite, out of order, or contradicts the operating points.
        """
        if not isinstance(record, Mapping):
            raise BundleError(f"The detector's calibration is damaged: it must be an object, got {record!r:.80}.")
        try:
            record = _with_groups(record)
            calibration = cls(
                scores=record["scores"],
                distances=record["distances"],
                subclasses=record["subclasses"],
                subclass_names=tuple(record["subclass_names"]),
                subclass_categories=tuple(record.get("subclass_categories", ())),
                groups=record["groups"],
                cross_validated=record["cross_validated"],
                attainable=record["guarantee"] == "uncalibrated",
                false_alarm_rate=record["false_alarm_rate"],
                unknown_rate=record["unknown_rate"],
                unseen=None if record["unseen"] is None else cls.from_dict(record["unseen"]),
                added=[
                    Added(cls.from_dict(each["calibration"]), str(each["category"]), bool(each["unseen"]))
                    for each in record.get("added", ())
                ],
            )
            consistent = calibration.as_dict() == record
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


def _with_groups(record: Mapping[str, Any]) -> dict[str, Any]:
    """Add the values of a record that was written before there were groups."""
    points = [
        {"groups": point["normals"], "false_alarm_rate": record["false_alarm_rate"]} | point
        for point in record["operating_points"]
    ]
    before = {"guarantee": "conformal", "cross_validated": False, "groups": None}
    unseen = record["unseen"] and _with_groups(record["unseen"])
    return before | dict(record) | {"operating_points": points, "unseen": unseen}


def _pooled_over(pool: _Pool) -> Literal["subclass", "category", "all"]:
    return "all" if pool is None else "category" if isinstance(pool, str) else "subclass"


def _finite(values: ArrayLike, what: str) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1:
        raise DataError(f"The {what} must be one number per image, got shape {numbers.shape}.")
    if not np.isfinite(numbers).all():
        raise DataError(f"The {what} must be finite, got {int((~np.isfinite(numbers)).sum())} that are not.")
    return numbers
