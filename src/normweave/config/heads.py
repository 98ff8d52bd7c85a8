"""Settings of the heads that are one module each, and `HeadConfig`, the union of the settings of all heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field

from normweave import plugins
from normweave.config.adapted_moe import AdaptedMoEConfig
from normweave.config.adapted_moe_released import AdaptedMoEReleasedConfig
from normweave.config.base import (
    BaseHeadConfig,
    Border,
    Cells,
    MaxImages,
    Projection,
    TrainingConfig,
    Variance,
)
from normweave.config.cnc import CNCConfig
from normweave.validation import NaturalInt, OddInt, PositiveFloat, PositiveInt, PositiveShare, checked


@checked
class MemoryBankConfig(BaseHeadConfig):
    """PatchCore (Roth et al. 2022, arXiv 2106.08265): distance to the nearest stored normal patch."""

    implementation = "memory_bank:MemoryBank"
    model = "patchcore"
    kind: Literal["memory_bank"] = "memory_bank"
    share: PositiveShare = 0.1
    """Share of the pool that the greedy coreset keeps."""
    max_patches: PositiveInt = 5_000
    """Upper bound of the size of the coreset."""
    max_pool: PositiveInt = 50_000
    """Largest number of patches, drawn at random, from which the coreset is chosen; bounds memory and time."""
    projection: Projection = 64
    border: Border = 2


@checked
class SimpleNetConfig(BaseHeadConfig):
    """SimpleNet (Liu et al. 2023, arXiv 2303.15140): one discriminator of normal against noised features."""

    implementation = "simplenet:SimpleNet"
    model = "simplenet"
    kind: Literal["simplenet"] = "simplenet"
    hidden: PositiveInt = 128
    noise: PositiveFloat = 0.5
    """Standard deviation of the noise on standardised features (the paper's 0.015 is for unscaled features)."""
    margin: float = 0.5
    training: TrainingConfig = TrainingConfig(epochs=20, batch_images=8, learning_rate=2e-4, patience=5)
    border: Border = 2


@checked
class MSFlowConfig(BaseHeadConfig):
    """MSFlow (Zhou et al. 2023, arXiv 2308.15300): normalising flows at several scales and a fusion flow."""

    implementation = "msflow:MSFlow"
    model = "msflow"
    kind: Literal["msflow"] = "msflow"
    blocks: PositiveInt = 2
    """Coupling blocks of the finest level."""
    further_blocks: NaturalInt = 3
    """Number of blocks that each coarser level has in addition; the paper has 2, 5 and 8 blocks, as the default."""
    position: Annotated[int, Field(ge=4, multiple_of=4)] = 32
    """Size of the position encoding of each block; the paper has 64."""
    clamp: PositiveFloat = 1.9
    """A coupling scales by at most exp(clamp)."""
    top: PositiveShare = 0.1
    """The image's score is the mean of this share of its cells."""
    training: TrainingConfig = TrainingConfig(epochs=20, batch_images=8, learning_rate=1e-3)
    border: Border = 2


@checked
class PyramidFlowConfig(BaseHeadConfig):
    """PyramidFlow (Lei et al. 2023, arXiv 2303.02595): a volume-preserving flow over a pyramid, and a template."""

    implementation = "pyramidflow:PyramidFlow"
    model = "pyramidflow"
    kind: Literal["pyramidflow"] = "pyramidflow"
    levels: PositiveInt = 4
    """Levels of the Laplacian pyramid."""
    blocks: PositiveInt = 4
    """Number of blocks, each of which couples every level with its neighbours once."""
    kernel: OddInt = 3
    """Side of the convolutions, odd; the paper has 7 on a grid eight times as fine."""
    volume: Literal["channel", "space"] = "channel"
    """How volume is preserved: scales are centred over the channels of a cell, or over the cells of a channel."""
    training: TrainingConfig = TrainingConfig(epochs=15, batch_images=4, learning_rate=1e-3)
    border: Border = 2


@checked
class MeanShiftConfig(BaseHeadConfig):
    """Mean-Shifted contrastive (Reiss and Hoshen 2021, arXiv 2106.03844): nearest normal images. No map."""

    implementation = "mean_shift:MeanShift"
    model = "mean-shift"
    kind: Literal["mean_shift"] = "mean_shift"
    hidden: PositiveInt = 128
    """Width of the adapter, which replaces the last stages of the backbone."""
    temperature: PositiveFloat = 0.25
    angular: bool = True
    """Add the angular loss, which keeps the normal images close to their centre."""
    smallest_view: PositiveShare = 0.2
    """Smallest share of the grid that a view of an image covers."""
    neighbours: PositiveInt = 2
    """k: the score is the mean distance to the k nearest normal images."""
    max_images: PositiveInt = 5_000
    """Largest number of normal images to compare with, drawn at random; bounds memory."""
    training: TrainingConfig = TrainingConfig(epochs=20, batch_images=32, learning_rate=0.1)
    """The learning rate is for SGD on an adapter with random weights; the paper's 1e-5 is for a trained backbone."""


@checked
class DFMConfig(BaseHeadConfig):
    """DFM (Ahuja et al. 2019, arXiv 1909.11786): principal components of the whole image's features."""

    implementation = "dfm:DFM"
    model = "dfm"
    kind: Literal["dfm"] = "dfm"
    cells: Cells = 8
    variance: Variance = 0.97
    max_images: MaxImages = 2_000


HeadConfig = (
    AdaptedMoEConfig
    | AdaptedMoEReleasedConfig
    | CNCConfig
    | SimpleNetConfig
    | MemoryBankConfig
    | DFMConfig
    | MSFlowConfig
    | PyramidFlowConfig
    | MeanShiftConfig
)


if not TYPE_CHECKING:
    HeadConfig = plugins.extended(HeadConfig, "heads", of=BaseHeadConfig)


def models() -> dict[str, type[HeadConfig]]:
    """Return the classes of head settings by their name on the command line."""
    return {head.model: head for head in get_args(HeadConfig)}
