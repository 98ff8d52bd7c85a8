"""Every setting, in the order in which an image passes through the detector. No torch.

Bounds are annotations that pydantic checks. A section with variants (`features`, `head`, `head.expert`, ...) is a
union, and its discriminator field selects the variant. The string under a field is its help text. `settings.py` reads
these classes from YAML and from `a.b=c`. Every class of the modules of this package can be imported from
`normweave.config`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from normweave.config.adapted_moe import *  # noqa: F403
from normweave.config.adapted_moe import AdaptedMoEConfig
from normweave.config.adapted_moe_released import *  # noqa: F403
from normweave.config.base import *  # noqa: F403
from normweave.config.cnc import *  # noqa: F403
from normweave.config.features import *  # noqa: F403
from normweave.config.features import FeaturesConfig, TimmConfig
from normweave.config.heads import *  # noqa: F403
from normweave.config.heads import HeadConfig
from normweave.config.regions import *  # noqa: F403
from normweave.config.regions import RegionConfig
from normweave.validation import DISCRIMINATOR as DISCRIMINATOR
from normweave.validation import InnerShare, NaturalFloat, check, checked


@checked
class DataConfig:
    """Which images are used, and which of them are held out."""

    category: tuple[str, ...] = ()
    """Categories to use; empty = all."""
    subclass: tuple[str, ...] = ()
    """Subclasses to use; empty = all."""
    subclass_from: Literal["folder", "column", "filename-regex", "auto", "none"] = "folder"
    """Source of the subclass of an image; `auto` discovers subclasses, `none` has one for all."""
    subclass_regex: str = ""
    """Regular expression for `filename-regex`, searched in the file's stem; its first group is the subclass."""
    calibration: Literal["auto", "split", "cross-validation"] = "auto"
    """Images for the operating points: `split` holds some out; `cross-validation` fits a head without each fold.

    `auto` splits where `calibration_share` holds out enough groups for the false-alarm rate.
    """
    calibration_share: InnerShare = 0.33
    """Share of the train normals that is held out for the operating points, by whole groups."""
    folds: Annotated[int, Field(ge=2, le=100)] = 5
    """Parts of a cross-validation, at most as many as there are groups; each needs a head of its own."""
    holdout_share: InnerShare = 0.15
    """Share of the fit normals held out from gradients, by whole groups: for early stopping and score scales."""

    def __post_init__(self) -> None:
        given = self.subclass_from != "filename-regex" or bool(self.subclass_regex)
        example = "for example '^(exp[0-9])_'"
        check((given, f"subclass_regex must be given with subclass_from=filename-regex, {example}"))


@checked
class PrepareConfig:
    """Preparation of images of any size as the network's input; saved with the detector."""

    height: Annotated[int, Field(ge=32, le=4096)] = 256
    width: Annotated[int, Field(ge=32, le=4096)] = 256
    tile_beyond: float = 4.0
    """An image more than this many times as high or wide as the input is cut into tiles; 0 = never."""
    tile_overlap: Annotated[float, Field(ge=0, le=0.5)] = 0.125
    """Share of a tile's side that it has in common with its neighbour."""

    def __post_init__(self) -> None:
        allowed = self.tile_beyond == 0 or self.tile_beyond >= 1
        check((allowed, f"tile_beyond must be 0 or at least 1, got {self.tile_beyond}"))


@checked
class MapsConfig:
    """Computation of the anomaly map from the grid of patch scores."""

    smoothing: NaturalFloat | None = None
    """Std of the Gaussian in pixels of an input 256 pixels high; it is scaled with the input. None: the default of the
    head, which is 1 for a fusion of experts and 4 for others; a bundle holds the number."""


@checked
class OutcomeConfig:
    """The rates from which the thresholds follow, and what explains a box."""

    false_alarm_rate: InnerShare = 0.05
    """Share of new normal images that may be called anomalous."""
    unknown_rate: InnerShare = 0.01
    """Share of new normal images that may be called unknown."""
    references: bool = True
    """Name the most similar good image for each box, with small pictures of good images in the bundle; needs a head
    that stores good patches."""


@checked
class Config:
    """All settings of a detector."""

    data: DataConfig = DataConfig()
    prepare: PrepareConfig = PrepareConfig()
    regions: tuple[RegionConfig, ...] = ()
    """The part of the image to inspect, per category; empty: all of it. `normweave data roi` writes them."""
    features: Annotated[FeaturesConfig, Field(discriminator=DISCRIMINATOR)] = TimmConfig()
    head: Annotated[HeadConfig, Field(discriminator=DISCRIMINATOR)] = AdaptedMoEConfig()
    maps: MapsConfig = MapsConfig()
    outcome: OutcomeConfig = OutcomeConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        categories = [region.category for region in self.regions]
        twice = sorted({each for each in categories if categories.count(each) > 1})
        check((not twice, f"regions must name each category once, got twice: {', '.join(twice)}"))

    @property
    def smoothing(self) -> float:
        """Std of the smoothing of anomaly maps, as `maps.upsample` takes it."""
        chosen = self.maps.smoothing
        return self.head.smoothing if chosen is None else chosen

    @property
    def model(self) -> str:
        """Name of the head, as outcomes and bundles record it."""
        return str(getattr(self.head, DISCRIMINATOR))
