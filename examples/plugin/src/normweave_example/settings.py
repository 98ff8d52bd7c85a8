"""Settings of the head. No torch: normweave reads them for its help, too."""

from typing import Literal

from normweave.config.base import BaseHeadConfig
from normweave.validation import PositiveFloat, checked


@checked
class MeanImageConfig(BaseHeadConfig):
    """Distance of each cell of the features to its mean, for products whose parts have fixed positions."""

    implementation = "normweave_example.head:MeanImage"
    model = "mean-image"
    kind: Literal["mean_image"] = "mean_image"
    least_spread: PositiveFloat = 0.1
    """Smallest standard deviation of a cell."""
