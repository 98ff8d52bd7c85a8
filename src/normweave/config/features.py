"""Settings of the frozen features."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from normweave.validation import OddInt, PositiveInt, check, checked, unused

PassImages = PositiveInt
"""Images in one pass; every pass is padded to it, so that results do not depend on the number of images."""


class _Features:
    packages: ClassVar[tuple[str, ...]] = ()
    """Further packages whose versions a bundle records."""
    side: ClassVar[int | None] = None
    """Height and width of the input that these features were trained for; None = any."""


@checked
class TimmConfig(_Features):
    """A frozen network of timm, several of its stages on one grid."""

    kind: Literal["timm"] = "timm"
    backbone: str = "tf_efficientnet_lite0"
    """Any timm model that offers forward_intermediates; tf_efficientnet_lite0/1/2 need no download."""
    weights: str = "auto"
    """`auto`: from a pip package, else from timm's hub; a path: a safetensors file; `random`: untrained, for tests."""
    strides: Annotated[tuple[int, ...], Field(min_length=1)] = (4, 8, 16)
    """Stages to use, by their stride to the input."""
    blocks: tuple[PositiveInt, ...] = ()
    """Blocks of a plain vision transformer, counted from 1, whose patch tokens are averaged; empty = use `strides`."""
    grid_stride: PositiveInt = 8
    """Pixels of the input per grid cell; with `blocks` best the patch of the transformer."""
    neighbourhood: OddInt = 3
    """Side of the local average, in cells of each stage; 1 = none."""
    batch_images: PassImages = 8

    def __post_init__(self) -> None:
        if self.blocks:
            check(*unused(self, "strides", why="blocks"))


@checked
class OfflinePairConfig(_Features):
    """A vision-language pair from pip packages: EfficientNet-Lite0 and MiniLM, aligned on ImageNet's class names."""

    kind: Literal["offline_pair"] = "offline_pair"
    weights: Literal["auto", "random"] = "auto"
    """Weights of the vision side. `auto`: from pip, aligned with the text side; `random`: untrained, for tests."""
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

    packages = ("open_clip_torch",)
    side = 336  # a multiple of the patch of 14 pixels
    kind: Literal["open_clip"] = "open_clip"
    model: str = "ViT-L-14-336-quickgelu"
    """Any of open_clip's models whose vision side is its own vision transformer."""
    weights: str = "openai"
    """A tag of open_clip (from its hub), a file (safetensors or a state dict), or `random`: untrained, for tests."""
    layers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (6, 12, 18, 24)
    """Blocks whose patch tokens are used, counted from 1."""
    batch_images: PassImages = 1
    """Images in one pass; every pass is padded to it. On a CPU a large transformer gains little from more than 1."""


FeaturesConfig = TimmConfig | OfflinePairConfig | OpenClipConfig
