"""Split images into fit, calibration and test sets. No file and no physical part is in two sets.

A *unit* is never divided: images that share a group or the content of their files, directly or through other images.
Units are the independent groups that the operating points count.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave.data.images import content_hash
from normweave.errors import ConfigError, DataError, ImageError
from normweave.types import Sample

SPLITS = ("train", "calibration", "test")
FEWEST_FIT = 2
"""Smallest number of fit images: a standard deviation needs two."""

Content = Callable[[Sample], Hashable]


def good_images(samples: Iterable[Sample]) -> list[Sample]:
    """Return the normal images that are no test images."""
    return [each for each in samples if each.label == "normal" and each.split != "test"]


class Division(NamedTuple):
    """Normal images for fitting and for the operating points.

    With cross-validation these are the same images: those of each fold are scored by a head that is fitted to the
    others.
    """

    fit: list[Sample]
    calibration: list[Sample]
    folds: tuple[list[Sample], ...] = ()
    """The parts of a cross-validation; empty: the calibration images are not used for fitting."""


class Shared(NamedTuple):
    """A file or a group that is in two sets."""

    what: str  # "file" or "group"
    first: str  # names of the sets
    second: str
    here: Sample  # one image of each set
    there: Sample

    def __str__(self) -> str:
        item = "The same file" if self.what == "file" else f"Group {self.here.group!r}"
        images = f"{self.here.image_path} and {self.there.image_path}"
        return f"{item} is in {self.first} and {self.second}: {images}."


def file_content(sample: Sample) -> Hashable:
    """Return the hash of a file's bytes, or the path of an unreadable file. Equal values mean the same file."""
    try:
        return content_hash(sample.image_path)
    except ImageError:
        return str(sample.image_path)


def complete(samples: Sequence[Sample], *, seed: int, content: Content = file_content) -> list[Sample]:
    """Return the same images in the same order, each with a split. Given splits are not changed.

    Images without a split get that of their unit. If the unit has none, units with an anomalous image are put into
    test. Half of the units with normal images are drawn for train, balanced over the subclasses; the others, which
    include units with an anomalous image, are put into test. If no image is anomalous, all images are put into train.

    Raises:
        DataError: an anomalous image belongs to a unit in train or calibration.
    """
    contents = {sample.image_path: content(sample) for sample in samples}
    units = _units(samples, contents)
    drawn = [rows for rows in units if all(samples[row].split is None for row in rows)]
    clean = [rows for rows in drawn if all(samples[row].label == "normal" for row in rows)]
    if all(sample.label == "normal" for sample in samples):
        train = clean
    else:
        with_normal = sum(any(samples[row].label == "normal" for row in rows) for rows in drawn)
        picked = _pick(
            [Counter({samples[row].subclass_name for row in rows}) for rows in clean],
            [1] * len(clean),
            amount=math.ceil(with_normal / 2),
            generator=np.random.default_rng(seed),
        )
        train = [clean[unit] for unit in picked]
    in_train = {row for rows in train for row in rows}

    completed = list(samples)
    for rows in units:
        named = next((split for row in rows if (split := samples[row].split) is not None), None)
        for row in rows:
            sample = samples[row]
            if sample.split is not None:
                continue
            split = named or ("train" if row in in_train else "test")
            if sample.label == "anomalous" and split != "test":
                raise DataError(
                    f"{sample.image_path} is anomalous and has no split, but images of its group, or the same file, "
                    f"are in {split}. A group is never divided: move those to test, or rename the group."
                )
            completed[row] = replace(sample, split=split)
    _check_splits(completed, contents)
    return completed


def divide(
    samples: Sequence[Sample],
    *,
    method: Literal["auto", "split", "cross-validation"] = "auto",
    calibration_share: float,
    at_least: int,
    folds: int = 5,
    seed: int,
    content: Content = file_content,
) -> Division:
    """Return the normal images for fitting and for calibration, from the rows marked train and calibration.

    Rows marked calibration are used as such. Without any, the method decides.

    split: complete units are held out of train, balanced over the subclasses: `calibration_share` of the images, or
    more if `at_least` units need it, but never the last unit of a subclass. If `at_least` units cannot be held out,
    `calibration_share` of the images is.

    cross-validation: the units are divided into `folds` parts, or as many as there are units, balanced over the
    subclasses.

    auto: split, if `calibration_share` of the images is `at_least` units; otherwise cross-validation.

    Test rows are only checked to be different from the others.

    Raises:
        DataError: train is too small or has too few units, an anomalous image is marked train or calibration, or splits
            share a file or a group.
        ConfigError: rows are marked calibration, and the method is cross-validation.
    """
    if unsplit := [sample for sample in samples if sample.split is None]:
        raise DataError(f"Without a split: {_some(unsplit)}. Draw the missing splits with splits.complete.")
    if wrong := [sample for sample in samples if sample.label == "anomalous" and sample.split != "test"]:
        raise DataError(
            f"Anomalous, but marked train or calibration: {_some(wrong)}. Allowed: normal images only. "
            "Mark them test, or label them normal."
        )
    contents = {sample.image_path: content(sample) for sample in samples}
    _check_splits(samples, contents)
    train = [sample for sample in samples if sample.split == "train"]
    marked = [sample for sample in samples if sample.split == "calibration"]
    if marked and method == "cross-validation":
        raise ConfigError(
            f"{len(marked)} rows are marked calibration, and data.calibration is cross-validation, which chooses the "
            "images itself. Mark them train, or set data.calibration=split."
        )
    if len(train) < FEWEST_FIT:
        raise DataError(f"{len(train)} normal train images. At least {FEWEST_FIT} are needed. Add good images.")
    if marked:
        return Division(train, marked)
    units = _units(train, contents)
    names = [Counter(train[row].subclass_name for row in rows) for rows in units]
    sizes = [len(rows) for rows in units]

    most = len(train) - FEWEST_FIT

    def hold_out(least: int) -> list[int]:
        return _pick(
            names,
            sizes,
            amount=min(max(least, round(calibration_share * len(train))), most),
            least=least,
            most=most,
            keep=True,
            generator=np.random.default_rng(seed),
        )

    picked = hold_out(0 if method == "auto" else at_least)
    if len(picked) < at_least and method == "split":
        picked = hold_out(1)
        if not picked:
            raise DataError(
                f"{len(train)} normal train images are in {len(units)} groups, which are never divided. None can be "
                f"held out if each subclass keeps one, and {FEWEST_FIT} images are left to fit on. Add images of other "
                "groups, mark rows as calibration, or set data.calibration=cross-validation."
            )
    elif len(picked) < at_least or method == "cross-validation":
        return _cross_validation(train, units, names, folds=folds, seed=seed)
    held_out = {row for unit in picked for row in units[unit]}
    return Division(
        [sample for row, sample in enumerate(train) if row not in held_out],
        [sample for row, sample in enumerate(train) if row in held_out],
    )


def _cross_validation(
    train: list[Sample], units: Sequence[Sequence[int]], names: Sequence[Counter[str]], *, folds: int, seed: int
) -> Division:
    """Return a division whose folds hold about the same number of units, and of units of each subclass."""
    order = np.random.default_rng(seed).permutation(len(units)).tolist()
    order.sort(key=lambda unit: names[unit].most_common(1)[0][0])  # stable: the order within a subclass stays random
    count = min(folds, len(units))
    parts = [sorted(row for unit in order[fold::count] for row in units[unit]) for fold in range(count)]
    left = len(train) - max(len(part) for part in parts)
    if left < FEWEST_FIT:
        raise DataError(
            f"{len(train)} normal train images in {len(units)} groups, which are never divided. The largest part that "
            f"is held out leaves {left} to fit on; at least {FEWEST_FIT} are needed. Add good images of other groups: "
            "three images of three groups are enough to start."
        )
    return Division(train, train, tuple([train[row] for row in part] for part in parts))


def independent_groups(samples: Sequence[Sample], contents: Sequence[Hashable]) -> list[int]:
    """Return the number of the unit of each image: images with the same number are not independent.

    Args:
        contents: content of each image; equal values mean the same file.
    """
    units = _units(samples, {sample.image_path: each for sample, each in zip(samples, contents, strict=True)})
    numbers = [0] * len(samples)
    for number, rows in enumerate(units):
        for row in rows:
            numbers[row] = number
    return numbers


def holdout(groups: NDArray[np.int64], subclasses: NDArray[np.int64], *, share: float, seed: int) -> NDArray[np.bool_]:
    """Return which of n images are held out of gradient training, (n,): complete groups, about `share` of the images.

    Balanced over the subclasses. At least one group is held out, but never the last group of a subclass; all False if
    that is impossible.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups.tolist()):
        members[group].append(row)
    units = [members[group] for group in sorted(members)]
    picked = _pick(
        [Counter(str(subclasses[row]) for row in rows) for rows in units],
        [len(rows) for rows in units],
        amount=max(1, round(share * len(groups))),
        least=1,
        keep=True,
        generator=np.random.default_rng(seed),
    )
    held_out = np.zeros(len(groups), dtype=np.bool_)
    for unit in picked:
        held_out[units[unit]] = True
    return held_out


def shared(sets: Mapping[str, Sequence[Sample]], *, content: Content = file_content) -> Iterator[Shared]:
    """Yield every file and every group that is in two sets, once for each further set."""
    seen: dict[tuple[str, Hashable], dict[str, Sample]] = defaultdict(dict)
    for name, samples in sets.items():
        for sample in samples:
            for what, key in _keys(sample, content(sample)):
                where = seen[what, key]
                if where and name not in where:
                    first, there = next(iter(where.items()))
                    yield Shared(what, first, name, there, sample)
                where.setdefault(name, sample)


def _some(samples: Sequence[Sample]) -> str:
    """Return the first three paths and the number of others."""
    names = ", ".join(str(sample.image_path) for sample in samples[:3])
    return f"{names} and {len(samples) - 3} more" if len(samples) > 3 else names


def _check_splits(samples: Sequence[Sample], contents: Mapping[Path, Hashable]) -> None:
    """Raise DataError if a file or a group is in two splits."""
    sets = {split: [sample for sample in samples if sample.split == split] for split in SPLITS}
    for found in shared(sets, content=lambda sample: contents[sample.image_path]):
        raise DataError(
            f"{found} Train, calibration and test images must be different parts: put both into one split, or, if they "
            "are different parts, rename one of the groups."
        )


def _keys(sample: Sample, content: Hashable) -> Iterator[tuple[str, Hashable]]:
    """Yield the file and the group of an image; images with one of these in common belong to one unit."""
    yield "file", content
    if sample.group is not None:
        yield "group", sample.group


def _units(samples: Sequence[Sample], contents: Mapping[Path, Hashable]) -> list[list[int]]:
    """Return the rows of each unit, in the order of their first rows (union-find)."""
    parent = list(range(len(samples)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[tuple[str, Hashable], int] = {}
    for row, sample in enumerate(samples):
        for key in _keys(sample, contents[sample.image_path]):
            parent[root(row)] = root(first.setdefault(key, row))
    units: dict[int, list[int]] = defaultdict(list)
    for row in range(len(samples)):
        units[root(row)].append(row)
    return list(units.values())


def _pick(
    units: Sequence[Counter[str]],
    sizes: Sequence[int],
    *,
    amount: int,
    least: int = 0,
    most: int | None = None,
    keep: bool = False,
    generator: np.random.Generator,
) -> list[int]:
    """Return the indices of units drawn at random, so that about the same share of every subclass is drawn.

    Args:
        units: number of images of each subclass in each unit.
        sizes: size of each unit.
        amount: largest sum of sizes, unless `least` needs more.
        least: smallest number of units, as far as possible.
        most: largest sum of sizes, whatever `least` needs; None: no limit.
        keep: never draw the last unit of a subclass.
    """
    total: Counter[str] = Counter()  # images of each subclass
    left: Counter[str] = Counter()  # units of each subclass that are not drawn
    for unit in units:
        total.update(unit)
        left.update(unit.keys())
    names = sorted(total)
    queues: dict[str, list[int]] = {names[index]: [] for index in generator.permutation(len(names))}
    for number in generator.permutation(len(units)).tolist():
        for name in units[number]:
            queues[name].append(number)

    picked: dict[int, None] = {}
    drawn: Counter[str] = Counter()
    size = 0

    def take(number: int) -> None:
        nonlocal size
        if number in picked or (keep and min(left[name] for name in units[number]) == 1):
            return
        picked[number] = None
        drawn.update(units[number])
        left.subtract(units[number].keys())
        size += sizes[number]

    too_large = []
    while names := [name for name, queue in queues.items() if queue]:
        number = queues[min(names, key=lambda name: drawn[name] / total[name])].pop()
        if sizes[number] <= amount - size:
            take(number)
        else:
            too_large.append(number)
    for number in sorted(too_large, key=lambda number: sizes[number]):
        if len(picked) < least and (most is None or size + sizes[number] <= most):
            take(number)
    return list(picked)
