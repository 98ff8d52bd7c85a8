"""Numbers of images in published data sets, for `normweave data check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from normweave.types import Sample


class Count(NamedTuple):
    """Images of one category."""

    train: int
    test_good: int
    test_anomalous: int

    def __str__(self) -> str:
        return f"{self.train} train, {self.test_good} good and {self.test_anomalous} anomalous test images"


PUBLISHED: dict[str, dict[str, Count]] = {
    # Bergmann et al. 2019, table 1; 3629, 467 and 1258 in all
    "mvtec_ad": {
        "bottle": Count(209, 20, 63),
        "cable": Count(224, 58, 92),
        "capsule": Count(219, 23, 109),
        "carpet": Count(280, 28, 89),
        "grid": Count(264, 21, 57),
        "hazelnut": Count(391, 40, 70),
        "leather": Count(245, 32, 92),
        "metal_nut": Count(220, 22, 93),
        "pill": Count(267, 26, 141),
        "screw": Count(320, 41, 119),
        "tile": Count(230, 33, 84),
        "toothbrush": Count(60, 12, 30),
        "transistor": Count(213, 60, 40),
        "wood": Count(247, 19, 60),
        "zipper": Count(240, 32, 119),
    },
    # split_csv/1cls.csv of amazon-science/spot-diff; 8659, 962 and 1200 in all
    "visa": {
        "candle": Count(900, 100, 100),
        "capsules": Count(542, 60, 100),
        "cashew": Count(450, 50, 100),
        "chewinggum": Count(453, 50, 100),
        "fryum": Count(450, 50, 100),
        "macaroni1": Count(900, 100, 100),
        "macaroni2": Count(900, 100, 100),
        "pcb1": Count(904, 100, 100),
        "pcb2": Count(901, 100, 100),
        "pcb3": Count(905, 101, 100),
        "pcb4": Count(904, 101, 100),
        "pipe_fryum": Count(450, 50, 100),
    },
    # Mishra et al. 2021; 1799, 451 and 290 in all
    "btad": {"01": Count(400, 21, 49), "02": Count(399, 30, 200), "03": Count(1000, 400, 41)},
    # Jezek et al. 2021; 888, 176 and 282 in all
    "mpdd": {
        "bracket_black": Count(289, 32, 47),
        "bracket_brown": Count(185, 26, 51),
        "bracket_white": Count(110, 30, 30),
        "connector": Count(128, 30, 14),
        "metal_plate": Count(54, 26, 71),
        "tubes": Count(122, 32, 69),
    },
}


def differences(samples: Sequence[Sample], layout: str | None) -> Iterator[str]:
    """Yield an error text for each category whose number of images differs; missing categories are allowed."""
    for category, wanted in PUBLISHED.get(layout or "", {}).items():
        own = [sample for sample in samples if sample.category == category]
        found = Count(
            sum(sample.split == "train" for sample in own),
            sum(sample.split == "test" and sample.label == "normal" for sample in own),
            sum(sample.split == "test" and sample.label == "anomalous" for sample in own),
        )
        if own and found != wanted:
            yield f"{category} of {layout} has {found}; published are {wanted}. Unpack the data set again."
