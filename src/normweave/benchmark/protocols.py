"""Benchmark protocols: each divides a data set into folds of training and test images.

To add a protocol, write a function from `DrawnSplits` to folds and register it with `@register("name")`. A setting
of its own is a field of `ProtocolSettings`. Plans read and check both from here. `train_images` and `contamination`
change the training images of the folds of every protocol.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from normweave.data import splits
from normweave.errors import ConfigError, DataError, unknown
from normweave.types import Sample


@dataclass(frozen=True, kw_only=True)
class ProtocolSettings:
    """Settings of the protocols; keys of a data set in a plan."""

    unseen: tuple[str, ...] = ()
    """unseen-subclass: the subclasses that are only tested, as SUBCLASS or CATEGORY/SUBCLASS."""
    leave_out: int = 2
    """leave-k-out: the number of subclasses that a fold leaves out."""
    train_images: int = 0
    """Largest number of good training images of a fold, balanced over the subclasses; 0: all."""
    contamination: float = 0.0
    """Share of the training images of a fold that are defective, but labelled normal: drawn from its test images."""

    def __post_init__(self) -> None:
        count, share = self.train_images, self.contamination
        if not isinstance(count, int) or isinstance(count, bool) or count < 0 or count in (1, 2):
            raise ConfigError(
                f"train_images must be at least 3, or 0 for all images, got {count!r}. Set it to 3 or more."
            )
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 0.5:
            raise ConfigError(
                f"contamination must be a share between 0 and 0.5, got {share!r}. 0.1 makes a tenth of the training "
                "images defective."
            )

    @property
    def changes(self) -> str:
        """The changes of the training images, as tables name them: `train_images 10, contamination 0.1`."""
        values = {"train_images": self.train_images, "contamination": self.contamination}
        return ", ".join(f"{name} {value}" for name, value in values.items() if value)


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
    under any condition. `train_images` and `contamination` then change the training images of each fold.

    Raises:
        ConfigError: the protocol is unknown.
        DataError: too few subclasses or categories for the protocol, an unseen subclass that the data lacks, fewer
            `train_images` than subclasses, or too few defective test images for `contamination`.
    """
    check_protocol(protocol)
    complete = splits.complete(samples, seed=seed)
    split = DrawnSplits(
        train=tuple(sample for sample in complete if sample.split != "test"),
        test=tuple(sample for sample in complete if sample.split == "test"),
        seed=seed,
        settings=settings or ProtocolSettings(),
    )
    return [_contaminated(_reduced(fold, split), split) for fold in PROTOCOLS[protocol](split)]


def _reduced(fold: Fold, split: DrawnSplits) -> Fold:
    """Return the fold with at most `train_images` training images, drawn with the seed.

    As many of each subclass as possible, and of as many groups as possible: images of one group are not independent.
    """
    amount = split.settings.train_images
    if not amount or len(fold.samples) <= amount:
        return fold
    subclasses = {sample.subclass_name for sample in fold.samples}
    if amount < len(subclasses):
        raise DataError(
            f"train_images: {amount} images cannot hold one of each of the {len(subclasses)} subclasses of fold "
            f"{fold.name!r}. Set train_images to {len(subclasses)} or more."
        )
    groups = splits.independent_groups(fold.samples, [splits.file_content(sample) for sample in fold.samples])
    left = np.random.default_rng(split.seed).permutation(len(fold.samples)).tolist()
    of_subclass: Counter[str] = Counter()
    of_group: Counter[int] = Counter()
    chosen: set[int] = set()
    while len(chosen) < amount:
        row = min(left, key=lambda row: (of_subclass[fold.samples[row].subclass_name], of_group[groups[row]]))
        left.remove(row)
        chosen.add(row)
        of_subclass[fold.samples[row].subclass_name] += 1
        of_group[groups[row]] += 1
    return replace(fold, samples=tuple(sample for row, sample in enumerate(fold.samples) if row in chosen))


def _contaminated(fold: Fold, split: DrawnSplits) -> Fold:
    """Return the fold with defective test images among its training images, drawn with the seed and labelled normal.

    They are added to the good images, about the same share of each subclass, from as few groups as possible. Their
    groups and copies leave the test images.
    """
    share = split.settings.contamination
    if not share:
        return fold
    trained = Counter(sample.subclass_name for sample in fold.samples)
    amount = max(1, round(share / (1 - share) * len(fold.samples)))
    groups = splits.independent_groups(split.test, [splits.file_content(sample) for sample in split.test])
    order = np.random.default_rng(split.seed).permutation(len(groups)).tolist()
    left = [
        row
        for row in sorted(range(len(groups)), key=lambda row: order[groups[row]])
        if split.test[row].label == "anomalous" and split.test[row].subclass_name in trained
    ]
    if len(left) < amount:
        raise DataError(
            f"contamination: {share} of the {len(fold.samples)} training images of fold {fold.name!r} needs {amount} "
            f"defective test images of their subclasses, got {len(left)}. Set contamination or train_images lower."
        )
    names = [sample.subclass_name for sample in split.test]
    drawn: list[int] = []
    of_subclass: Counter[str] = Counter()
    while len(drawn) < amount:
        drawn.append(min(left, key=lambda row: of_subclass[names[row]] / trained[names[row]]))
        left.remove(drawn[-1])
        of_subclass[names[drawn[-1]]] += 1
    added = [replace(split.test[row], split="train", label="normal", defect=None, mask_path=None) for row in drawn]
    spent = {groups[row] for row in drawn}
    kept = {sample for sample, group in zip(split.test, groups, strict=True) if group not in spent}
    tests = {side: tuple(sample for sample in rows if sample in kept) for side, rows in fold.tests.items()}
    if not any(sample.label == "anomalous" for rows in tests.values() for sample in rows):
        raise DataError(
            f"contamination: without the {len(spent)} groups of the {amount} defective images among the training "
            f"images, fold {fold.name!r} has no defective test image. Set contamination or train_images lower."
        )
    return replace(fold, samples=(*fold.samples, *added), tests={side: rows for side, rows in tests.items() if rows})


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
