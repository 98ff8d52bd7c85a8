"""A benchmark plan: a YAML file that says which methods meet which data, under which protocol, with which seeds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from normweave.benchmark.protocols import Protocol
from normweave.errors import ConfigError, unknown


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """One data set and the protocols under which it is used."""

    name: str
    path: str = ""
    """Relative to the root of the real images; empty with `textures`."""
    layout: str | None = None
    textures: dict[str, int] = field(default_factory=dict)
    """Make textile images instead: `train_images`, `test_images`, `defect_images` a subclass, and `seed`."""
    protocols: tuple[Protocol, ...] = ("seen",)
    set: tuple[str, ...] = ()
    """Settings `a.b=c` for every method on this data."""


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """One row of the table."""

    name: str
    model: str
    set: tuple[str, ...] = ()
    """Settings `a.b=c`."""
    seeds: tuple[int, ...] = ()
    """Other seeds than the plan's."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole table."""

    title: str
    data: tuple[DataPlan, ...]
    methods: tuple[MethodPlan, ...]
    seeds: tuple[int, ...] = (0,)


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
    data = tuple(DataPlan(**_checked(item, DataPlan, f"{path}: data")) for item in top.pop("data"))
    methods = tuple(
        MethodPlan(**_checked(item, MethodPlan, f"{path}: methods")) for item in top.pop("methods")
    )
    for item in data:
        for protocol in item.protocols:
            if protocol not in get_args(Protocol):
                raise unknown(
                    "protocol", protocol, get_args(Protocol), "See docs/how-to/reproduce-a-table.md."
                )
    return Plan(data=data, methods=methods, **top)


def _checked(tree: Any, kind: type[Plan | DataPlan | MethodPlan], where: str) -> dict[str, Any]:
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
