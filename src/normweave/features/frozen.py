"""Any timm model, held still; several of its stages on one grid."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from normweave.errors import ConfigError, DataError

FORMAT = 1
"""Part of the fingerprint. Raise it when the same weights and settings give other features than before."""


class FrozenFeatures(nn.Module):
    """Read patch features out of a network, and keep that network as it is.

    As in PatchCore (Roth et al. 2022, arXiv 2106.08265, section 3.1) and SimpleNet (Liu et al. 2023, arXiv
    2303.15140, section 3.1): each cell of a stage is averaged with its neighbours inside the image, the stages are
    brought to one grid by bilinear interpolation and concatenated, shallowest first.

    `extract` is for any number of images and its results do not depend on that number; `forward` is one pass,
    plain enough to be exported.

    Args:
        model: offers `forward_intermediates`.
        name: what the model is called, for messages and the fingerprint.
        indices: intermediates to use, as timm counts them, shallowest first.
        mean, std: of the pixels that the weights were made for, R G B, white = 1.
        height, width: of the prepared images, in pixels.
        grid_stride: one cell of the grid stands for this many pixels.
        neighbourhood: side of the local average in cells of the stage, odd; 1 = none.
        batch_images: images in one pass.

    Raises:
        ConfigError: the model cannot read images of this size.
    """

    model: Any  # an nn.Module; Any, because timm's own methods are not in its type
    offset: Tensor
    scale: Tensor

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        indices: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        height: int,
        width: int,
        grid_stride: int,
        neighbourhood: int,
        batch_images: int,
    ) -> None:
        super().__init__()
        self.indices = list(indices)
        self.height, self.width = height, width
        self.grid = (height // grid_stride, width // grid_stride)
        self.neighbourhood = neighbourhood
        self.batch_images = batch_images
        if 0 in self.grid:
            raise ConfigError(
                f"features.grid_stride {grid_stride} is larger than the input of {height} x {width} pixels. "
                "Set it to 8, or raise prepare.height and prepare.width."
            )
        self.register_buffer("offset", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("scale", 1 / (255 * torch.tensor(std).view(1, 3, 1, 1)))
        self.model = model.requires_grad_(False)
        self.train(False)
        noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        try:
            if hasattr(model, "set_input_size"):  # its position embeddings are made for one size
                model.set_input_size((height, width))
            seen = self._stages(noise)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"Backbone {name!r} cannot read {height} x {width} pixels ({error}). Choose another prepare.height "
                "and prepare.width: transformers need multiples of their patch or window."
            ) from error
        self.dims = tuple(stage.shape[1] for stage in seen)  # D_l of each level, in the order of the channels
        self.shape = (sum(self.dims), *self.grid)
        self.fingerprint = _fingerprint(
            model.state_dict(),
            {
                "format": FORMAT,
                "backbone": name,
                "indices": self.indices,
                "input": [height, width],
                "grid": self.grid,
                "neighbourhood": neighbourhood,
                "batch_images": batch_images,
                "mean": list(mean),
                "std": list(std),
            },
        )
        if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            return  # nothing to fold: a large transformer is neither copied nor tried out
        # Folded and channels last: together 1.4 to 2 times as fast on a CPU, measured on EfficientNet-Lite0. Neighbours
        # in the list of children mostly follow each other in the computation, but need not: look whether it holds.
        self.model = _folded(model).to(memory_format=torch.channels_last)
        pairs = zip(seen, self._stages(noise), strict=True)
        if any((now - before).abs().max() > 1e-5 * before.abs().max() for before, now in pairs):
            self.model = model.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: `detector.train()` must not wake batch norm or dropout in here."""
        return super().train(False)

    @torch.no_grad()  # not inference_mode: a trainable head has to save these tensors for backward
    def forward(self, pixels: Tensor) -> Tensor:
        """Prepared images (B, 3, H, W) uint8 to features (B, D, h, w) float32, in one pass."""
        images = (pixels.float() - self.offset) * self.scale  # (B, 3, H, W)
        cells = [self._on_grid(stage) for stage in self._stages(images)]
        return torch.cat(cells, dim=1).contiguous()  # (B, D, h, w)

    @torch.no_grad()
    def extract(self, pixels: Tensor, *, fill: bool = True) -> Tensor:
        """Features of any number of prepared images, (n, 3, H, W) uint8 to (n, D, h, w) float32.

        Every pass holds `batch_images` images, the last one filled up with black ones: kernels are chosen by the size
        of the batch and round differently, and what is learnt from shall be the same to the bit in any company.

        Args:
            fill: without it the last pass is as small as its images are few: faster, and equal but for that rounding.

        Raises:
            DataError: the pixels are not uint8 or not of the size that the extractor was built for.
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
        """The intermediates in use, each (B, D_s, h_s, w_s); nothing above the last is computed."""
        images = images.contiguous(memory_format=torch.channels_last)
        stages: list[Tensor] = self.model.forward_intermediates(
            images, indices=self.indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return stages

    def _on_grid(self, stage: Tensor) -> Tensor:
        side = self.neighbourhood
        # Borders average over the cells that exist: zeros would make a frame.
        mean = functional.avg_pool2d(stage, side, stride=1, padding=side // 2, count_include_pad=False)
        return functional.interpolate(
            mean, size=self.grid, mode="bilinear", align_corners=False
        )  # (B, D_s, h, w)


def _folded(model: nn.Module) -> nn.Module:
    """A copy with each batch norm merged into the convolution that stands before it."""
    model = copy.deepcopy(model)
    for parent in model.modules():
        children = list(parent.named_children())
        for (before, convolution), (after, norm) in pairwise(children):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, before, fuse_conv_bn_eval(convolution, norm))
                # timm's own batch norm carries the activation behind it.
                setattr(parent, after, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
    return model


def _fingerprint(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """SHA-256 over the settings and every tensor's name, type, shape and bytes, in the order of the names."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for key in sorted(state):
        tensor = state[key].cpu().contiguous()
        digest.update(f"\n{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
