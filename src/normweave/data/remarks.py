"""Remarks on a data set: what may be a mistake, but stops no run."""

from __future__ import annotations

import os
from collections.abc import Sequence

from normweave.data.images import highest_of_16_bits
from normweave.data.layouts import unused
from normweave.errors import ImageError
from normweave.types import Sample

CAMERA_BITS = (10, 12)


def remarks(root: str | os.PathLike[str], samples: Sequence[Sample]) -> list[str]:
    """Return remarks on images below a folder that are not used, and on a camera of 10 or 12 bits in 16-bit files."""
    found = []
    if others := unused(root, samples):
        found.append(
            f"{len(others)} images are not used, for example {others[0]}: they are neither images nor masks of the "
            "layout. Move or rename them if they should be, or write a manifest."
        )
    return found + dark(samples)


def dark(samples: Sequence[Sample]) -> list[str]:
    """Return a remark if the 16-bit files among some images have the values of a camera of 10 or 12 bits."""
    highest, count = 0, 0
    for sample in samples:
        try:
            value = highest_of_16_bits(sample.image_path)
        except ImageError:  # a fault
            continue
        if value is not None:
            highest, count = max(highest, value), count + 1
        if highest >= 2 ** max(CAMERA_BITS):
            return []
    if highest == 0:
        return []
    bits = next(bits for bits in CAMERA_BITS if highest < 2**bits)
    return [
        f"all {count} images with 16 bits have values up to {highest} of 65535, as from a camera with {bits} bits: "
        f"they are read as nearly black. Multiply their values by {2 ** (16 - bits)} when saving them, in training and "
        "on the line."
    ]
