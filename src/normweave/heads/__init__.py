"""Frozen features to patch scores. Each head is one file or folder; `base.Head` is the contract of all of them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from normweave.config import HeadConfig

if TYPE_CHECKING:
    from normweave.heads.base import Head


def build(config: HeadConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()) -> Head:
    """Return the head that `config` describes, not fitted yet.

    Args:
        shape: (D, h, w) of the features.
        dims: D_l of each level that the D channels consist of; empty = one level.
    """
    head = locate("normweave.heads", config)
    built: Head = head(config, shape=shape, dims=dims or shape[:1])
    return built


def locate(package: str, config: Any) -> Any:
    """Return the class that `config.implementation` names, `module:Class`; its module is imported now.

    Args:
        package: to which the module belongs; the settings of a plug-in name the whole module.
    """
    module, _, attribute = str(config.implementation).partition(":")
    own = type(config).__module__.startswith("normweave.")
    return getattr(importlib.import_module(f"{package}.{module}" if own else module), attribute)
