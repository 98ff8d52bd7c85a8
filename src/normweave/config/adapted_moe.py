"""Settings of Adapted-MoE: its experts, its routing and its test-time adaption."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from normweave import plugins
from normweave.config.base import (
    SMOOTHING,
    BaseHeadConfig,
    Border,
    Cells,
    MaxImages,
    TrainingConfig,
    Variance,
)
from normweave.validation import (
    DISCRIMINATOR,
    InnerShare,
    NaturalFloat,
    NaturalInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Share,
    check,
    checked,
    unused,
)


class BaseExpertConfig:
    """Class attributes of the settings of every expert."""

    implementation: ClassVar[str]
    """Module and class below `normweave.heads.adapted_moe.experts`, or of the package of a plug-in; the class is built
    as `Class(config, shape=shape, unit=unit)`."""
    border: ClassVar[bool] = True
    """Whether scores near the border are treated, as `head.border` describes."""
    smoothing: ClassVar[float] = SMOOTHING
    """Default smoothing of the anomaly map."""

    @property
    def members(self) -> tuple[SingleExpertConfig, ...]:
        """The experts that are fused: this one only."""
        return (self,)  # type: ignore[return-value]


FINE = 0.364
"""The channels of strides 4 and 8 of EfficientNet-Lite."""


@checked
class LayoutExpertConfig(BaseExpertConfig):
    """Residual of a subspace of whole images, for products whose parts have fixed positions."""

    implementation = "layout:LayoutExperts"
    border = False
    kind: Literal["layout"] = "layout"
    fine: PositiveShare = FINE
    """Share of the channels, finest stages first, that the image score leaves out."""
    cells: PositiveInt = 8
    """The grid is averaged to at most cells x cells, and to half as many."""
    variance: Variance = 0.97
    components: PositiveInt = 200
    """Upper bound of the number of components."""
    own: Share = 0.5
    """Weight of the variances of an expert's own images; those of all images have the weight 1 - own."""
    max_images: MaxImages = 1_000


@checked
class GaussianExpertConfig(BaseExpertConfig):
    """Mahalanobis distance to the patches of a subclass, for textures."""

    implementation = "gaussian:GaussianExperts"
    kind: Literal["gaussian"] = "gaussian"
    fine: PositiveShare = FINE
    """Share of the channels, finest stages first, that are used."""
    pooled: Share = 0.25
    """Weight of the covariance of all subclasses; that of the expert's own images has the weight 1 - pooled."""
    shrinkage: PositiveShare = 0.1
    """Shrinkage of the covariance towards its mean variance."""


@checked
class SubspaceExpertConfig(BaseExpertConfig):
    """Residual of a subspace of the whole images of a subclass (DFM, arXiv 1909.11786)."""

    implementation = "subspace:SubspaceExperts"
    kind: Literal["subspace"] = "subspace"
    cells: Cells = 8
    variance: Variance = 0.97
    max_images: MaxImages = 1_000


@checked
class MemoryExpertConfig(BaseExpertConfig):
    """Distance to the nearest stored normal patch (PatchCore, arXiv 2106.08265)."""

    implementation = "memory:MemoryExperts"
    kind: Literal["memory"] = "memory"
    shared: bool = True
    """One memory bank for all subclasses, as PatchCore; false = one for each."""
    calibrated: bool = False
    """Divide a distance by the mean distance of normal patches to the stored patch."""
    max_patches: PositiveInt = 1_000
    """Patches stored in a memory bank, at most."""
    max_pool: PositiveInt = 20_000
    """Patches drawn at random before the coreset, for each memory bank."""
    dimensions: NaturalInt = 128
    """Principal components in which distances are measured; 0 = all channels, as PatchCore."""


@checked
class DiscriminatorExpertConfig(BaseExpertConfig):
    """The paper's expert: SimpleNet's discriminator (arXiv 2303.15140, section 3.4)."""

    implementation = "discriminator:DiscriminatorExperts"
    kind: Literal["discriminator"] = "discriminator"
    hidden: PositiveInt = 128
    noise: PositiveFloat = 0.5
    """Standard deviation of the noise of the synthetic anomalies, in standard deviations of a feature."""
    margin: PositiveFloat = 0.5
    patches: PositiveInt = 1024
    """Patches drawn of each expert's images in a step."""
    training: TrainingConfig = TrainingConfig(epochs=20, batch_images=8, learning_rate=1e-3, patience=5)


SingleExpertConfig = (
    LayoutExpertConfig | GaussianExpertConfig | SubspaceExpertConfig | MemoryExpertConfig | DiscriminatorExpertConfig
)
if not TYPE_CHECKING:
    SingleExpertConfig = plugins.extended(SingleExpertConfig, "experts", of=BaseExpertConfig, known=("fusion",))


@checked
class FusionExpertConfig:
    """Memory, layout and Gaussian experts, weighted by how well they find synthetic defects in held-out normals."""

    border: ClassVar[bool] = True
    smoothing: ClassVar[float] = 1.0
    kind: Literal["fusion"] = "fusion"
    memory: MemoryExpertConfig = MemoryExpertConfig()
    layout: LayoutExpertConfig = LayoutExpertConfig()
    gaussian: GaussianExpertConfig = GaussianExpertConfig()
    use: Annotated[tuple[Literal["memory", "layout", "gaussian"], ...], Field(min_length=1)] = (
        "memory",
        "layout",
        "gaussian",
    )
    """Experts that are fitted and fused."""
    sharpness: NaturalFloat = 1.5
    """Weights are proportional to exp(sharpness * logit(AUROC)) of patches of synthetic defects; 0 = equal weights."""
    smallest_weight: InnerShare = 0.1
    """An expert with a smaller weight in a category is not used there."""

    @property
    def members(self) -> tuple[SingleExpertConfig, ...]:
        """The experts that are fused."""
        return tuple(getattr(self, name) for name in self.use)

    def __post_init__(self) -> None:
        rules: list[tuple[bool, str]] = [(len(set(self.use)) == len(self.use), "use must name each expert once")]
        for name in ("memory", "layout", "gaussian"):
            if name not in self.use:
                rules += unused(self, name, why=f"use={list(self.use)}")
        if len(self.use) == 1:
            rules += unused(self, "sharpness smallest_weight", why=f"use={list(self.use)}")
        check(*rules)


ExpertConfig = FusionExpertConfig | SingleExpertConfig


@checked
class ClosedFormRoutingConfig:
    """Routing without a network."""

    method: Literal["statistics", "likelihood"] = "statistics"
    """Route by the distance of image statistics, or by the mean score of every expert."""


@checked
class NetworkRoutingConfig:
    """The paper's routing network (Eq. 1 and 2)."""

    method: Literal["network"] = "network"
    norm: bool = True
    """L2-normalise the routing features."""
    alpha: Share = 0.5
    """Eq. 2: weight of the centre loss against the softmax loss; 0 = softmax loss alone."""
    embedding: PositiveInt = 64
    """C, size of a routing feature."""
    stride: PositiveInt = 2
    """Stride of the routing convolution; the paper has 1, which uses every cell."""
    centre_rate: PositiveShare = 0.5
    """Rate at which the centres follow the routing features of their subclass."""
    training: TrainingConfig = TrainingConfig(epochs=10, batch_images=16, learning_rate=1e-3, patience=3)


RoutingConfig = ClosedFormRoutingConfig | NetworkRoutingConfig


@checked
class PlainAdaptionConfig:
    """Test-time adaption without settings."""

    method: Literal["auto", "off", "full", "paper"] = "auto"
    """`paper`: Eq. 5-6; `full`: Eq. 5 without the subclass; `auto`: the default of the expert."""


@checked
class GuardedAdaptionConfig:
    """Test-time adaption along the directions in which subclasses differ."""

    method: Literal["guarded"] = "guarded"
    directions: PositiveInt = 2
    """r, number of directions."""
    prior: PositiveFloat = 4.0
    """tau, prior variance of an image along these directions; larger = adapts further beyond the known subclasses."""
    shrinkage: Share = 0.1
    """Shrinkage of the covariance of image statistics towards its diagonal."""


AdaptionConfig = PlainAdaptionConfig | GuardedAdaptionConfig


@checked
class AdaptedMoEConfig(BaseHeadConfig):
    """Adapted-MoE (arXiv 2409.05611): route to experts of subclasses, adapt unseen subclasses."""

    implementation = "adapted_moe.head:AdaptedMoE"
    model = "adapted-moe"
    kind: Literal["adapted_moe"] = "adapted_moe"
    moe: bool = True
    """One expert for each subclass; false = one expert for all."""
    top_k: PositiveInt = 2
    """Experts used for an image; the paper's best is 4."""
    temperature: PositiveFloat = 0.25
    """Temperature of the softmax over similarities to subclasses; lower = more weight for the nearest subclass."""
    aggregation: Literal["paper", "min", "mean"] = "paper"
    """How expert scores are combined: Eq. 4 (routing weights), the minimum, or the mean."""
    border: Border = 2
    """Width of the border in cells. They take the score of the nearest inner cell; in a fusion only the outermost ones
    do, and the others are brought to the scale of the inner cells."""
    discover: Literal["missing", "always"] = "missing"
    """Find subclasses in the images: if none are given, or always."""
    discovery: Literal["kmeans", "mixture"] = "kmeans"
    """How subclasses are found: k-means and silhouette, or a Gaussian mixture and BIC."""
    max_subclasses: PositiveInt = 16
    """Largest number of subclasses that discovery finds."""
    expert: Annotated[ExpertConfig, Field(discriminator=DISCRIMINATOR)] = FusionExpertConfig()
    routing: Annotated[RoutingConfig, Field(discriminator="method")] = ClosedFormRoutingConfig()
    adaption: Annotated[AdaptionConfig, Field(discriminator="method")] = PlainAdaptionConfig()

    @property
    def smoothing(self) -> float:
        """Default smoothing of the anomaly map, that of the experts."""
        return self.expert.smoothing

    def __post_init__(self) -> None:
        rules: list[tuple[bool, str]] = []
        if not self.moe:
            rules += unused(self, "top_k temperature aggregation routing", why="moe=false")
        elif self.top_k == 1:
            rules += unused(self, "temperature aggregation", why="top_k=1")
        if all(isinstance(each, MemoryExpertConfig) and each.shared for each in self.expert.members):
            rules += unused(self, "aggregation", why="one memory bank for all subclasses (expert.shared=true)")
        if not self.expert.border:
            expert = getattr(self.expert, DISCRIMINATOR)
            rules += unused(self, "border", why=f"expert.{DISCRIMINATOR}={expert}")
        if self.max_subclasses == 1:
            rules += unused(self, "discovery", why="max_subclasses=1")
        check(*rules)
