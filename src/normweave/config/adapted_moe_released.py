"""Settings of Adapted-MoE as its first author released it."""

from __future__ import annotations

from typing import Literal

from normweave.config.base import BaseHeadConfig, TrainingConfig
from normweave.validation import PositiveFloat, PositiveInt, checked


@checked
class AdaptedMoEReleasedConfig(BaseHeadConfig):
    """Adapted-MoE as in the first author's code, where it differs from arXiv 2409.05611 (docs/equations.md)."""

    implementation = "adapted_moe.released:AdaptedMoEReleased"
    model = "adapted-moe-released"
    kind: Literal["adapted_moe_released"] = "adapted_moe_released"
    top_k: PositiveInt = 1
    """Experts used for an image."""
    hidden: PositiveInt = 512
    noise: PositiveFloat = 0.5
    """Std of the noise on projected patches, in stds of a standardised feature (released: 0.015 on unscaled ones)."""
    margin: PositiveFloat = 0.5
    patches: PositiveInt = 256
    """Patches drawn of each image in a step; the released code uses all of them."""
    accumulate: PositiveInt = 1
    """Batches for one step of the optimiser; the released code has 8."""
    training: TrainingConfig = TrainingConfig(epochs=30, batch_images=8, learning_rate=2e-4)
    """The released code trains for 120 epochs, on many more images."""
