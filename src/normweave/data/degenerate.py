"""Refuse training images from which nothing can be learned: of one colour, or copies of a picture or of a subclass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave.data.images import decode
from normweave.errors import DataError
from normweave.types import Sample

SAME = 1
"""Pictures whose values of 0..255 differ by at most this everywhere are the same: rounding can differ so."""
FEWEST = 3
"""Different pictures that a category needs, as many as the fewest images of a training."""


class Pictures(NamedTuple):
    """What some images show."""

    different: int
    """Different pictures with any structure; counting stops at the number that was asked for."""
    plain: int
    """Images of one colour."""


def refuse_degenerate(samples: Sequence[Sample]) -> None:
    """Check that the good images of each category and subclass differ. Only as many are decoded as this takes.

    Args:
        samples: readable images.

    Raises:
        DataError: a category has images of one colour only, or fewer than `FEWEST` different pictures among more
            images; or all images of a subclass, at least two, show the same picture.
    """
    for category in sorted({sample.category for sample in samples}):
        inside = [sample for sample in samples if sample.category == category]
        found = count(inside, at_most=FEWEST)
        if found.different < min(FEWEST, len(inside)):
            raise DataError(_explained(f"category {category}", inside, found))
        for subclass in sorted({sample.subclass for sample in inside if sample.subclass is not None}):
            own = [sample for sample in inside if sample.subclass == subclass]
            found = count(own, at_most=2)
            if len(own) > 1 and (found.different == 0 or found.different + found.plain == 1):
                raise DataError(_explained(f"subclass {subclass} of category {category}", own, found))


def refuse_repeated_subclass(samples: Sequence[Sample], contents: Sequence[Hashable]) -> None:
    """Check that no two subclasses are the same files: an image would be equally near to both.

    Args:
        contents: content of each image; equal values mean the same file.

    Raises:
        DataError: two are.
    """
    files: defaultdict[str, set[Hashable]] = defaultdict(set)
    first: dict[str, Sample] = {}
    for sample, content in zip(samples, contents, strict=True):
        files[sample.subclass_name].add(content)
        first.setdefault(sample.subclass_name, sample)
    seen: dict[frozenset[Hashable], str] = {}
    for name, own in files.items():
        if (other := seen.setdefault(frozenset(own), name)) != name:
            raise DataError(
                f"Subclasses {other} and {name} are copies of the same {len(own)} files, such as "
                f"{first[other].image_path}. An image cannot be told to be of one of them. Give each image one "
                "subclass: correct the labels, or remove one of the copies."
            )


def count(samples: Iterable[Sample], *, at_most: int) -> Pictures:
    """Count the different pictures of images, up to a number of them with any structure."""
    different: list[NDArray[np.uint8]] = []
    plain = 0
    for sample in samples:
        pixels = decode(sample.image_path)
        if not np.ptp(pixels, axis=(0, 1)).any():
            plain += 1
        elif not any(_same(pixels, other) for other in different):
            different.append(pixels)
            if len(different) == at_most:
                break
    return Pictures(len(different), plain)


def _same(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    return one.shape == other.shape and bool((np.maximum(one, other) - np.minimum(one, other)).max() <= SAME)


def _explained(what: str, samples: Sequence[Sample], found: Pictures) -> str:
    first = samples[0].image_path
    if found.different == 0:
        colour = ", ".join(str(value) for value in decode(first)[0, 0])
        return (
            f"Each of the {len(samples)} good images of {what} has one colour only, without any structure; {first} is "
            f"{colour} (red, green, blue of 0 to 255). Nothing can be learned from them. Check exposure, lens cap and "
            "export of the images."
        )
    if found.different == 1 and found.plain == 0:
        got = f"show the same picture, such as {first}: no value of 0 to 255 differs by more than {SAME}"
    else:
        got = f"show fewer than {FEWEST} pictures: {found.different} with any structure, {found.plain} of one colour"
    return (
        f"The {len(samples)} good images of {what} {got}. The normal variation cannot be learned from them. Give "
        f"pictures of at least {FEWEST} different parts; if a camera of 10 or 12 bits saved dark images of 16 bits, "
        "scale their values first."
    )
