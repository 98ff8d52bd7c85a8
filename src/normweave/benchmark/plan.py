"""A benchmark plan: a YAML file that says which methods meet which data, under which protocol, with which seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from normweave.benchmark.protocols import Fold, Protocol, folds
from normweave.errors import ConfigError, unknown
from normweave.types import Sample


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """Where images come from: a folder or manifest, or textiles made here."""

    path: str = ""
    """Relative to the root of the real images; empty with `textures`."""
    layout: str | None = None
    textures: dict[str, int] = field(default_factory=dict)
    """Make textile images instead: `train_images`, `test_images`, `defect_images` a subclass, and `seed`."""
    set: tuple[str, ...] = ()
    """Settings `a.b=c`: of a data set for every method on it, of a part for reading it."""


@dataclass(frozen=True, kw_only=True)
class DataPlan(PartPlan):
    """One data set and the protocols under which it is used."""

    name: str
    parts: tuple[PartPlan, ...] = ()
    """Several joined into one data set, with a category or more each, instead of `path` or `textures`."""
    protocols: tuple[Protocol, ...] = ("seen",)
    unseen: tuple[str, ...] = ()
    """Under unseen-subclass: the subclasses that only test, as SUBCLASS or CATEGORY/SUBCLASS."""
    leave_out: int = 2
    """Under leave-k-out: how many subclasses a fold leaves out."""

    def folds(self, samples: Sequence[Sample], protocol: Protocol, *, seed: int) -> list[Fold]:
        """What trains and what tests."""
        return folds(samples, protocol, seed=seed, unseen=self.unseen, leave_out=self.leave_out)


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """One row of the table."""

    name: str
    model: str
    """One of ours, or a peer: `anomalib/padim`."""
    set: tuple[str, ...] = ()
    """Settings `a.b=c`; of a peer also its own, `epochs=5`."""
    seeds: tuple[int, ...] = ()
    """Other seeds than the plan's."""
    baseline: str = ""
    """The row to compare with, instead of the plan's; with it the change in over-generalisation is told."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole table."""

    title: str
    data: tuple[DataPlan, ...]
    methods: tuple[MethodPlan, ...]
    seeds: tuple[int, ...] = (0,)
    baseline: str = ""
    """The method that the others are compared with; empty = the first."""

    def compared_with(self, method: MethodPlan) -> str:
        """The name of the method that this one is compared with."""
        return method.baseline or self.baseline or self.methods[0].name


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        ConfigError: not readable as YAML, an unknown key, or a key that is missing.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} cannot be read as a plan: {error}. See plans/quick.yaml for one that can."
        ) from error
    top = _checked(tree, Plan, str(path))
    data = tuple(_data(item, f"{path}: data") for item in top.pop("data"))
    methods = tuple(
        MethodPlan(**_checked(item, MethodPlan, f"{path}: methods")) for item in top.pop("methods")
    )
    for item in data:
        for protocol in item.protocols:
            if protocol not in get_args(Protocol):
                raise unknown(
                    "protocol", protocol, get_args(Protocol), "See docs/how-to/reproduce-a-table.md."
                )
    for method in methods:
        others = {other.name for other in methods} - {method.name}
        if method.baseline and method.baseline not in others:
            raise unknown(
                f"baseline of {method.name!r}", method.baseline, others, "Name another method of the plan."
            )
    names = {method.name for method in methods}
    if top.get("baseline") and top["baseline"] not in names:
        raise unknown(f"baseline of {path}", top["baseline"], names, "Name a method of the plan.")
    return Plan(data=data, methods=methods, **top)


def _data(tree: Any, where: str) -> DataPlan:
    keys = _checked(tree, DataPlan, where)
    within = f"{where}: {keys['name']}: parts"
    parts = tuple(PartPlan(**_checked(part, PartPlan, within)) for part in keys.pop("parts", ()))
    item = DataPlan(parts=parts, **keys)
    _check_source(item, where)
    for part in parts:
        _check_source(part, within)
    return item


def _check_source(item: PartPlan, where: str) -> None:
    """Images come from one place."""
    sources = ("path", "textures", "parts")
    given = [name for name in sources if getattr(item, name, None)]
    if len(given) != 1:
        allowed = sources if isinstance(item, DataPlan) else sources[:2]
        raise ConfigError(
            f"{where}: got {' and '.join(given) or 'no source of images'}. "
            f"Give one of {', '.join(allowed)}. See plans/multi-category.yaml."
        )


def _checked(tree: Any, kind: type[Plan | PartPlan | MethodPlan], where: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{where}: expected keys and values, got {type(tree).__name__}. See plans/quick.yaml."
        )
    known = {entry.name for entry in fields(kind)}
    for key in tree:
        if key not in known:
            raise unknown(f"key of {where}", str(key), known, "See plans/quick.yaml.")
    needed = {
        entry.name for entry in fields(kind) if entry.name in ("title", "data", "methods", "name", "model")
    }
    if missing := sorted(needed - set(tree)):
        raise ConfigError(f"{where}: {', '.join(missing)} missing. See plans/quick.yaml.")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
