"""Patch features of a frozen backbone, several of its stages on one grid."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from normweave.errors import ConfigError, DataError

FORMAT = 1
"""Part of the fingerprint. Raise it if the same weights and settings give other features than before."""


class Backbone(NamedTuple):
    """A network with its weights, and how to read features from it."""

    model: Any
    """A module with `forward_intermediates` as timm's models have it."""
    name: str
    """Name of the network in error messages and in the fingerprint."""
    indices: list[int]
    """The intermediates to use, numbered as in timm, shallowest first."""
    mean: Sequence[float]
    """Pixel mean that the weights expect, R G B, white = 1."""
    std: Sequence[float]
    """Pixel standard deviation that the weights expect, R G B, white = 1."""
    grid_stride: int
    """Side of a grid cell in pixels of the input."""
    neighbourhood: int
    """Side of the local average in cells of a stage, odd. 1 = none."""
    average: bool = False
    """Use the mean of the intermediates, `mean_of_blocks`, as the only stage. They must have one shape."""


def mean_of_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """Return the mean over L blocks of their layer-normalized tokens, (B, D, h, w), from L tensors of this shape.

        z = 1 / L * sum_l (t_l - mean t_l) / sqrt(var t_l + 1e-6)

    with the mean and the variance over the D channels of a token t_l. Dinomaly (Guo et al. 2024, arXiv 2405.14325)
    averages the tokens as they are. They grow from block to block, and without the normalization the deepest block
    would count most. The scale and shift of the transformer's own last norm are left out: they are the same for all
    blocks, so that the standardization of each channel would undo them.
    """
    tokens = torch.stack([block.movedim(1, -1) for block in blocks])  # (L, B, h, w, D)
    normalized = functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
    return normalized.mean(0).movedim(-1, 1).contiguous()  # (B, D, h, w)


def check_patches(name: str, *, patch: int, height: int, width: int, trained: Sequence[int]) -> None:
    """Check that height and width are multiples of a transformer's patch: it would not see the rest.

    Args:
        trained: height and width of the images on which the transformer was trained.

    Raises:
        ConfigError: one of them is not; the message names the nearest multiples.
    """
    wrong = []
    for side, pixels in (("height", height), ("width", width)):
        if pixels % patch:
            below = pixels // patch * patch
            near = [str(size) for size in (below, below + patch) if size]
            wrong.append(f"prepare.{side} must be {' or '.join(near)}, got {pixels}")
    if wrong:
        raise ConfigError(
            f"{name} reads images of multiples of its patch of {patch} pixels: {'; '.join(wrong)}. "
            f"It was trained on {trained[0]} x {trained[1]}."
        )


class FrozenFeatures(nn.Module):
    """Extract patch features with a network that is never trained.

    As in PatchCore (Roth et al. 2022, arXiv 2106.08265, section 3.1) and SimpleNet (Liu et al. 2023, arXiv
    2303.15140, section 3.1): each cell of a stage is averaged with its neighbours inside the image, the stages are
    resized to one grid by bilinear interpolation and concatenated, shallowest first. Several blocks of a transformer
    can be averaged to one stage (`mean_of_blocks`).

    `extract` takes any number of images, and the features of an image do not depend on that number. `forward` is one
    pass that can be exported.

    Args:
        height, width: size of the prepared images, in pixels.
        batch_images: the number of images in one pass.

    Raises:
        ConfigError: the model cannot read images of this size.
    """

    model: Any  # an nn.Module; Any, because timm's own methods are not in its type
    offset: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone, *, height: int, width: int, batch_images: int) -> None:
        super().__init__()
        model, name, grid_stride = backbone.model, backbone.name, backbone.grid_stride
        self.indices, self.average = list(backbone.indices), backbone.average
        self.height, self.width = height, width
        self.grid = (height // grid_stride, width // grid_stride)
        self.neighbourhood = backbone.neighbourhood
        self.batch_images = batch_images
        if 0 in self.grid:
            raise ConfigError(
                f"features.grid_stride {grid_stride} is larger than the input of {height} x {width} pixels. "
                "Set it to 8, or raise prepare.height and prepare.width."
            )
        self.register_buffer("offset", 255 * torch.tensor(backbone.mean).view(1, 3, 1, 1))
        self.register_buffer("scale", 1 / (255 * torch.tensor(backbone.std).view(1, 3, 1, 1)))
        self.model = model.requires_grad_(False)
        self.train(False)
        noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        try:
            if hasattr(model, "set_input_size"):  # its position embeddings are made for one size
                model.set_input_size((height, width))
            stages = self._stages(noise)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"Backbone {name!r} cannot read {height} x {width} pixels ({error}). Choose another prepare.height "
                "and prepare.width: transformers need multiples of their patch or window."
            ) from error
        self.dims = tuple(stage.shape[1] for stage in stages)  # D_l of each level, in the order of the channels
        self.shape = (sum(self.dims), *self.grid)
        self.fingerprint = _fingerprint(
            model.state_dict(),
            {
                "format": FORMAT,
                "backbone": name,
                "indices": self.indices,
                "input": [height, width],
                "grid": self.grid,
                "neighbourhood": self.neighbourhood,
                "batch_images": batch_images,
                "mean": list(backbone.mean),
                "std": list(backbone.std),
                **({"average": True} if self.average else {}),
            },
        )
        if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            return  # nothing to fold; a large transformer is not copied
        # Folding and channels last together are 1.4 to 2 times as fast on a CPU, measured on EfficientNet-Lite0.
        # Neighbours in the list of children usually follow each other in the computation, but need not: check it.
        self.model = _folded(model).to(memory_format=torch.channels_last)
        pairs = zip(stages, self._stages(noise), strict=True)
        if any((after - before).abs().max() > 1e-5 * before.abs().max() for before, after in pairs):
            self.model = model.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, so that batch norm and dropout never change the features."""
        return super().train(False)

    @torch.no_grad()  # not inference_mode: a trainable head has to save these tensors for backward
    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features (B, D, h, w) float32 of prepared images (B, 3, H, W) uint8, in one pass."""
        images = (pixels.float() - self.offset) * self.scale  # (B, 3, H, W)
        cells = [self._on_grid(stage) for stage in self._stages(images)]
        return torch.cat(cells, dim=1).contiguous()  # (B, D, h, w)

    @torch.no_grad()
    def extract(self, pixels: Tensor, *, fill: bool = True) -> Tensor:
        """Return the features (n, D, h, w) float32 of any number of prepared images (n, 3, H, W) uint8.

        Every pass has `batch_images` images, the last one padded with black images. The batch size decides which
        kernels compute and how they round, so with padding an image has bit-equal features in any batch.

        Args:
            fill: pad the last pass. Without padding it is faster, and equal except for that rounding.

        Raises:
            DataError: the pixels are not uint8, or not of the size that the extractor was built for.
        """
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, self.height, self.width):
            raise DataError(
                f"Prepared images must be uint8 of shape (n, 3, {self.height}, {self.width}), got {pixels.dtype} of "
                f"shape {tuple(pixels.shape)}. Prepare them with the preparation that the extractor was built for."
            )
        features = torch.empty(len(pixels), *self.shape, device=self.offset.device)  # (n, D, h, w)
        for start in range(0, len(pixels), self.batch_images):
            chunk = pixels[start : start + self.batch_images].to(self.offset.device)
            full = chunk
            if fill and len(chunk) < self.batch_images:
                full = chunk.new_zeros(self.batch_images, 3, self.height, self.width)
                full[: len(chunk)] = chunk
            features[start : start + len(chunk)] = self(full)[: len(chunk)]
        return features

    @torch.no_grad()
    def _stages(self, images: Tensor) -> list[Tensor]:
        """Return the stages in use, each (B, D_s, h_s, w_s). Nothing above the last one is computed."""
        images = images.contiguous(memory_format=torch.channels_last)
        stages: list[Tensor] = self.model.forward_intermediates(
            images, indices=self.indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return [mean_of_blocks(stages)] if self.average else stages

    def _on_grid(self, stage: Tensor) -> Tensor:
        side = self.neighbourhood
        # At the borders the average is over the cells inside the image: zero padding would show as a frame.
        mean = functional.avg_pool2d(stage, side, stride=1, padding=side // 2, count_include_pad=False)
        return functional.interpolate(mean, size=self.grid, mode="bilinear", align_corners=False)  # (B, D_s, h, w)


def _folded(model: nn.Module) -> nn.Module:
    """Return a copy in which each batch norm is merged into the convolution before it."""
    model = copy.deepcopy(model)
    for parent in model.modules():
        children = list(parent.named_children())
        for (before, convolution), (after, norm) in pairwise(children):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, before, fuse_conv_bn_eval(convolution, norm))
                # timm's own batch norm includes the activation after it.
                setattr(parent, after, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
    return model


def _fingerprint(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the settings and of every tensor's name, type, shape and bytes, sorted by name."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for key in sorted(state):
        tensor = state[key].cpu().contiguous()
        digest.update(f"\n{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
