"""The statistics of the calibration images, with which the images of the line are compared. The bundle holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave.data import variations
from normweave.data.regions import cells_inside, filled
from normweave.data.rows import Rows
from normweave.drift.statistics import ImageStatistics, MapStatistics, of_image, of_map
from normweave.errors import BundleError

KEY = "drift"
"""Key of the record of a bundle."""
COLUMNS = (*ImageStatistics._fields, *MapStatistics._fields, "score", "distance")
"""The numbers of an image."""
LIGHT = ("brighter", "darker", "warmer", "cooler", "gamma-low", "gamma-high")
"""Variations of `data.variations` that another lamp, exposure or white balance causes."""
FOCUS = ("blurred", "spotted")
"""Variations that a lens out of focus, and dirt on it, cause."""
SPOT_RADIUS, SPOT_COVER = 0.08, 0.5
"""Radius of the dirt as a share of the shorter side, and the share of light that it takes away. *Ours.*"""
MOST_IMAGES = 300
"""Images of a subclass in the record, drawn at random: it stays small."""
VARIED_IMAGES = 4
"""Images of a subclass that are rendered under the variations."""
_DIGITS = 6
"""Significant digits of the numbers in the record."""
SEED = 20261126
"""Of the images that are drawn."""

Product = tuple[str | None, str | None]
"""Category and subclass, as an `Outcome` names them."""


class Described(NamedTuple):
    """The statistics of a calibration image."""

    image: ImageStatistics
    map: MapStatistics
    shifts: dict[str, tuple[float, ...]]
    """Change of each image statistic under each variation; empty: not rendered."""


def describe(scanned: Rows, number: int, grids: NDArray[np.float32], *, vary: bool) -> Described:
    """Return the statistics of a calibration image.

    Args:
        number: of the image in `scanned`.
        grids: (n, h, w) the patch scores of its tiles.
        vary: also render it under the known variations.
    """
    pixels, parts = scanned.load_image(number), scanned.parts_inside(number)
    own = of_image(pixels)
    shifts = {}
    for name in (*LIGHT, *FOCUS) if vary else ():
        render = spotted if name == "spotted" else partial(variations.vary, variation=name)
        rendered = filled(np.stack([render(tile) for tile in pixels]), parts)
        shifts[name] = tuple((np.array(of_image(rendered)) - np.array(own)).tolist())
    inside = cells_inside(parts, grids.shape[1:])
    return Described(own, of_map(grids, scanned.tiles_of(number), scanned.sizes[number], inside=inside), shifts)


def spotted(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image (3, H, W) with a dark spot with soft edges in its middle, as of dirt on the lens."""
    _, height, width = pixels.shape
    y, x = np.ogrid[:height, :width]
    distance = np.hypot(y - height / 2, x - width / 2) / min(height, width)
    cover = SPOT_COVER * np.clip(2 - 2 * distance / SPOT_RADIUS, 0, 1)
    rendered: NDArray[np.uint8] = np.rint(pixels * (1 - cover)).astype(np.uint8)
    return rendered


class Reference(NamedTuple):
    """The calibration images of one subclass."""

    product: Product
    values: NDArray[np.float64]
    """(n, 10) the numbers of each image, in the order of `COLUMNS`; NaN: the head has no routing distance."""
    groups: NDArray[np.int64]
    """(n,) equal for images that are not independent."""
    shifts: dict[str, NDArray[np.float64]]
    """Mean change (5,) of the image statistics under each variation, in their units."""
    cross_validated: bool
    """The scores are of heads that were fitted without the image, not of the detector's head."""

    def one_of_each_group(self, seed: int) -> NDArray[np.float64]:
        """Return the numbers (G, 10) of one image of each group, drawn at random.

        Images of a group resemble each other. One image of each is exchangeable with an image of a new group.
        """
        order = np.random.default_rng(seed).permutation(len(self.groups))
        _, first = np.unique(self.groups[order], return_index=True)
        return self.values[order[np.sort(first)]]


class CalibrationImage(NamedTuple):
    """A calibration image, as the record is made from it."""

    product: Product
    group: int
    score: float
    distance: float | None
    described: Described | None


def record(images: Iterable[CalibrationImage], *, cross_validated: bool) -> dict[str, Any]:
    """Return the statistics of the calibration images as JSON values, for the record of a bundle."""
    by_product: dict[Product, list[CalibrationImage]] = {}
    for each in images:
        if each.described is not None:
            by_product.setdefault(each.product, []).append(each)
    subclasses = []
    for (category, subclass), members in sorted(by_product.items(), key=str):
        drawn = np.random.default_rng(SEED).permutation(len(members))[:MOST_IMAGES]
        shifts = [each.described.shifts for each in members if each.described is not None and each.described.shifts]
        subclasses.append(
            {
                "category": category,
                "subclass": subclass,
                "groups": [members[index].group for index in drawn],
                "values": [_numbers(members[index]) for index in drawn],
                "shifts": {
                    name: [_rounded(each) for each in np.mean([one[name] for one in shifts], axis=0)]
                    for name in ((*LIGHT, *FOCUS) if shifts else ())
                },
            }
        )
    return {"columns": list(COLUMNS), "cross_validated": cross_validated, "subclasses": subclasses}


def joined(held: Mapping[str, Any], images: Iterable[CalibrationImage]) -> dict[str, Any]:
    """Return the record with the statistics of an added subclass, whose scores are cross-validated."""
    added = [each | {"cross_validated": True} for each in record(images, cross_validated=True)["subclasses"]]
    return {**held, "subclasses": [*held["subclasses"], *added]}


def without(held: Mapping[str, Any], product: Product) -> dict[str, Any]:
    """Return the record without a subclass."""
    left = [each for each in held["subclasses"] if (each["category"], each["subclass"]) != product]
    return {**held, "subclasses": left}


def _numbers(image: CalibrationImage) -> list[float | None]:
    assert image.described is not None
    values = (*image.described.image, *image.described.map, image.score)
    return [*map(_rounded, values), None if image.distance is None else _rounded(image.distance)]


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def read(record: Mapping[str, Any], *, where: object) -> list[Reference]:
    """Return the references of all subclasses from the record of a bundle.

    Raises:
        BundleError: the bundle has none, or they are damaged.
    """
    cure = f"Add them from good images that training has not seen: normweave calibrate {where} GOOD_IMAGES"
    if KEY not in record:
        raise BundleError(f"{where} holds no statistics of its calibration images, so drift cannot be seen. {cure}")
    try:
        held = record[KEY]
        if tuple(held["columns"]) != COLUMNS:
            raise ValueError(f"the columns {held['columns']}")
        everywhere = held["cross_validated"]
        return [_reference(one, bool(one.get("cross_validated", everywhere))) for one in held["subclasses"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{where}: the statistics of the calibration images are damaged: {error}. {cure}") from error


def _reference(held: Mapping[str, Any], cross_validated: bool) -> Reference:
    values = np.array(held["values"], dtype=np.float64)  # None becomes NaN
    groups = np.array(held["groups"], dtype=np.int64)
    if values.ndim != 2 or values.shape[1] != len(COLUMNS) or len(groups) != len(values):
        raise ValueError(f"values of shape {values.shape} for {len(groups)} groups")
    if not np.isfinite(values[:, :-1]).all():
        raise ValueError("a number that is not finite")
    shifts = {name: np.array(shift, dtype=np.float64) for name, shift in held["shifts"].items()}
    if any(shift.shape != (len(ImageStatistics._fields),) for shift in shifts.values()):
        raise ValueError("shifts of another length")
    return Reference((held["category"], held["subclass"]), values, groups, shifts, cross_validated)


def numbers_of(outcome: Mapping[str, Any] | Callable[[str], Any]) -> NDArray[np.float64] | None:
    """Return the numbers (10,) of an outcome in the order of `COLUMNS`; None if it lacks them.

    Args:
        outcome: its fields by name, or a function that returns a field.
    """
    get = outcome if callable(outcome) else outcome.get
    names = {"score": "pred_score", "distance": "subclass_distance"}
    values = np.array([get(names.get(name, name)) for name in COLUMNS], dtype=np.float64)  # None becomes NaN
    return values if np.isfinite(values[:-1]).all() else None
