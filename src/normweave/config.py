"""Every setting, in the order in which an image passes through the detector. No torch.

Bounds are annotations that pydantic checks. A section with variants (`features`, `head`, `head.expert`, ...) is a union
told apart by its discriminator field. The string under a field is its help text. `settings.py` reads these classes
from YAML and from `a.b=c`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from normweave.validation import DISCRIMINATOR as DISCRIMINATOR
from normweave.validation import (
    InnerShare,
    NaturalFloat,
    NaturalInt,
    OddInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Share,
    check,
    checked,
    unused,
)

Border = NaturalInt
"""Outermost cells of the grid that take the score of their inner neighbours; 0 = none, as published."""
PassImages = PositiveInt
"""Images in one pass; every pass is padded to it, so that results do not depend on the number of images."""
Cells = PositiveInt
"""The grid is averaged to at most cells x cells before it is flattened."""
Variance = InnerShare
"""Share of the variance that the principal components keep."""
MaxImages = Annotated[int, Field(ge=2)]
"""Images drawn at random to fit on, at most; bounds memory."""
Projection = NaturalInt
"""Dimensions of the random projection in which the coreset is chosen; 0 = no projection."""


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
    """For filename-regex: its first group is the subclass, matched against the file's stem."""
    calibration_share: InnerShare = 0.33
    """Share of the train normals that is held out for the operating points, by whole groups."""
    holdout_share: InnerShare = 0.15
    """Share of the fit normals held out from gradients, by whole groups: for early stopping and score scales."""

    def __post_init__(self) -> None:
        given = self.subclass_from != "filename-regex" or bool(self.subclass_regex)
        example = "for example '^(exp[0-9])_'"
        check((given, f"subclass_regex must be given with subclass_from=filename-regex, {example}"))


@checked
class PrepareConfig:
    """From an image of any size to the network's input; saved with the detector."""

    height: Annotated[int, Field(ge=32, le=4096)] = 256
    width: Annotated[int, Field(ge=32, le=4096)] = 256
    tile_beyond: float = 4.0
    """An image more than this many times as high or wide as the input is cut into tiles; 0 = never."""
    tile_overlap: Annotated[float, Field(ge=0, le=0.5)] = 0.125
    """Share of a tile's side that it has in common with its neighbour."""

    def __post_init__(self) -> None:
        allowed = self.tile_beyond == 0 or self.tile_beyond >= 1
        check((allowed, f"tile_beyond must be 0 or at least 1, got {self.tile_beyond}"))


class _Features:
    side: ClassVar[int | None] = None
    """Height and width of the input that these features were trained for; None = any."""


@checked
class TimmConfig(_Features):
    """A frozen network of timm, several of its stages on one grid."""

    kind: Literal["timm"] = "timm"
    backbone: str = "tf_efficientnet_lite0"
    """Any timm model that offers forward_intermediates; tf_efficientnet_lite0/1/2 need no download."""
    weights: str = "auto"
    """`auto`: carried by pip, else from timm's hub; a path: a safetensors file; `random`: untrained, for tests."""
    strides: Annotated[tuple[int, ...], Field(min_length=1)] = (4, 8, 16)
    """Stages to use, by their stride to the input."""
    grid_stride: PositiveInt = 8
    """Pixels of the input per grid cell."""
    neighbourhood: OddInt = 3
    """Side of the local average, in cells of each stage; 1 = none."""
    batch_images: PassImages = 8


@checked
class OfflinePairConfig(_Features):
    """A vision-language pair that pip carries: EfficientNet-Lite0 and MiniLM, aligned on ImageNet's class names."""

    kind: Literal["offline_pair"] = "offline_pair"
    weights: Literal["auto", "random"] = "auto"
    """Of the vision side: those that pip carries, with which the text side is aligned; or untrained, for tests."""
    strides: tuple[int, ...] = (4, 8, 16, 32)
    """Levels to use, by their stride to the input; must hold 32, which is projected to the joint space."""
    grid_stride: PositiveInt = 16
    """Pixels of the input per grid cell."""
    neighbourhood: OddInt = 1
    """Side of the local average, in cells of each level; 1 = none."""
    batch_images: PassImages = 8

    def __post_init__(self) -> None:
        check((32 in self.strides, f"strides must hold 32, got {list(self.strides)}"))


@checked
class OpenClipConfig(_Features):
    """A CLIP model of open_clip, the patch tokens of several of its blocks."""

    side = 336  # a multiple of the patch of 14 pixels
    kind: Literal["open_clip"] = "open_clip"
    model: str = "ViT-L-14-336-quickgelu"
    """Any of open_clip's models whose vision side is its own vision transformer."""
    weights: str = "openai"
    """A tag of open_clip (from its hub), a file (safetensors or a state dict), or `random`: untrained, for tests."""
    layers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (6, 12, 18, 24)
    """Blocks whose patch tokens are used, counted from 1."""
    batch_images: PassImages = 1
    """A large transformer gains little from more on a CPU, and a single image would pay for all of them."""


FeaturesConfig = TimmConfig | OfflinePairConfig | OpenClipConfig


@checked
class TrainingConfig:
    """How long and how fast a part is trained by gradient."""

    epochs: PositiveInt
    batch_images: PositiveInt
    """Images in one step."""
    learning_rate: PositiveFloat
    patience: NaturalInt = 0
    """Stop after this many epochs without a lower loss on the held-out normals; 0 = never."""


class _Head:
    implementation: ClassVar[str]
    """Module and class below `normweave.heads`; the class is built as `Class(config, shape=shape, dims=dims)`."""
    model: ClassVar[str]
    """Name on the command line."""
    features: ClassVar[type[FeaturesConfig]] = TimmConfig
    """Features that the head is trained on by default."""


@checked
class MemoryBankConfig(_Head):
    """PatchCore (Roth et al. 2022, arXiv 2106.08265): distance to the nearest stored normal patch."""

    implementation = "memory_bank:MemoryBank"
    model = "patchcore"
    kind: Literal["memory_bank"] = "memory_bank"
    share: PositiveShare = 0.1
    """Share of the pool that the greedy coreset keeps."""
    max_patches: PositiveInt = 5_000
    """Upper bound of the size of the coreset."""
    max_pool: PositiveInt = 50_000
    """Patches drawn at random before the coreset; bounds memory and time."""
    projection: Projection = 64
    border: Border = 2


@checked
class SimpleNetConfig(_Head):
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
class MSFlowConfig(_Head):
    """MSFlow (Zhou et al. 2023, arXiv 2308.15300): normalising flows at several scales and a fusion flow."""

    implementation = "msflow:MSFlow"
    model = "msflow"
    kind: Literal["msflow"] = "msflow"
    blocks: PositiveInt = 2
    """Coupling blocks of the finest level."""
    further_blocks: NaturalInt = 3
    """Blocks that each coarser level has more: 2, 5 and 8 are the paper's."""
    position: Annotated[int, Field(ge=4, multiple_of=4)] = 32
    """Size of the position encoding of each block; the paper has 64."""
    clamp: PositiveFloat = 1.9
    """A coupling scales by at most exp(clamp)."""
    top: PositiveShare = 0.1
    """The image's score is the mean of this share of its cells."""
    training: TrainingConfig = TrainingConfig(epochs=20, batch_images=8, learning_rate=1e-3)
    border: Border = 2


@checked
class PyramidFlowConfig(_Head):
    """PyramidFlow (Lei et al. 2023, arXiv 2303.02595): a volume-preserving flow over a pyramid, and a template."""

    implementation = "pyramidflow:PyramidFlow"
    model = "pyramidflow"
    kind: Literal["pyramidflow"] = "pyramidflow"
    levels: PositiveInt = 4
    """Levels of the Laplacian pyramid."""
    blocks: PositiveInt = 4
    """Each couples every level with its neighbours once."""
    kernel: OddInt = 3
    """Side of the convolutions, odd; the paper has 7 on a grid eight times as fine."""
    volume: Literal["channel", "space"] = "channel"
    """How volume is preserved: scales are centred over the channels of a cell, or over the cells of a channel."""
    training: TrainingConfig = TrainingConfig(epochs=15, batch_images=4, learning_rate=1e-3)
    border: Border = 2


@checked
class MeanShiftConfig(_Head):
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
    """Normal images to be compared with, drawn at random; bounds memory."""
    training: TrainingConfig = TrainingConfig(epochs=20, batch_images=32, learning_rate=0.1)
    """By SGD, for an adapter with random initial weights; the paper's rate of 1e-5 is for a trained backbone."""


@checked
class DFMConfig(_Head):
    """DFM (Ahuja et al. 2019, arXiv 1909.11786): principal components of the whole image's features."""

    implementation = "dfm:DFM"
    model = "dfm"
    kind: Literal["dfm"] = "dfm"
    cells: Cells = 8
    variance: Variance = 0.97
    max_images: MaxImages = 2_000


class _Expert:
    implementation: ClassVar[str]
    """Module and class below `normweave.heads.adapted_moe.experts`."""
    border: ClassVar[bool] = True
    """Whether the outermost cells take the score of their inner neighbours; the number is `head.border`."""

    @property
    def candidates(self) -> tuple[ExpertConfig, ...]:
        """The experts to choose from: this one."""
        return (self,)  # type: ignore[return-value]


FINE = 0.364
"""The channels of strides 4 and 8 of EfficientNet-Lite."""


@checked
class LayoutExpertConfig(_Expert):
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
    """Weight of an expert's own scale against that of all images."""
    max_images: MaxImages = 1_000


@checked
class GaussianExpertConfig(_Expert):
    """Mahalanobis distance to the patches of a subclass, for textures."""

    implementation = "gaussian:GaussianExperts"
    kind: Literal["gaussian"] = "gaussian"
    fine: PositiveShare = FINE
    """Share of the channels, finest stages first, that are used."""
    pooled: Share = 0.25
    """Weight of the covariance of all subclasses in that of each expert."""
    shrinkage: PositiveShare = 0.1
    """Shrinkage of the covariance towards its mean variance."""


@checked
class SubspaceExpertConfig(_Expert):
    """Residual of a subspace of the whole images of a subclass (DFM, arXiv 1909.11786)."""

    implementation = "subspace:SubspaceExperts"
    kind: Literal["subspace"] = "subspace"
    cells: Cells = 8
    variance: Variance = 0.97
    max_images: MaxImages = 1_000


@checked
class MemoryExpertConfig(_Expert):
    """Distance to the nearest stored normal patch of a subclass (PatchCore, arXiv 2106.08265)."""

    implementation = "memory:MemoryExperts"
    kind: Literal["memory"] = "memory"
    calibrated: bool = True
    """Divide a distance by the usual distance around the stored patch."""
    max_patches: PositiveInt = 1_000
    """Patches stored for each expert, at most."""
    max_pool: PositiveInt = 20_000
    """Patches of each expert drawn at random before the coreset."""
    projection: Projection = 64


@checked
class DiscriminatorExpertConfig(_Expert):
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


@checked
class AutoExpertConfig(_Expert):
    """Layout experts where the position in the image explains the features, Gaussian experts elsewhere."""

    kind: Literal["auto"] = "auto"
    fine: PositiveShare = FINE
    """Share of the channels, finest stages first, in which this is measured; `fine` of the expert that is chosen."""
    position_variance: Share = 0.02
    """Layout experts are chosen above this share of variance explained (0.055 on magnetic tiles, -0.013 on cloth)."""

    @property
    def candidates(self) -> tuple[ExpertConfig, ...]:
        """The expert for images in which position matters, and the other."""
        return LayoutExpertConfig(fine=self.fine), GaussianExpertConfig(fine=self.fine)


ExpertConfig = (
    AutoExpertConfig
    | LayoutExpertConfig
    | GaussianExpertConfig
    | SubspaceExpertConfig
    | MemoryExpertConfig
    | DiscriminatorExpertConfig
)


@checked
class ClosedFormRoutingConfig:
    """Routing without a network."""

    method: Literal["statistics", "likelihood"] = "statistics"
    """By the distance of image statistics, or by the mean score of every expert."""


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
class AdaptedMoEConfig(_Head):
    """Adapted-MoE (arXiv 2409.05611): route to experts of subclasses, adapt unseen subclasses."""

    implementation = "adapted_moe.head:AdaptedMoE"
    model = "adapted-moe"
    kind: Literal["adapted_moe"] = "adapted_moe"
    moe: bool = True
    """One expert for each subclass; false = one expert for all."""
    top_k: PositiveInt = 2
    """Experts used for an image; the paper's best is 4."""
    temperature: PositiveFloat = 0.25
    """Of the softmax over the similarity to each subclass; lower = the nearest subclass has more weight."""
    aggregation: Literal["paper", "min", "mean"] = "paper"
    """How expert scores are combined: Eq. 4 (routing weights), the minimum, or the mean."""
    border: Border = 2
    discover: Literal["missing", "always"] = "missing"
    """Find subclasses in the images: if none are given, or always."""
    discovery: Literal["kmeans", "mixture"] = "kmeans"
    """How subclasses are found: k-means and silhouette, or a Gaussian mixture and BIC."""
    max_subclasses: PositiveInt = 16
    """Largest number of subclasses that discovery finds."""
    expert: Annotated[ExpertConfig, Field(discriminator=DISCRIMINATOR)] = AutoExpertConfig()
    routing: Annotated[RoutingConfig, Field(discriminator="method")] = ClosedFormRoutingConfig()
    adaption: Annotated[AdaptionConfig, Field(discriminator="method")] = PlainAdaptionConfig()

    def __post_init__(self) -> None:
        rules: list[tuple[bool, str]] = []
        if not self.moe:
            rules += unused(self, "top_k temperature aggregation routing", why="moe=false")
        elif self.top_k == 1:
            rules += unused(self, "temperature aggregation", why="top_k=1")
        if not self.expert.border:
            expert = getattr(self.expert, DISCRIMINATOR)
            rules += unused(self, "border", why=f"expert.{DISCRIMINATOR}={expert}")
        if self.max_subclasses == 1:
            rules += unused(self, "discovery", why="max_subclasses=1")
        check(*rules)


@checked
class GatingConfig:
    """The gated mixture of experts of CNC."""

    experts: PositiveInt = 5
    top_k: PositiveInt = 2
    """Experts used for a patch."""
    balance: NaturalFloat = 0.01
    """Weight of the load-balance loss."""

    def __post_init__(self) -> None:
        check(
            (self.top_k <= self.experts, f"top_k must be at most experts ({self.experts}), got {self.top_k}")
        )


@checked
class PromptsConfig:
    """The prompts of CNC and the losses that use them."""

    text: Literal["auto", "learned", "free", "random", "off"] = "auto"
    """`learned`: a learnable context read by the text encoder; `free`: learnable vectors without a text; `random`:
    random vectors; `off`: none; `auto`: learned where the features have a text side, else free."""
    context_words: PositiveInt = 8
    """Learnable words before each state."""
    normal_states: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "normal flawless surface",
        "perfect texture",
        "clean unbroken material",
    )
    """Descriptions of a normal patch, of whichever category; the guide uses the first."""
    abnormal_states: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "damaged surface with a defect",
        "a scratch",
        "a hole",
        "a stain",
        "a crack",
    )
    """Descriptions of an anomalous patch."""
    temperature: PositiveFloat = 0.07
    """Of the softmax over prompts; the paper's 0.001 is for CLIP's own scale."""
    joint_levels: tuple[int, ...] = ()
    """Levels that the text losses use, from 0; empty = all."""
    distillation: NaturalFloat = 0.1
    """Weight of the cross-modal feature distillation."""
    promotion: NaturalFloat = 0.03
    """Weight of the normality promotion."""
    weight: NaturalFloat = 0.25
    """beta: weight of the text score beside the reconstruction, both in standard deviations of held-out normals."""
    training: TrainingConfig = TrainingConfig(epochs=15, batch_images=8, learning_rate=5e-3)


@checked
class GuideConfig:
    """The normality guide of CNC: patches are decoded as mixtures of tokens of the normal."""

    tokens: Literal["text", "free", "off"] = "off"
    """Words before the first normal state, or free tokens."""
    words: Annotated[int, Field(ge=2)] = 16
    """M, number of tokens."""
    residual: Share = 0.0
    """Share of the patch itself that bypasses the guide; 0 = none."""

    def __post_init__(self) -> None:
        if self.tokens == "off":
            check(*unused(self, "words residual", why="tokens=off"))


@checked
class SyntheticConfig:
    """Synthetic anomalies that CNC trains on."""

    variants: NaturalInt = 2
    """Synthetic anomalies made of each fit image; 0 = trained on normal images only, as the paper."""
    share: Share = 0.75
    """Share of the images of a step that are synthetic anomalies."""
    covered: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a cell that must be anomalous for the cell to count as anomalous for the prompts."""

    def __post_init__(self) -> None:
        if self.variants == 0:
            check(*unused(self, "share covered", why="variants=0"))


@checked
class CNCConfig(_Head):
    """CNC (arXiv 2501.00346): one decoder for all categories, constrained by prompts of the normal."""

    implementation = "cnc.head:CNC"
    model = "cnc"
    features = OfflinePairConfig
    kind: Literal["cnc"] = "cnc"
    width: PositiveInt = 96
    """d, size of a token in the decoder."""
    blocks: PositiveInt = 1
    """Transformer blocks a level."""
    heads: PositiveInt = 4
    """Of every attention; they share d."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the fused tokens in training."""
    bottleneck: NaturalInt = 0
    """Width of a linear bottleneck behind the experts; 0 = none."""
    moe: bool = True
    """A gated mixture of experts over the patch tokens."""
    gating: GatingConfig = GatingConfig()
    prompts: PromptsConfig = PromptsConfig()
    guide: GuideConfig = GuideConfig()
    synthetic: SyntheticConfig = SyntheticConfig()
    per_subclass: bool = True
    """Bring each level's map to mean 0 and std 1 over the held-out normals of the nearest subclass."""
    border: Border = 1
    precision: Literal["32", "bf16"] = "32"
    """Of the decoder in training; losses and gate logits are in 32 bits in both."""
    training: TrainingConfig = TrainingConfig(epochs=20, batch_images=8, learning_rate=1e-3)

    def __post_init__(self) -> None:
        rules = [
            (
                self.width % self.heads == 0,
                f"width must be a multiple of heads ({self.heads}), got {self.width}",
            )
        ]
        if not self.moe:
            rules += unused(self, "gating", why="moe=false")
        check(*rules)


HeadConfig = (
    AdaptedMoEConfig
    | CNCConfig
    | SimpleNetConfig
    | MemoryBankConfig
    | DFMConfig
    | MSFlowConfig
    | PyramidFlowConfig
    | MeanShiftConfig
)


def models() -> dict[str, type[HeadConfig]]:
    """Return the classes of head settings by their name on the command line."""
    return {head.model: head for head in get_args(HeadConfig)}


@checked
class MapsConfig:
    """From the grid of patch scores to the anomaly map."""

    smoothing: NaturalFloat = 4.0
    """Std of the Gaussian in pixels of an input 256 pixels high; it is scaled with the input."""


@checked
class OutcomeConfig:
    """The rates from which the thresholds follow."""

    false_alarm_rate: InnerShare = 0.05
    """Share of new normal images that may be called anomalous."""
    unknown_rate: InnerShare = 0.01
    """Share of new normal images that may be called unknown."""


@checked
class Config:
    """All settings of a detector."""

    data: DataConfig = DataConfig()
    prepare: PrepareConfig = PrepareConfig()
    features: Annotated[FeaturesConfig, Field(discriminator=DISCRIMINATOR)] = TimmConfig()
    head: Annotated[HeadConfig, Field(discriminator=DISCRIMINATOR)] = AdaptedMoEConfig()
    maps: MapsConfig = MapsConfig()
    outcome: OutcomeConfig = OutcomeConfig()
    seed: int = 0

    @property
    def model(self) -> str:
        """Name of the head, as outcomes and bundles record it."""
        return str(getattr(self.head, DISCRIMINATOR))
