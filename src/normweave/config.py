"""Every setting, in the order of the data's way. No torch.

Each class checks itself and reports all of its mistakes together; `read` and `override` turn YAML and `a.b=c` into
these classes and name the key that is wrong. The string under a field is its help text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from normweave.errors import ConfigError


def _check(where: str, *rules: tuple[bool, str]) -> None:
    wrong = [text for holds, text in rules if not holds]
    if wrong:
        raise ConfigError(f"{where}: " + "; ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and what is held out of them."""

    category: tuple[str, ...] = ()
    """Categories to use; empty = all."""
    subclass: tuple[str, ...] = ()
    """Subclasses to use; empty = all."""
    subclass_from: Literal["folder", "column", "filename-regex", "auto", "none"] = "folder"
    """Where the subclass of an image is written; `auto` discovers subclasses, `none` has one for all."""
    subclass_regex: str = ""
    """For filename-regex: its first group is the subclass, matched against the file's stem."""
    calibration_share: float = 0.33
    """Share of the train normals that is held out for the operating points, by whole groups."""
    holdout_share: float = 0.15
    """Share of the fit normals that gradients do not see, by whole groups: stop rule and scale of the experts."""

    def __post_init__(self) -> None:
        _check(
            "data",
            (0 < self.calibration_share < 1, f"calibration_share must lie in (0, 1), got {self.calibration_share}"),
            (0 < self.holdout_share < 1, f"holdout_share must lie in (0, 1), got {self.holdout_share}"),
            (
                self.subclass_from != "filename-regex" or bool(self.subclass_regex),
                "subclass_from=filename-regex needs subclass_regex, for example '^(exp[0-9])_'",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """From an image of any size to the network's input; saved with the detector."""

    height: int = 256
    width: int = 256
    tile_beyond: float = 4.0
    """An image more than this many times as high or wide as the input is cut into tiles; 0 = never."""
    tile_overlap: float = 0.125
    """Share of a tile's side that it has in common with its neighbour."""

    def __post_init__(self) -> None:
        _check(
            "prepare",
            (32 <= self.height <= 4096, f"height must lie in 32..4096, got {self.height}"),
            (32 <= self.width <= 4096, f"width must lie in 32..4096, got {self.width}"),
            (self.tile_beyond == 0 or self.tile_beyond >= 1, f"tile_beyond must be 0 or >= 1, got {self.tile_beyond}"),
            (0 <= self.tile_overlap <= 0.5, f"tile_overlap must lie in [0, 0.5], got {self.tile_overlap}"),
        )


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """A frozen network, several of its stages on one grid."""

    backbone: str = "tf_efficientnet_lite0"
    """Any timm model that offers forward_intermediates; tf_efficientnet_lite0/1/2 need no download."""
    weights: str = "auto"
    """`auto`: carried by pip, else from timm's hub; a path: a safetensors file; `random`: untrained, for tests."""
    strides: tuple[int, ...] = (4, 8, 16)
    """Stages to use, by their stride to the input."""
    grid_stride: int = 8
    """One grid cell stands for this many pixels of the input."""
    neighbourhood: int = 3
    """Side of the local average, in cells of each stage; 1 = none."""
    batch_images: int = 8
    """Images in one pass; every pass is filled up to it, so that results do not depend on the number of images."""

    def __post_init__(self) -> None:
        _check(
            "features",
            (len(self.strides) > 0, "strides must name at least one stage"),
            (self.grid_stride >= 1, f"grid_stride must be 1 or more, got {self.grid_stride}"),
            (
                self.neighbourhood >= 1 and self.neighbourhood % 2 == 1,
                f"neighbourhood must be odd and positive, got {self.neighbourhood}",
            ),
            (self.batch_images >= 1, f"batch_images must be 1 or more, got {self.batch_images}"),
        )


@dataclass(frozen=True, kw_only=True)
class MemoryBankConfig:
    """PatchCore (Roth et al. 2022, arXiv 2106.08265): distance to the nearest stored normal patch."""

    kind: Literal["memory_bank"] = "memory_bank"
    share: float = 0.1
    """Share of the pool that the greedy coreset keeps."""
    max_patches: int = 5_000
    """The coreset never holds more."""
    max_pool: int = 50_000
    """Patches drawn at random before the coreset; bounds memory and time."""
    projection: int = 64
    """Numbers a patch in the random projection in which the coreset is chosen; 0 = all."""

    def __post_init__(self) -> None:
        _check(
            "head 'memory_bank'",
            (0 < self.share <= 1, f"share must lie in (0, 1], got {self.share}"),
            (self.max_patches >= 1, f"max_patches must be 1 or more, got {self.max_patches}"),
            (self.max_pool >= 1, f"max_pool must be 1 or more, got {self.max_pool}"),
            (self.projection >= 0, f"projection must be 0 or more, got {self.projection}"),
        )


@dataclass(frozen=True, kw_only=True)
class SimpleNetConfig:
    """SimpleNet (Liu et al. 2023, arXiv 2303.15140): one discriminator of normal against noised features."""

    kind: Literal["simplenet"] = "simplenet"
    hidden: int = 128
    noise: float = 0.5
    """Deviation of the noise on standardised features (the paper's 0.015 stands on its own scale)."""
    margin: float = 0.5
    epochs: int = 20
    batch_images: int = 8
    learning_rate: float = 2e-4
    patience: int = 5

    def __post_init__(self) -> None:
        _check(
            "head 'simplenet'",
            (self.hidden >= 1, f"hidden must be 1 or more, got {self.hidden}"),
            (self.noise > 0, f"noise must be positive, got {self.noise}"),
            (self.epochs >= 1, f"epochs must be 1 or more, got {self.epochs}"),
            (self.batch_images >= 1, f"batch_images must be 1 or more, got {self.batch_images}"),
            (self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}"),
            (self.patience >= 0, f"patience must be 0 or more, got {self.patience}"),
        )


@dataclass(frozen=True, kw_only=True)
class DFMConfig:
    """DFM (Ahuja et al. 2019, arXiv 1909.11786): principal components of the whole image's features."""

    kind: Literal["dfm"] = "dfm"
    cells: int = 8
    """The grid is averaged to at most cells x cells before it is flattened."""
    variance: float = 0.97
    """Share of the variance that the components keep."""
    max_images: int = 2_000
    """Images drawn at random for the components; bounds memory."""

    def __post_init__(self) -> None:
        _check(
            "head 'dfm'",
            (self.cells >= 1, f"cells must be 1 or more, got {self.cells}"),
            (0 < self.variance < 1, f"variance must lie in (0, 1), got {self.variance}"),
            (self.max_images >= 2, f"max_images must be 2 or more, got {self.max_images}"),
        )


@dataclass(frozen=True, kw_only=True)
class AdaptedMoEConfig:
    """Adapted-MoE (arXiv 2409.05611): route to experts of subclasses, adapt what was never seen."""

    kind: Literal["adapted_moe"] = "adapted_moe"
    moe: bool = True
    """One expert a subclass; off = one expert for all."""
    adaption: Literal["off", "paper", "guarded"] = "guarded"
    """Test-time adaption: Eq. 5-6, or along the directions in which normal subclasses differ."""
    norm: bool = True
    """L2-normalise the routing features."""
    alpha: float = 0.5
    """Eq. 2: weight of the centre loss against the softmax loss; 0 = softmax loss alone."""
    top_k: int = 4
    """Experts asked an image."""

    def __post_init__(self) -> None:
        _check(
            "head 'adapted_moe'",
            (0 <= self.alpha <= 1, f"alpha must lie in [0, 1], got {self.alpha}"),
            (self.top_k >= 1, f"top_k must be 1 or more, got {self.top_k}"),
        )


HeadConfig = AdaptedMoEConfig | SimpleNetConfig | MemoryBankConfig | DFMConfig


@dataclass(frozen=True, kw_only=True)
class MapsConfig:
    """From the grid of patch scores to the anomaly map."""

    smoothing: float = 4.0
    """Deviation of the Gaussian in pixels of an input 256 pixels high; it grows with the input."""

    def __post_init__(self) -> None:
        _check("maps", (self.smoothing >= 0, f"smoothing must be 0 or more, got {self.smoothing}"))


@dataclass(frozen=True, kw_only=True)
class OutcomeConfig:
    """Where the line is drawn."""

    false_alarm_rate: float = 0.05
    """Share of new normal images that may be called anomalous."""
    unknown_rate: float = 0.01
    """Share of new normal images that may be called unknown."""

    def __post_init__(self) -> None:
        _check(
            "outcome",
            (0 < self.false_alarm_rate < 1, f"false_alarm_rate must lie in (0, 1), got {self.false_alarm_rate}"),
            (0 < self.unknown_rate < 1, f"unknown_rate must lie in (0, 1), got {self.unknown_rate}"),
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole detector."""

    data: DataConfig = field(default_factory=DataConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    head: HeadConfig = field(default_factory=AdaptedMoEConfig)
    maps: MapsConfig = field(default_factory=MapsConfig)
    outcome: OutcomeConfig = field(default_factory=OutcomeConfig)
    seed: int = 0
