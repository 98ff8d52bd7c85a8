"""Quantize a detector and check on labelled images how much accuracy int8 loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normweave import fitting
from normweave.benchmark.evaluate import measure
from normweave.detector import Detector
from normweave.errors import CheckError, DataError
from normweave.types import Progress, Sample

LARGEST_LOSS = 0.005
"""Largest difference by which an AUROC in [0, 1] may fall."""
COMPARED = ("image_auroc", "pixel_auroc")


def quantize_and_check(
    detector: Detector, labelled: Sequence[Sample] | None, *, progress: Progress | None = None
) -> Detector:
    """Return a newly fitted detector with its backbone in int8; raise CheckError if its AUROCs fall too far.

    The record has the AUROCs in float and in int8 under `int8_check`; None if they were not compared.

    Args:
        labelled: normal and anomalous images that training has not seen, with or without masks; None: no check.

    Raises:
        DataError: no image of one of the two labels can be read, or an image was used in training.
        CheckError: an AUROC loses more than `LARGEST_LOSS`.
    """
    quantized = fitting.quantize(detector, progress=progress)
    if labelled is None:
        quantized.record["int8_check"] = None
        return quantized
    before, after = (_auroc(each, labelled, progress) for each in (detector, quantized))
    lost = [
        f"{name} from {before[name]:.4f} to {after[name]:.4f}"
        for name in COMPARED
        if before[name] is not None and before[name] - after[name] > LARGEST_LOSS
    ]
    if lost:
        raise CheckError(
            f"int8 loses {' and '.join(lost)} on {len(labelled)} labelled images; {LARGEST_LOSS:g} is allowed. So no "
            "bundle is written. Train without --int8, or choose another backbone."
        )
    quantized.record["int8_check"] = {
        "images": len(labelled),
        **{name: [before[name], after[name]] for name in COMPARED},
    }
    return quantized


def _auroc(detector: Detector, labelled: Sequence[Sample], progress: Progress | None) -> dict[str, Any]:
    pooled: dict[str, Any] = measure(detector, labelled, progress=progress)[0]["pooled"]
    if pooled["image_auroc"] is None:
        raise DataError(
            f"The cost of int8 cannot be measured on {pooled['n_normal']} normal and {pooled['n_anomalous']} anomalous "
            "images: both labels are needed. Give --int8-check test images of both labels, or leave it out."
        )
    return pooled
