"""A benchmark plan: a YAML file that lists data sets, protocols, methods and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from normweave.benchmark.protocols import Fold, ProtocolSettings, check_protocol, folds
from normweave.errors import ConfigError, unknown
from normweave.types import Sample


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """A source of images: a folder, a manifest, or synthetic textiles."""

    path: str = ""
    """Path relative to the root folder of the data; empty with `textures`."""
    layout: str | None = None
    textures: dict[str, int] = field(default_factory=dict)
    """Generate textile images: `train_images`, `test_images` and `defect_images` of each subclass, and `seed`."""
    set: tuple[str, ...] = ()
    """Settings `a.b=c`. Those of a data set apply to every method, those of a part to reading the part."""


@dataclass(frozen=True, kw_only=True)
class DataPlan(PartPlan, ProtocolSettings):
    """One data set, its protocols and their settings."""

    name: str
    """In the rows of the table; `read_plan` adds `train_images` and `contamination` to it."""
    parts: tuple[PartPlan, ...] = ()
    """Sources that are joined into one data set, each with its own categories; instead of `path` or `textures`."""
    protocols: tuple[str, ...] = ("seen",)

    def folds(self, samples: Sequence[Sample], protocol: str, *, seed: int) -> list[Fold]:
        """Return the folds of one of the protocols."""
        return folds(samples, protocol, self, seed=seed)


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """One row of the table."""

    name: str
    model: str
    """A model of normweave, or one of anomalib: `anomalib/padim`."""
    set: tuple[str, ...] = ()
    """Settings `a.b=c`; anomalib's models also have settings of their own: `epochs=5`."""
    seeds: tuple[int, ...] = ()
    """Replace the seeds of the plan."""
    baseline: str = ""
    """Replaces the baseline of the plan, and adds the change in over-generalisation to the table."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that one results table compares."""

    title: str
    data: tuple[DataPlan, ...]
    methods: tuple[MethodPlan, ...]
    seeds: tuple[int, ...] = (0,)
    baseline: str = ""
    """The method that the others are compared with; empty: the first."""

    def baseline_of(self, method: MethodPlan) -> str:
        """Return the name of the method that this one is compared with."""
        return method.baseline or self.baseline or self.methods[0].name


def read_plan(path: Path) -> Plan:
    """Read a plan from a YAML file.

    Raises:
        ConfigError: the file is not valid YAML, a key is unknown or missing, or a name is unknown.
    """
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"Could not read the plan {path}: {error}. See plans/quick.yaml for an example.") from error
    top = _checked(tree, Plan, str(path))
    data = tuple(_data(item, f"{path}: data") for item in top.pop("data"))
    methods = tuple(MethodPlan(**_checked(item, MethodPlan, f"{path}: methods")) for item in top.pop("methods"))
    for item in data:
        for protocol in item.protocols:
            check_protocol(protocol)
    names = [method.name for method in methods]
    for method in methods:
        others = set(names) - {method.name}
        if method.baseline and method.baseline not in others:
            raise unknown(f"baseline of {method.name!r}", method.baseline, others, "Name another method of the plan.")
    if top.get("baseline") and top["baseline"] not in names:
        raise unknown(f"baseline of {path}", top["baseline"], names, "Name a method of the plan.")
    return Plan(data=data, methods=methods, **top)


def _data(tree: Any, where: str) -> DataPlan:
    keys = _checked(tree, DataPlan, where)
    within = f"{where}: {keys['name']}: parts"
    parts = tuple(PartPlan(**_checked(part, PartPlan, within)) for part in keys.pop("parts", ()))
    try:
        item = DataPlan(parts=parts, **keys)
    except ConfigError as error:
        raise ConfigError(f"{within.removesuffix(': parts')}: {error}") from error
    if item.changes:
        item = replace(item, name=f"{item.name} ({item.changes})")
    _check_source(item, ("path", "textures", "parts"), where)
    for part in parts:
        _check_source(part, ("path", "textures"), within)
    return item


def _check_source(item: PartPlan, sources: Sequence[str], where: str) -> None:
    given = [name for name in sources if getattr(item, name)]
    if len(given) != 1:
        raise ConfigError(
            f"{where}: got {' and '.join(given) or 'no source of images'}. "
            f"Give one of {', '.join(sources)}. See plans/multi-category.yaml."
        )


def _checked(tree: Any, plan: type[Plan | PartPlan | MethodPlan], where: str) -> dict[str, Any]:
    """Return the keyword arguments of a plan class, with lists made tuples."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected keys and values, got {type(tree).__name__}. See plans/quick.yaml.")
    known = {entry.name: entry for entry in fields(plan)}
    for key in tree:
        if key not in known:
            raise unknown(f"key of {where}", str(key), known, "See plans/quick.yaml.")
    required = {name for name, entry in known.items() if entry.default is MISSING and entry.default_factory is MISSING}
    if missing := sorted(required - set(tree)):
        raise ConfigError(f"{where}: {', '.join(missing)} missing. See plans/quick.yaml.")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
