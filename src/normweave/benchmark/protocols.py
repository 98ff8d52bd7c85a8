"""Benchmark protocols: each divides a data set into folds of training and test images.

To add a protocol, write a function from `DrawnSplits` to folds and register it with `@register("name")`. A setting
of its own is a field of `ProtocolSettings`. Plans read and check both from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from normweave.data import splits
from normweave.errors import DataError, unknown
from normweave.types import Sample


@dataclass(frozen=True, kw_only=True)
class ProtocolSettings:
    """Settings of the protocols; keys of a data set in a plan."""

    unseen: tuple[str, ...] = ()
    """unseen-subclass: the subclasses that are only tested, as SUBCLASS or CATEGORY/SUBCLASS."""
    leave_out: int = 2
    """leave-k-out: the number of subclasses that a fold leaves out."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One training set and its test images; no group and no file is in both."""

    name: str
    samples: tuple[Sample, ...]
    """Training and calibration images, with every split set."""
    tests: dict[str, tuple[Sample, ...]]
    """Test images of `seen` and of `unseen` subclasses, by that name."""


@dataclass(frozen=True, kw_only=True)
class DrawnSplits:
    """A data set whose missing splits were drawn with the seed."""

    train: tuple[Sample, ...]
    """Training and calibration images."""
    test: tuple[Sample, ...]
    seed: int = 0
    settings: ProtocolSettings = field(default_factory=ProtocolSettings)

    @property
    def subclasses(self) -> list[str]:
        """`Sample.subclass_name` of every subclass with training images."""
        return sorted({sample.subclass_name for sample in self.train})

    @property
    def categories(self) -> list[str]:
        """Every category with training images."""
        return sorted({sample.category for sample in self.train})

    def fold(self, name: str, *, leave_out: Sequence[str] = (), category: str | None = None) -> Fold:
        """Return a fold that trains without the subclasses `leave_out`; None selects every category."""
        train, test = (
            [sample for sample in samples if category in (None, sample.category)] for samples in (self.train, self.test)
        )
        kept = tuple(sample for sample in train if sample.subclass_name not in leave_out)
        seen = {sample.subclass_name for sample in kept}
        tests = {
            "seen": tuple(sample for sample in test if sample.subclass_name in seen),
            "unseen": tuple(sample for sample in test if sample.subclass_name not in seen),
        }
        return Fold(name=name, samples=kept, tests={side: rows for side, rows in tests.items() if rows})


Divisions = dict[tuple[str, str, int], list[Fold]]
"""Folds of the data sets of a plan, by name of the data set, protocol and seed."""

Protocol = Callable[[DrawnSplits], list[Fold]]
PROTOCOLS: dict[str, Protocol] = {}
"""The protocols by their name in a plan."""


def register(name: str) -> Callable[[Protocol], Protocol]:
    """Register a protocol under a name."""

    def add(protocol: Protocol) -> Protocol:
        PROTOCOLS[name] = protocol
        return protocol

    return add


def folds(
    samples: Sequence[Sample], protocol: str, settings: ProtocolSettings | None = None, *, seed: int
) -> list[Fold]:
    """Return the folds of a protocol.

    Missing splits are drawn with the seed by whole groups: a physical part with test images has no training image
    under any condition.

    Raises:
        ConfigError: the protocol is unknown.
        DataError: too few subclasses or categories for the protocol, or an unseen subclass that the data lacks.
    """
    check_protocol(protocol)
    complete = splits.complete(samples, seed=seed)
    split = DrawnSplits(
        train=tuple(sample for sample in complete if sample.split != "test"),
        test=tuple(sample for sample in complete if sample.split == "test"),
        seed=seed,
        settings=settings or ProtocolSettings(),
    )
    return PROTOCOLS[protocol](split)


def check_protocol(name: str) -> None:
    """Raise ConfigError if the protocol is unknown."""
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS, "See docs/how-to/reproduce-a-table.md.")


@register("seen")
def _seen(split: DrawnSplits) -> list[Fold]:
    """Train and test on every subclass; test images of other subclasses are left out."""
    fold = split.fold("all")
    return [Fold(name="all", samples=fold.samples, tests={"seen": fold.tests.get("seen", ())})]


@register("given")
def _given(split: DrawnSplits) -> list[Fold]:
    """Use the splits of the data set; subclasses without training images are tested as unseen."""
    return [split.fold("all")]


@register("unseen-subclass")
def _unseen_subclass(split: DrawnSplits) -> list[Fold]:
    """Test the subclasses `unseen` without training on them."""
    unseen = split.settings.unseen
    known = {sample.subclass_name: sample.subclass for sample in (*split.train, *split.test)}
    absent = [name for name in unseen if name not in known and name not in known.values()]
    if absent or not unseen:
        raise DataError(
            "unseen-subclass needs the subclasses that are only tested (unseen: [..]), got "
            f"{list(unseen)}, not in the data: {absent or 'none'}. Known: {', '.join(sorted(known))}."
        )
    left_out = sorted(name for name, subclass in known.items() if name in unseen or subclass in unseen)
    if not set(split.subclasses) - set(left_out):
        raise DataError(
            f"unseen-subclass: no training images are left without {', '.join(left_out)}. Name fewer subclasses."
        )
    return [split.fold("fixed", leave_out=left_out)]


@register("leave-one-subclass-out")
def _leave_one_subclass_out(split: DrawnSplits) -> list[Fold]:
    """Leave out each subclass in turn: train on the others, and test on it alone."""
    if len(split.subclasses) < 2:
        raise DataError(
            "leave-one-subclass-out needs at least two subclasses with training images, "
            f"got {split.subclasses}. Use the protocol 'seen', or name the subclasses (subclass_from)."
        )
    return [
        Fold(
            name=f"without {name.split('/')[-1] if len(split.categories) == 1 else name}",
            samples=tuple(sample for sample in split.train if sample.subclass_name != name),
            tests={"unseen": tuple(sample for sample in split.test if sample.subclass_name == name)},
        )
        for name in split.subclasses
    ]


@register("leave-k-out")
def _leave_k_out(split: DrawnSplits) -> list[Fold]:
    """Divide the subclasses of each category at random into sets of `leave_out`; leave each set out once."""
    size = split.settings.leave_out
    if size < 1:
        raise DataError(f"leave-k-out: leave_out must be 1 or more, got {size}.")
    generator = np.random.default_rng(split.seed)
    made = []
    for category in split.categories:
        names = sorted({sample.subclass_name for sample in split.train if sample.category == category})
        if len(names) <= size:
            continue
        shuffled = [names[number] for number in generator.permutation(len(names))]
        for start in range(0, len(shuffled), size):
            left_out = sorted(shuffled[start : start + size])
            made.append(split.fold(f"without {', '.join(left_out)}", leave_out=left_out))
    if not made:
        raise DataError(
            f"leave-k-out needs a category with more than {size} subclasses that have training images, got "
            f"{split.subclasses}. Set leave_out lower, or name the subclasses (subclass_from)."
        )
    return made


@register("multi-category")
def _multi_category(split: DrawnSplits) -> list[Fold]:
    """Train one model for all categories."""
    if len(split.categories) < 2:
        raise DataError(
            f"multi-category needs at least two categories with training images, got {split.categories}. Use the "
            "protocol 'seen', or join data sets (parts)."
        )
    return [split.fold("all")]


@register("one-per-category")
def _one_per_category(split: DrawnSplits) -> list[Fold]:
    """Train one model for each category; test it on the subclasses of that category with training images."""
    made = (split.fold(category, category=category) for category in split.categories)
    return [Fold(name=fold.name, samples=fold.samples, tests={"seen": fold.tests.get("seen", ())}) for fold in made]
