"""Fit, calibration and test images, disjoint by construction: no file and no physical part is in two of them.

What may not be divided is a *unit*: images that share a group, or the content of their files, or that are linked
by a chain of such images.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave.data.images import content_hash
from normweave.errors import CheckError, DataError, ImageError
from normweave.types import Sample

FEWEST_FIT = 2
"""Images that must be left to fit on: a deviation needs two."""

Content = Callable[[Sample], Hashable]


class Division(NamedTuple):
    """Normal images to learn from, and others to draw the operating points from."""

    fit: list[Sample]
    calibration: list[Sample]


class Shared(NamedTuple):
    """A file or a group that lies in two sets."""

    what: str  # "file" or "group"
    first: str  # names of the sets
    second: str
    here: Sample  # one image of each set
    there: Sample

    def __str__(self) -> str:
        if self.what == "file":
            return (
                f"The same file is in {self.first} and {self.second}: {self.here.image_path} and "
                f"{self.there.image_path}."
            )
        return (
            f"Group {self.here.group!r} is in {self.first} and {self.second}: {self.here.image_path} and "
            f"{self.there.image_path}."
        )


def file_content(sample: Sample) -> Hashable:
    """What makes two images the same file: the hash of the bytes; a file without bytes is only itself."""
    try:
        return content_hash(sample.image_path)
    except ImageError:
        return str(sample.image_path)


def complete(samples: Sequence[Sample], *, seed: int, content: Content = file_content) -> list[Sample]:
    """The same images in the same order, each with a split; splits that are named stay as they are.

    Images without one follow their unit. Where it has none either: units that hold an anomalous image go to test; of
    the units that hold normal images half are drawn to train, balanced over the subclasses, the others test (units
    that went to test for an anomalous image count among those). Without any anomalous image nothing can be tested
    and all normal images train.

    Raises DataError where an anomalous image would have to follow its unit into train or calibration.
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
                    f"are in {split}. A group is never divided: move those to test, or name the group differently."
                )
            completed[row] = replace(sample, split=split)
    _check_splits(completed, contents)
    return completed


def divide(
    samples: Sequence[Sample],
    *,
    calibration_share: float,
    at_least: int,
    seed: int,
    content: Content = file_content,
) -> Division:
    """Normal images to fit on and to calibrate with, from the rows marked train and calibration.

    Calibration rows are used as they are marked. Where none is, whole units are held out of train, balanced over the
    subclasses: `calibration_share` of the images, or `at_least` of them if that is more, and never the last unit of a
    subclass. Test rows are only looked at to make sure that they are others.

    Raises DataError where there is nothing to fit on, where an anomalous image is marked train or calibration, and
    where splits share a file or a group; CheckError where there are too few images or units for `at_least`.
    """
    if unsplit := [sample for sample in samples if sample.split is None]:
        raise DataError(
            f"Without a split: {_some(unsplit)}. Draw the missing ones first, with splits.complete."
        )
    if wrong := [sample for sample in samples if sample.label == "anomalous" and sample.split != "test"]:
        raise DataError(
            f"Anomalous, but marked train or calibration: {_some(wrong)}. Only normal images may be fitted on or "
            "calibrated with: mark them test, or label them normal."
        )
    contents = {sample.image_path: content(sample) for sample in samples}
    _check_splits(samples, contents)
    train = [sample for sample in samples if sample.split == "train"]
    marked = [sample for sample in samples if sample.split == "calibration"]
    need = at_least + FEWEST_FIT
    if marked:
        if len(train) < FEWEST_FIT or len(marked) < at_least:
            raise CheckError(
                f"{len(train)} train and {len(marked)} calibration images are marked. At least {FEWEST_FIT} and "
                f"{at_least} are needed: add normal images, mark fewer or more of them calibration, or allow a higher "
                "rate (outcome.false_alarm_rate)."
            )
        return Division(train, marked)
    if len(train) < FEWEST_FIT:
        raise DataError(
            f"{len(train)} normal train images; at least {FEWEST_FIT} are needed to fit on. Add good images."
        )
    if len(train) < need:
        raise CheckError(
            f"{len(train)} normal train images. At least {need} are needed: {FEWEST_FIT} to fit on and {at_least} held "
            "out for the operating point. Add normal images, or allow a higher rate (outcome.false_alarm_rate)."
        )
    units = _units(train, contents)
    sizes = [len(rows) for rows in units]
    picked = _pick(
        [Counter(train[row].subclass_name for row in rows) for rows in units],
        sizes,
        amount=min(max(at_least, round(calibration_share * len(train))), len(train) - FEWEST_FIT),
        least=at_least,
        keep=True,
        generator=np.random.default_rng(seed),
    )
    held_out = {row for unit in picked for row in units[unit]}
    if len(held_out) < at_least:
        raise DataError(
            f"{len(train)} normal train images lie in {len(units)} groups, which are never divided (the largest has "
            f"{max(sizes)}). Leaving each subclass at least one group to fit on, "
            f"{len(held_out)} can be held out; {at_least} are needed. Add images of other groups, mark rows as "
            "calibration, or allow a higher rate (outcome.false_alarm_rate)."
        )
    return Division(
        [sample for row, sample in enumerate(train) if row not in held_out],
        [sample for row, sample in enumerate(train) if row in held_out],
    )


def holdout(
    groups: NDArray[np.int64], subclasses: NDArray[np.int64], *, share: float, seed: int
) -> NDArray[np.bool_]:
    """Which of n images gradients must not see: whole groups, about `share` of the images, at least one group.

    Balanced over the subclasses, none of which loses its last group; all False where that leaves nothing to hold out.
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


def check_disjoint(
    fit: Sequence[Sample],
    calibration: Sequence[Sample],
    test: Sequence[Sample],
    *,
    content: Content = file_content,
) -> None:
    """Raise DataError where a file or a group lies in two of the three sets."""
    for found in shared({"fit": fit, "calibration": calibration, "test": test}, content=content):
        raise DataError(
            f"{found} What is learnt from must not be tested on: put both into one split, or, if they are different "
            "parts, name their groups differently."
        )


def shared(sets: Mapping[str, Sequence[Sample]], *, content: Content = file_content) -> Iterator[Shared]:
    """Every file and every group that lies in two sets, named once for each further set."""
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
    """The first few by name, and how many more."""
    names = ", ".join(str(sample.image_path) for sample in samples[:3])
    more = f" and {len(samples) - 3} more" if len(samples) > 3 else ""
    return f"{names}{more}"


def _check_splits(samples: Sequence[Sample], contents: Mapping[Path, Hashable]) -> None:
    train, calibration, test = (
        [sample for sample in samples if sample.split == split] for split in ("train", "calibration", "test")
    )
    check_disjoint(train, calibration, test, content=lambda sample: contents[sample.image_path])


def _keys(sample: Sample, content: Hashable) -> Iterator[tuple[str, Hashable]]:
    """What ties an image to others."""
    yield "file", content
    if sample.group is not None:
        yield "group", sample.group


def _units(samples: Sequence[Sample], contents: Mapping[Path, Hashable]) -> list[list[int]]:
    """Rows that belong together, in the order of their first rows: the connected parts of a union-find forest."""
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
    keep: bool = False,
    generator: np.random.Generator,
) -> list[int]:
    """Units drawn at random, so that every kind gives about the same share of what it has.

    Together no larger than `amount`, except where `least` cannot be had otherwise. With `keep` the last unit of a kind
    is never drawn. `units` counts what each holds of each kind; `sizes` says what it adds to the amount.
    """
    whole: Counter[str] = Counter()
    left: Counter[str] = Counter()  # units of each kind that are not drawn
    for unit in units:
        whole.update(unit)
        left.update(unit.keys())
    kinds = sorted(whole)
    waiting: dict[str, list[int]] = {kinds[place]: [] for place in generator.permutation(len(kinds))}
    for unit_number in generator.permutation(len(units)).tolist():
        for kind in units[unit_number]:
            waiting[kind].append(unit_number)

    picked: dict[int, None] = {}
    got: Counter[str] = Counter()
    total = 0

    def take(number: int) -> None:
        nonlocal total
        if number in picked or (keep and min(left[kind] for kind in units[number]) == 1):
            return
        picked[number] = None
        got.update(units[number])
        left.subtract(units[number].keys())
        total += sizes[number]

    put_off = []
    while open_kinds := [kind for kind, numbers in waiting.items() if numbers]:
        number = waiting[min(open_kinds, key=lambda kind: got[kind] / whole[kind])].pop()
        if sizes[number] <= amount - total:
            take(number)
        else:
            put_off.append(number)
    for number in sorted(put_off, key=lambda number: sizes[number]):
        if total < least:
            take(number)
    return list(picked)
