"""Which images train and which test: each protocol turns a data set into folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np

from normweave.data import splits
from normweave.errors import DataError
from normweave.types import Sample

Protocol = Literal[
    "seen",
    "given",
    "unseen-subclass",
    "leave-one-subclass-out",
    "leave-k-out",
    "multi-category",
    "one-per-category",
]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One training and its test images; no group and no file stands on both sides."""

    name: str
    samples: tuple[Sample, ...]
    """With every split set; `Detector.fit` reads the train rows, the tests below the others."""
    tests: dict[str, tuple[Sample, ...]]
    """Test images by side: `seen` and `unseen` kinds."""


def folds(
    samples: Sequence[Sample],
    protocol: Protocol,
    *,
    seed: int,
    unseen: Sequence[str] = (),
    leave_out: int = 2,
) -> list[Fold]:
    """The folds of a protocol.

    seen: every subclass trains and is tested. given: the splits of the data set, test images of subclasses without
    training images apart. unseen-subclass: the subclasses named `unseen` only test, the others do both.
    leave-one-subclass-out: for each subclass, train on the others and test on it. leave-k-out: the subclasses of each
    category are dealt with the seed into hands of `leave_out`; for each hand, train without it and test on it and on
    the others apart. multi-category: one model for all categories. one-per-category: one for each.

    Missing splits are drawn with the seed by whole groups, so that the physical parts that test have not trained,
    under no condition.

    Args:
        unseen: SUBCLASS or CATEGORY/SUBCLASS.

    Raises:
        DataError: too few subclasses or categories for the protocol, or an unseen one that is not there.
    """
    complete = splits.complete(samples, seed=seed)
    train = tuple(sample for sample in complete if sample.split != "test")
    test = tuple(sample for sample in complete if sample.split == "test")
    trained = {sample.subclass_name for sample in train}

    def without(left_out: set[str], name: str) -> Fold:
        kept = tuple(sample for sample in train if sample.subclass_name not in left_out)
        known = {sample.subclass_name for sample in kept}
        sides = {
            "seen": tuple(sample for sample in test if sample.subclass_name in known),
            "unseen": tuple(sample for sample in test if sample.subclass_name not in known),
        }
        return Fold(name=name, samples=kept, tests={side: rows for side, rows in sides.items() if rows})

    match protocol:
        case "seen":
            return [
                Fold(
                    name="all",
                    samples=train,
                    tests={"seen": tuple(s for s in test if s.subclass_name in trained)},
                )
            ]
        case "given":
            return [without(set(), "all")]
        case "unseen-subclass":
            return [without(_named(complete, unseen), "fixed")]
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
                    samples=tuple(sample for sample in train if sample.subclass_name != kind),
                    tests={"unseen": tuple(sample for sample in test if sample.subclass_name == kind)},
                )
                for kind in sorted(trained)
            ]
        case "leave-k-out":
            return [
                without(set(hand), f"without {', '.join(hand)}")
                for hand in _hands(train, leave_out, seed=seed)
            ]
        case "multi-category":
            categories = _categories(train)
            if len(categories) < 2:
                raise DataError(
                    f"multi-category needs at least two categories with training images, got {categories}. Use the "
                    "protocol 'seen', or join data sets (parts)."
                )
            return [without(set(), "all")]
        case "one-per-category":
            return [
                Fold(
                    name=category,
                    samples=tuple(sample for sample in train if sample.category == category),
                    tests={
                        "seen": tuple(
                            s for s in test if s.category == category and s.subclass_name in trained
                        )
                    },
                )
                for category in _categories(train)
            ]
        case _:
            assert_never(protocol)


def _categories(samples: Sequence[Sample]) -> list[str]:
    return sorted({sample.category for sample in samples})


def _named(samples: Sequence[Sample], unseen: Sequence[str]) -> set[str]:
    """The kinds that a plan names, which are some of them, but not all that could train."""
    kinds = {sample.subclass_name: sample.subclass for sample in samples}
    absent = [name for name in unseen if name not in kinds and name not in kinds.values()]
    if absent or not unseen:
        raise DataError(
            f"unseen-subclass needs the subclasses that only test (unseen: [..]); got {list(unseen)}, of which "
            f"{absent or 'none'} are not there. Known: {', '.join(sorted(kinds))}."
        )
    named = {kind for kind, subclass in kinds.items() if kind in unseen or subclass in unseen}
    if not any(sample.subclass_name not in named for sample in samples if sample.split != "test"):
        raise DataError(
            f"unseen-subclass: without {', '.join(sorted(named))} nothing is left to train on. Name fewer."
        )
    return named


def _hands(train: Sequence[Sample], size: int, *, seed: int) -> list[list[str]]:
    """Kinds, dealt by category, each in one hand; categories too small to lose a hand are not dealt."""
    if size < 1:
        raise DataError(f"leave-k-out: leave_out must be 1 or more, got {size}.")
    generator = np.random.default_rng(seed)
    hands = []
    for category in _categories(train):
        kinds = sorted({sample.subclass_name for sample in train if sample.category == category})
        if len(kinds) <= size:
            continue
        dealt = [kinds[number] for number in generator.permutation(len(kinds))]
        hands += [sorted(dealt[start : start + size]) for start in range(0, len(dealt), size)]
    if not hands:
        raise DataError(
            f"leave-k-out needs a category with more than {size} subclasses that have training images, got "
            f"{sorted({sample.subclass_name for sample in train})}. Set leave_out lower, or name the subclasses "
            "(subclass_from)."
        )
    return hands
