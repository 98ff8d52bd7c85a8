"""Every setting, in the order of the data's way. No torch.

Each class checks itself and reports all of its mistakes together; `settings.py` turns YAML and `a.b=c` into these
classes and names the key that is wrong. The string under a field is its help text.
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
            (
                0 < self.calibration_share < 1,
                f"calibration_share must lie in (0, 1), got {self.calibration_share}",
            ),
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
            (
                self.tile_beyond == 0 or self.tile_beyond >= 1,
                f"tile_beyond must be 0 or >= 1, got {self.tile_beyond}",
            ),
            (0 <= self.tile_overlap <= 0.5, f"tile_overlap must lie in [0, 0.5], got {self.tile_overlap}"),
        )


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """A frozen network of timm, several of its stages on one grid."""

    kind: Literal["timm"] = "timm"
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
            "features 'timm'",
            (len(self.strides) > 0, "strides must name at least one stage"),
            (self.grid_stride >= 1, f"grid_stride must be 1 or more, got {self.grid_stride}"),
            (
                self.neighbourhood >= 1 and self.neighbourhood % 2 == 1,
                f"neighbourhood must be odd and positive, got {self.neighbourhood}",
            ),
            (self.batch_images >= 1, f"batch_images must be 1 or more, got {self.batch_images}"),
        )


@dataclass(frozen=True, kw_only=True)
class OfflinePairConfig:
    """A vision-language pair that pip carries: EfficientNet-Lite0 and MiniLM, aligned on ImageNet's class names."""

    kind: Literal["offline_pair"] = "offline_pair"
    weights: Literal["auto", "random"] = "auto"
    """Of the vision side: those that pip carries, with which the text side is aligned; or untrained, for tests."""
    strides: tuple[int, ...] = (4, 8, 16, 32)
    """Levels to use, by their stride to the input; 32 among them: from it leads the way to the joint space."""
    grid_stride: int = 16
    """One grid cell stands for this many pixels of the input."""
    neighbourhood: int = 1
    """Side of the local average, in cells of each level; 1 = none."""
    batch_images: int = 8
    """Images in one pass; every pass is filled up to it, so that results do not depend on the number of images."""

    def __post_init__(self) -> None:
        _check(
            "features 'offline_pair'",
            (32 in self.strides, f"strides must hold 32, got {list(self.strides)}"),
            (self.grid_stride >= 1, f"grid_stride must be 1 or more, got {self.grid_stride}"),
            (
                self.neighbourhood >= 1 and self.neighbourhood % 2 == 1,
                f"neighbourhood must be odd and positive, got {self.neighbourhood}",
            ),
            (self.batch_images >= 1, f"batch_images must be 1 or more, got {self.batch_images}"),
        )


@dataclass(frozen=True, kw_only=True)
class OpenClipConfig:
    """A CLIP model of open_clip, the patch tokens of several of its blocks."""

    kind: Literal["open_clip"] = "open_clip"
    model: str = "ViT-L-14-336-quickgelu"
    """Any of open_clip's models whose vision side is its own vision transformer."""
    weights: str = "openai"
    """A tag of open_clip (from its hub), a file (safetensors or a state dict), or `random`: untrained, for tests."""
    layers: tuple[int, ...] = (6, 12, 18, 24)
    """Blocks whose patch tokens are used, counted from 1."""
    batch_images: int = 1
    """Images in one pass; every pass is filled up to it, so that results do not depend on the number of images. A
    large transformer gains little from more on a CPU, and a single image would pay for all of them."""

    def __post_init__(self) -> None:
        _check(
            "features 'open_clip'",
            (
                len(self.layers) > 0 and all(layer >= 1 for layer in self.layers),
                f"layers must name at least one block and count from 1, got {list(self.layers)}",
            ),
            (self.batch_images >= 1, f"batch_images must be 1 or more, got {self.batch_images}"),
        )


FeaturesConfig = TimmConfig | OfflinePairConfig | OpenClipConfig


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
    border: int = 2
    """Outermost cells of the grid that take the score of their inner neighbours; 0 = none, as published."""

    def __post_init__(self) -> None:
        _check(
            "head 'memory_bank'",
            (self.border >= 0, f"border must be 0 or more, got {self.border}"),
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
    border: int = 2
    """Outermost cells of the grid that take the score of their inner neighbours; 0 = none, as published."""

    def __post_init__(self) -> None:
        _check(
            "head 'simplenet'",
            (self.border >= 0, f"border must be 0 or more, got {self.border}"),
            (self.hidden >= 1, f"hidden must be 1 or more, got {self.hidden}"),
            (self.noise > 0, f"noise must be positive, got {self.noise}"),
            (self.epochs >= 1, f"epochs must be 1 or more, got {self.epochs}"),
            (self.batch_images >= 1, f"batch_images must be 1 or more, got {self.batch_images}"),
            (self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}"),
            (self.patience >= 0, f"patience must be 0 or more, got {self.patience}"),
        )


@dataclass(frozen=True, kw_only=True)
class MSFlowConfig:
    """MSFlow (Zhou et al. 2023, arXiv 2308.15300): normalising flows at several scales that hear each other."""

    kind: Literal["msflow"] = "msflow"
    blocks: int = 2
    """Coupling blocks of the finest level."""
    further_blocks: int = 3
    """Blocks that each coarser level has more: 2, 5 and 8 are the paper's."""
    position: int = 32
    """Numbers that say the place to each block, a multiple of 4; the paper has 64."""
    clamp: float = 1.9
    """A coupling scales by at most exp(clamp)."""
    top: float = 0.1
    """The image's score is the mean of this share of its places."""
    epochs: int = 20
    batch_images: int = 8
    learning_rate: float = 1e-3
    patience: int = 0
    """Stop after this many epochs without a lower loss on the held-out normals; 0 = never."""
    border: int = 2
    """Outermost cells of the grid that take the score of their inner neighbours; 0 = none, as published."""

    def __post_init__(self) -> None:
        _check(
            "head 'msflow'",
            (self.blocks >= 1, f"blocks must be 1 or more, got {self.blocks}"),
            (self.further_blocks >= 0, f"further_blocks must be 0 or more, got {self.further_blocks}"),
            (
                self.position >= 4 and self.position % 4 == 0,
                f"position must be a positive multiple of 4, got {self.position}",
            ),
            (self.clamp > 0, f"clamp must be positive, got {self.clamp}"),
            (0 < self.top <= 1, f"top must lie in (0, 1], got {self.top}"),
            (self.epochs >= 1, f"epochs must be 1 or more, got {self.epochs}"),
            (self.batch_images >= 1, f"batch_images must be 1 or more, got {self.batch_images}"),
            (self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}"),
            (self.patience >= 0, f"patience must be 0 or more, got {self.patience}"),
            (self.border >= 0, f"border must be 0 or more, got {self.border}"),
        )


@dataclass(frozen=True, kw_only=True)
class PyramidFlowConfig:
    """PyramidFlow (Lei et al. 2023, arXiv 2303.02595): a volume-preserving flow over a pyramid, and a template."""

    kind: Literal["pyramidflow"] = "pyramidflow"
    levels: int = 4
    """Of the Laplacian pyramid."""
    blocks: int = 4
    """Each couples every level with its neighbours once."""
    kernel: int = 3
    """Side of the convolutions, odd; the paper has 7 on a grid eight times as fine."""
    volume: Literal["channel", "space"] = "channel"
    """What keeps the volume: scales are centred over the channels of a place, or over the places of a channel."""
    epochs: int = 15
    batch_images: int = 4
    learning_rate: float = 1e-3
    patience: int = 0
    """Stop after this many epochs without a lower loss on the held-out normals; 0 = never."""
    border: int = 2
    """Outermost cells of the grid that take the score of their inner neighbours; 0 = none, as published."""

    def __post_init__(self) -> None:
        _check(
            "head 'pyramidflow'",
            (self.levels >= 1, f"levels must be 1 or more, got {self.levels}"),
            (self.blocks >= 1, f"blocks must be 1 or more, got {self.blocks}"),
            (
                self.kernel >= 1 and self.kernel % 2 == 1,
                f"kernel must be odd and positive, got {self.kernel}",
            ),
            (self.epochs >= 1, f"epochs must be 1 or more, got {self.epochs}"),
            (self.batch_images >= 1, f"batch_images must be 1 or more, got {self.batch_images}"),
            (self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}"),
            (self.patience >= 0, f"patience must be 0 or more, got {self.patience}"),
            (self.border >= 0, f"border must be 0 or more, got {self.border}"),
        )


@dataclass(frozen=True, kw_only=True)
class MeanShiftConfig:
    """Mean-Shifted contrastive (Reiss and Hoshen 2021, arXiv 2106.03844): nearest normal images. No map."""

    kind: Literal["mean_shift"] = "mean_shift"
    hidden: int = 128
    """Width of the adapter, which stands in for the last stages of the backbone."""
    temperature: float = 0.25
    angular: bool = True
    """With the angular loss, which holds the normal images to their centre."""
    smallest_view: float = 0.2
    """Least share of the grid that a view of an image covers."""
    neighbours: int = 2
    """k: the score is the mean distance to so many nearest normal images."""
    max_images: int = 5_000
    """Normal images to be compared with, drawn at random; bounds memory."""
    epochs: int = 20
    batch_images: int = 32
    learning_rate: float = 0.1
    """Of SGD, for an adapter that is drawn anew; the paper's 1e-5 is for the stages of a trained backbone."""
    patience: int = 0
    """Stop after this many epochs without a lower loss on the held-out normals; 0 = never."""

    def __post_init__(self) -> None:
        _check(
            "head 'mean_shift'",
            (self.hidden >= 1, f"hidden must be 1 or more, got {self.hidden}"),
            (self.temperature > 0, f"temperature must be positive, got {self.temperature}"),
            (0 < self.smallest_view <= 1, f"smallest_view must lie in (0, 1], got {self.smallest_view}"),
            (self.neighbours >= 1, f"neighbours must be 1 or more, got {self.neighbours}"),
            (self.max_images >= 1, f"max_images must be 1 or more, got {self.max_images}"),
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
    expert: Literal["auto", "layout", "gaussian", "subspace", "memory", "discriminator"] = "auto"
    """What an expert is. `layout`: where things have their place; `gaussian`: texture without a place; `auto` takes one
    of these two by the normal images; `discriminator` is the paper's."""
    adaption: Literal["auto", "off", "full", "paper", "guarded"] = "auto"
    """Test-time adaption. `paper`: Eq. 5-6; `full`: Eq. 5 without the subclass; `guarded`: along the directions in
    which subclasses differ; `auto`: what suits the expert (layout and subspace off, gaussian full, others guarded)."""
    aggregation: Literal["paper", "min", "mean"] = "paper"
    """How the experts asked are put together: Eq. 4 (routing weights), the least anomalous, or all alike."""
    top_k: int = 2
    """Experts asked an image; the paper's best is 4."""
    temperature: float = 0.25
    """Of the softmax over the similarity to each subclass; lower = the nearest subclass decides."""
    border: int = 2
    """Outermost cells of the grid that take the score of their inner neighbours; 0 = none."""
    discover: Literal["missing", "always"] = "missing"
    """Find subclasses from the images: when none are given, or even then."""
    discovery: Literal["kmeans", "mixture"] = "kmeans"
    """How: k-means and silhouette, or a Gaussian mixture and BIC."""
    max_subclasses: int = 16
    """Never finds more."""

    routing: Literal["statistics", "likelihood", "network"] = "statistics"
    """By image statistics, by what the experts themselves find usual (both without training), or by the paper's
    network."""
    norm: bool = True
    """L2-normalise the routing features."""
    alpha: float = 0.5
    """Eq. 2: weight of the centre loss against the softmax loss; 0 = softmax loss alone."""
    embedding: int = 64
    """C, numbers of a routing feature."""
    stride: int = 2
    """Of the routing convolution; 1 is the paper's and looks at every cell."""
    centre_rate: float = 0.5
    """How fast the centres follow the routing features of their subclass."""
    router_epochs: int = 10
    router_batch_images: int = 16
    router_learning_rate: float = 1e-3
    router_patience: int = 3

    directions: int = 2
    """r, directions along which guarded adaption may move."""
    prior: float = 4.0
    """tau: how far beyond the known subclasses guarded adaption takes an image to lie, as a variance."""
    shrinkage: float = 0.1
    """Of the covariance of image statistics towards its diagonal."""

    hidden: int = 128
    """Width of a discriminator."""
    noise: float = 0.5
    """Deviation of the noise that discriminators learn to tell, in deviations of a feature."""
    margin: float = 0.5
    patches: int = 1024
    """Drawn of each expert's images a step."""
    epochs: int = 20
    batch_images: int = 8
    learning_rate: float = 1e-3
    patience: int = 5

    calibrated: bool = True
    """Divide a distance to the memory by what is usual around the stored patch."""
    max_patches: int = 1_000
    """Stored in each expert's memory."""
    max_pool: int = 20_000
    """Patches of each expert drawn at random before the coreset."""
    projection: int = 64
    """Numbers a patch in the random projection in which the coreset is chosen; 0 = all."""

    fine: float = 0.364
    """Share of the channels, finest stages first, that Gaussian experts look at: strides 4 and 8 of EfficientNet-Lite.
    The image score of layout experts looks at the others."""
    pooled: float = 0.25
    """Weight of the covariance of all subclasses in each Gaussian expert's."""
    placed: float = 0.02
    """expert=auto takes layout experts where the place in the image explains more than this share of the variance
    (about 0.055 on magnetic tiles, -0.013 on cloth)."""
    gaussian_shrinkage: float = 0.1
    """Of a Gaussian expert's covariance towards its mean variance."""

    cells: int = 8
    """Subspace and layout experts see the grid averaged to at most cells x cells."""
    variance: float = 0.97
    """Share of the variance that the components of subspace and layout experts keep."""
    max_images: int = 1_000
    """Images of each subspace expert, or of all layout experts, drawn at random; bounds memory."""
    components: int = 200
    """Layout experts keep no more."""
    own: float = 0.5
    """Weight of a layout expert's own scale against that of all images."""

    def __post_init__(self) -> None:
        def at_least(name: str, least: int) -> tuple[bool, str]:
            value = getattr(self, name)
            return value >= least, f"{name} must be {least} or more, got {value}"

        def positive(name: str) -> tuple[bool, str]:
            value = getattr(self, name)
            return value > 0, f"{name} must be positive, got {value}"

        _check(
            "head 'adapted_moe'",
            at_least("top_k", 1),
            positive("temperature"),
            at_least("border", 0),
            at_least("max_subclasses", 1),
            (0 <= self.alpha <= 1, f"alpha must lie in [0, 1], got {self.alpha}"),
            at_least("embedding", 1),
            at_least("stride", 1),
            (0 < self.centre_rate <= 1, f"centre_rate must lie in (0, 1], got {self.centre_rate}"),
            at_least("router_epochs", 1),
            at_least("router_batch_images", 1),
            positive("router_learning_rate"),
            at_least("router_patience", 0),
            at_least("directions", 1),
            positive("prior"),
            (0 <= self.shrinkage <= 1, f"shrinkage must lie in [0, 1], got {self.shrinkage}"),
            at_least("hidden", 1),
            positive("noise"),
            positive("margin"),
            at_least("patches", 1),
            at_least("epochs", 1),
            at_least("batch_images", 1),
            positive("learning_rate"),
            at_least("patience", 0),
            at_least("max_patches", 1),
            at_least("max_pool", 1),
            at_least("projection", 0),
            (
                0 < self.gaussian_shrinkage <= 1,
                f"gaussian_shrinkage must lie in (0, 1], got {self.gaussian_shrinkage}",
            ),
            at_least("cells", 1),
            (0 < self.variance < 1, f"variance must lie in (0, 1), got {self.variance}"),
            at_least("max_images", 2),
            at_least("components", 1),
            (0 < self.fine <= 1, f"fine must lie in (0, 1], got {self.fine}"),
            (0 <= self.placed <= 1, f"placed must lie in [0, 1], got {self.placed}"),
            (0 <= self.pooled <= 1, f"pooled must lie in [0, 1], got {self.pooled}"),
            (0 <= self.own <= 1, f"own must lie in [0, 1], got {self.own}"),
        )


@dataclass(frozen=True, kw_only=True)
class CNCConfig:
    """CNC (arXiv 2501.00346): one decoder for all categories, held to what text says of the normal."""

    kind: Literal["cnc"] = "cnc"
    width: int = 96
    """d, numbers of a token in the decoder."""
    blocks: int = 1
    """Transformer blocks a level."""
    heads: int = 4
    """Of every attention; they share d."""
    dropout: float = 0.0
    """Share of the fused numbers that are zero in training."""
    bottleneck: int = 0
    """Width of a linear bottleneck behind the experts; 0 = none."""

    moe: bool = True
    """A gated mixture of experts over the patch tokens."""
    experts: int = 5
    top_k: int = 2
    """Experts asked a patch."""
    balance: float = 0.01
    """Weight of the load-balance loss."""

    text: Literal["auto", "learned", "free", "random", "off"] = "auto"
    """What the prompts are. `learned`: a learnable context read by the text encoder; `free`: vectors without a text,
    learnt; `random`: as drawn; `off`: none; `auto`: learned where the features have a text side, else free vectors."""
    context_words: int = 8
    """Learnable words before each state."""
    normal_states: tuple[str, ...] = (
        "normal flawless surface",
        "perfect texture",
        "clean unbroken material",
    )
    """What is said of a normal patch, of whichever category; the guide's words stand beside the first."""
    abnormal_states: tuple[str, ...] = (
        "damaged surface with a defect",
        "a scratch",
        "a hole",
        "a stain",
        "a crack",
    )
    """What is said of a damaged patch."""
    temperature: float = 0.07
    """Of the softmax over prompts; the paper's 0.001 is for CLIP's own scale."""
    joint_levels: tuple[int, ...] = ()
    """Levels that text terms look at, from 0; empty = all."""
    prompt_epochs: int = 15
    prompt_learning_rate: float = 5e-3
    distillation: float = 0.1
    """Weight of the cross-modal feature distillation."""
    promotion: float = 0.03
    """Weight of the normality promotion."""
    text_weight: float = 0.25
    """beta: weight of the text score beside the reconstruction, both in deviations of held-out normals."""

    guide: Literal["text", "free", "off"] = "off"
    """Decode patches as mixtures of tokens of the normal: words beside the first normal state, or free tokens."""
    guide_words: int = 16
    """M, how many."""
    guide_residual: float = 0.0
    """Share of the patch itself that passes by the guide; 0 = none."""

    synthetic_variants: int = 2
    """Damages of each fit normal that are made; 0 = trained on normal images only, as the paper."""
    synthetic_share: float = 0.75
    """Share of the images of a step that are damaged."""
    covered: float = 0.1
    """Share of a cell that must be damaged to teach the prompts the abnormal."""

    per_kind: bool = True
    """Bring each level's map to mean 0 and deviation 1 over the held-out normals of the nearest kind."""
    border: int = 1
    """Outermost cells of the grid that take the score of their inner neighbours; 0 = none."""
    precision: Literal["32", "bf16"] = "32"
    """Of the decoder while it trains; losses and gate logits of either stay in 32 bits."""
    epochs: int = 20
    batch_images: int = 8
    learning_rate: float = 1e-3
    patience: int = 0
    """Stop after this many epochs without a lower loss on the held-out normals; 0 = never."""

    def __post_init__(self) -> None:
        def at_least(name: str, least: float) -> tuple[bool, str]:
            value = getattr(self, name)
            return value >= least, f"{name} must be {least} or more, got {value}"

        def positive(name: str) -> tuple[bool, str]:
            value = getattr(self, name)
            return value > 0, f"{name} must be positive, got {value}"

        def share(name: str) -> tuple[bool, str]:
            value = getattr(self, name)
            return 0 <= value <= 1, f"{name} must lie in [0, 1], got {value}"

        _check(
            "head 'cnc'",
            at_least("heads", 1),
            (
                self.width >= 1 and self.heads >= 1 and self.width % self.heads == 0,
                f"width must be a multiple of heads ({self.heads}), got {self.width}",
            ),
            at_least("blocks", 1),
            (0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}"),
            at_least("bottleneck", 0),
            at_least("experts", 1),
            (
                1 <= self.top_k <= self.experts,
                f"top_k must lie in 1..experts (1..{self.experts}), got {self.top_k}",
            ),
            at_least("balance", 0),
            at_least("context_words", 1),
            (len(self.normal_states) > 0, "normal_states must name at least one"),
            (len(self.abnormal_states) > 0, "abnormal_states must name at least one"),
            positive("temperature"),
            at_least("prompt_epochs", 1),
            positive("prompt_learning_rate"),
            at_least("distillation", 0),
            at_least("promotion", 0),
            at_least("text_weight", 0),
            at_least("guide_words", 2),
            share("guide_residual"),
            at_least("synthetic_variants", 0),
            share("synthetic_share"),
            (0 <= self.covered < 1, f"covered must lie in [0, 1), got {self.covered}"),
            at_least("border", 0),
            at_least("epochs", 1),
            at_least("batch_images", 1),
            positive("learning_rate"),
            at_least("patience", 0),
        )


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
            (
                0 < self.false_alarm_rate < 1,
                f"false_alarm_rate must lie in (0, 1), got {self.false_alarm_rate}",
            ),
            (0 < self.unknown_rate < 1, f"unknown_rate must lie in (0, 1), got {self.unknown_rate}"),
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole detector."""

    data: DataConfig = field(default_factory=DataConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    features: FeaturesConfig = field(default_factory=TimmConfig)
    head: HeadConfig = field(default_factory=AdaptedMoEConfig)
    maps: MapsConfig = field(default_factory=MapsConfig)
    outcome: OutcomeConfig = field(default_factory=OutcomeConfig)
    seed: int = 0
