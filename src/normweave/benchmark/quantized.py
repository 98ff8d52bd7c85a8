"""A detector in int8, and the gate that it passes before anyone relies on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normweave.benchmark.evaluate import measure
from normweave.detector import Detector
from normweave.errors import CheckError, DataError
from normweave.types import Progress, Sample

MOST_LOST = 0.005
"""Of an AUROC, as a share."""
COMPARED = ("image_auroc", "pixel_auroc")


def quantize(
    detector: Detector, labelled: Sequence[Sample] | None, *, progress: Progress | None = None
) -> None:
    """Compute the backbone of a detector just fitted in int8, and look what that costs on labelled images.

    Both AUROCs, float and int8, go to the detector's record under `int8_check`; None says that nobody looked.

    Args:
        labelled: normal and anomalous images that training has not seen; masks, where there are some, count too.

    Raises:
        DataError: of one of the two labels no image can be read, or an image was used in training.
        CheckError: an AUROC loses more than half a point.
    """
    before = None if labelled is None else _auroc(detector, labelled, progress)
    detector.quantize(progress=progress)
    if labelled is None or before is None:
        detector.record |= {"int8_check": None}
        return
    after = _auroc(detector, labelled, progress)
    lost = [
        f"{name} from {before[name]:.4f} to {after[name]:.4f}"
        for name in COMPARED
        if before[name] is not None and before[name] - after[name] > MOST_LOST
    ]
    if lost:
        raise CheckError(
            f"int8 loses {' and '.join(lost)} on {len(labelled)} labelled images; {MOST_LOST:g} is allowed. So no "
            "bundle is written. Train without --int8, or choose another backbone."
        )
    detector.record |= {
        "int8_check": {"images": len(labelled)} | {name: [before[name], after[name]] for name in COMPARED}
    }


def _auroc(detector: Detector, labelled: Sequence[Sample], progress: Progress | None) -> dict[str, Any]:
    pooled: dict[str, Any] = measure(detector, labelled, progress=progress)[0]["pooled"]
    if pooled["image_auroc"] is None:
        raise DataError(
            f"Whether int8 is good enough cannot be told by {pooled['n_normal']} normal and {pooled['n_anomalous']} "
            "anomalous images: it takes both. Give --int8-check test images of both labels, or leave it out."
        )
    return pooled
