"""Which images train and which test: each protocol turns a data set into folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from normweave.data import splits
from normweave.errors import DataError
from normweave.types import Sample

Protocol = Literal["seen", "leave-one-subclass-out", "given"]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One training and its test images; no group and no file stands on both sides."""

    name: str
    samples: tuple[Sample, ...]
    """With every split set; `Detector.fit` reads the train rows, the tests below the others."""
    tests: dict[str, tuple[Sample, ...]]
    """Test images by side: `seen` and `unseen` kinds."""


def folds(samples: Sequence[Sample], protocol: Protocol, *, seed: int) -> list[Fold]:
    """The folds of a protocol.

    seen: every subclass trains and is tested. leave-one-subclass-out: for each subclass, train on the others and test
    on it. given: the splits of the data set, test images of subclasses without training images apart.

    Missing splits are drawn with the seed by whole groups, so that the physical parts that test have not trained,
    under no condition.

    Raises:
        DataError: leave-one-subclass-out on data with fewer than two subclasses.
    """
    complete = splits.complete(samples, seed=seed)
    train = tuple(sample for sample in complete if sample.split != "test")
    test = tuple(sample for sample in complete if sample.split == "test")
    trained = {sample.kind for sample in train}
    match protocol:
        case "seen":
            return [
                Fold(name="all", samples=train, tests={"seen": tuple(s for s in test if s.kind in trained)})
            ]
        case "given":
            seen = tuple(sample for sample in test if sample.kind in trained)
            unseen = tuple(sample for sample in test if sample.kind not in trained)
            sides = {"seen": seen, "unseen": unseen}
            return [
                Fold(name="all", samples=train, tests={side: rows for side, rows in sides.items() if rows})
            ]
        case "leave-one-subclass-out":
            if len(trained) < 2:
                raise DataError(
                    "leave-one-subclass-out needs at least two subclasses with training images, "
                    f"got {sorted(trained)}. Use the protocol 'seen', or name the subclasses (subclass_from)."
                )
            alone = len({sample.category for sample in train}) == 1
            return [
                Fold(
                    name=f"without {kind.split('/')[-1] if alone else kind}",
                    samples=tuple(sample for sample in train if sample.kind != kind),
                    tests={"unseen": tuple(sample for sample in test if sample.kind == kind)},
                )
                for kind in sorted(trained)
            ]
        case _:
            assert_never(protocol)
