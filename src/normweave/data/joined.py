"""Join several data sets, so that one detector learns all their categories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from normweave.errors import DataError
from normweave.types import Sample


def join(sets: Sequence[tuple[str, Sequence[Sample]]]) -> list[Sample]:
    """Return the samples of all data sets, one set after the other.

    Group names get the first category of their set as a prefix, so that the groups `part1` of two sets stay two groups.
    A single set is returned unchanged.

    Args:
        sets: (name of the set for errors, its samples).

    Raises:
        DataError: two sets have a category of the same name.
    """
    if len(sets) == 1:
        return list(sets[0][1])
    owner: dict[str, str] = {}
    joined = []
    for name, samples in sets:
        categories = sorted({sample.category for sample in samples})
        for category in categories:
            if category in owner:
                raise DataError(
                    f"Category {category!r} is in {owner[category]} and in {name}. Categories of joined data sets "
                    "must have different names: rename a folder, or write one set as a manifest and change its "
                    "column category. If both contain the same product, put them into one folder or one manifest."
                )
        owner |= dict.fromkeys(categories, name)
        joined += [
            replace(sample, group=None if sample.group is None else f"{categories[0]}/{sample.group}")
            for sample in samples
        ]
    return joined
