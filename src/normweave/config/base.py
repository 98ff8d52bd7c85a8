"""The base class of the settings of a head, and the settings that several heads have."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from normweave.config.features import FeaturesConfig, TimmConfig
from normweave.validation import InnerShare, NaturalInt, PositiveFloat, PositiveInt, checked

Border = NaturalInt
"""Outermost cells of the grid that take the score of their inner neighbours; 0 = none, as published."""
Cells = PositiveInt
"""The grid is averaged to at most cells x cells before it is flattened."""
Variance = InnerShare
"""Share of the variance that the principal components keep."""
MaxImages = Annotated[int, Field(ge=2)]
"""Largest number of images for the fit, drawn at random; bounds memory."""
SMOOTHING = 4.0
"""Smoothing of the anomaly map by default, as `MapsConfig.smoothing`."""
Projection = NaturalInt
"""Dimensions of the random projection in which the coreset is chosen; 0 = no projection."""


@checked
class TrainingConfig:
    """Epochs, batch size, learning rate and early stopping of a training stage."""

    epochs: PositiveInt
    batch_images: PositiveInt
    """Images in one step."""
    learning_rate: PositiveFloat
    epoch_images: NaturalInt = 0
    """Images in one epoch at most, drawn anew for each epoch; 0 = all fit images. It bounds the number of steps."""
    patience: NaturalInt = 0
    """Stop after this many epochs without a lower loss on the held-out normals; 0 = never."""


class BaseHeadConfig:
    """Class attributes of the settings of every head."""

    implementation: ClassVar[str]
    """Module and class below `normweave.heads`, or of the package of a plug-in; the class is built as
    `Class(config, shape=shape, dims=dims)`."""
    model: ClassVar[str]
    """Name on the command line."""
    features: ClassVar[type[FeaturesConfig]] = TimmConfig
    """Default features of the head."""

    @property
    def smoothing(self) -> float:
        """Default smoothing of the anomaly map."""
        return SMOOTHING
