"""Prepared images to the features of a network that is never trained.

Each extractor is one module of this package, named like the discriminator of its config class. It has two functions:

    load(config, height=, width=) -> Backbone     the network with its weights
    pair(config) -> Pair | None                   its text side, if it has one

A new extractor is such a module and a config class in `config/features.py`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normweave.validation import DISCRIMINATOR

if TYPE_CHECKING:
    from normweave.config import FeaturesConfig
    from normweave.features.frozen import FrozenFeatures
    from normweave.types import Pair


def build(config: FeaturesConfig, *, height: int, width: int) -> FrozenFeatures:
    """Return the extractor that `config` describes, for prepared images of this size in pixels.

    Raises:
        ConfigError: the backbone does not exist, or cannot read images of this size.
        MissingError: its weights are not on this machine and cannot be downloaded.
        DataError: its weights are damaged or belong to another backbone.
    """
    from normweave.features.frozen import FrozenFeatures  # imports torch

    backbone = _module(config).load(config, height=height, width=width)
    return FrozenFeatures(backbone, height=height, width=width, batch_images=config.batch_images)


def pair(config: FeaturesConfig) -> Pair | None:
    """Return the text side of a vision-language pair, or None if the features have none.

    Raises:
        MissingError: its weights are not on this machine and cannot be downloaded.
        DataError: its weights are damaged or belong to another model.
    """
    found: Pair | None = _module(config).pair(config)
    return found


def _module(config: FeaturesConfig) -> Any:
    return import_module(f"normweave.features.{getattr(config, DISCRIMINATOR)}")
