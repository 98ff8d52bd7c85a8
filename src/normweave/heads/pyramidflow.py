"""PyramidFlow: distance of an image's latent pyramid from the mean latent pyramid of normal images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.config import PyramidFlowConfig
from normweave.errors import ConfigError
from normweave.heads.base import Head, TrainingStage, batches
from normweave.heads.grid import replace_border
from normweave.types import FitData, PatchScores

CLAMP = 2.0
"""A coupling scales by at most exp(2 * 0.636 * pi / 2), about 7.4, before the volume is normalised."""


class PyramidFlow(Head):
    """Volume-preserving flow over a Laplacian pyramid, contrasted with a latent template.

    Lei et al. 2023 (arXiv 2303.02595). The features are decomposed into a pyramid x_1 .. x_L (section 3.1). In each
    block first the odd and then the even levels are coupled with their neighbours (3.2), with the volume held at 1
    (3.3):

        z_d = W (exp(n(s_d)) x_d + t_d),   (s_d, t_d) = net(x_{d-1}, x_{d+1}),   n(s) = s - mean(s),   |det W| = 1

    Trained to make the latents of normal images similar, by the spectrum of their differences within a batch (3.4). The
    score is the difference from the template, which is the mean latent of the normal images:

        L = mean |FFT2(mean_c compose(|z^i - z^j|^2))|,     map = mean_c compose(|z - template|)

    The paper's input is the first layer of a ResNet18 at 1024 pixels, or the image. Our input is the finest level of
    the features. The paper normalises the volume by running means over batches. We use each image's own mean, over the
    channels of a position or the positions of a channel, so that the volume is exactly 1. Padding repeats the edge
    instead of zeros. The paper does not replace the scores of the border cells.

    Args:
        shape: (D, h, w) of the features.
        dims: D_l of each level, finest first; only the finest is used. Empty = one level.

    Raises:
        ConfigError: the levels' widths do not add up.
    """

    def __init__(self, config: PyramidFlowConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()) -> None:
        super().__init__()
        dims = list(dims or shape[:1])
        if sum(dims) != shape[0]:
            raise ConfigError(f"The levels' widths {dims} must add up to {shape[0]} channels.")
        self.config = config
        self.channels = dims[0]
        self.grid = shape[1:]
        self.flow = LatentPyramid(config, width=self.channels)
        h, w = self.grid
        for level in range(config.levels):
            self.register_buffer(f"template{level}", torch.zeros(self.channels, h, w))
            h, w = (h + 1) // 2, (w + 1) // 2
        self.eval()

    def begin(self, data: FitData) -> None:
        """Draw the initial weights."""
        self.flow.start(torch.Generator().manual_seed(data.seed))

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """Return one stage, which trains the flow."""
        return (SimilarityStage(self),)

    @torch.no_grad()
    def finish(self, data: FitData) -> None:
        """Compute the template, the mean latent of all fit images."""
        sums = [self.get_buffer(f"template{level}").new_zeros(()) for level in range(self.flow.levels)]
        for _, features in batches(data.features):
            latents = self.flow(features[:, : self.channels])
            sums = [total + latent.sum(dim=0) for total, latent in zip(sums, latents, strict=True)]
        for level, total in enumerate(sums):
            setattr(self, f"template{level}", total / len(data))

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        latents = self.flow(features[:, : self.channels])
        differences = [
            (latent - self.get_buffer(f"template{level}")).abs() for level, latent in enumerate(latents)
        ]  # (B, C, h_l, w_l)
        scores = replace_border(compose(differences).mean(dim=1), self.config.border, grid=self.grid)  # (B, h, w)
        return PatchScores(scores=scores, image_scores=None, routing=None)


class LatentPyramid(nn.Module):
    """Laplacian pyramid of the features, transformed by the coupling blocks."""

    def __init__(self, config: PyramidFlowConfig, *, width: int) -> None:
        super().__init__()
        self.levels = config.levels
        self.steps = [
            level for _ in range(config.blocks) for first in (1, 0) for level in range(first, config.levels, 2)
        ]  # the level that each coupling transforms
        self.couplings = nn.ModuleList(
            NeighbourCoupling(config, width=width, neighbours=len(_neighbours(level, config.levels)))
            for level in self.steps
        )

    def start(self, generator: torch.Generator) -> None:
        """Draw new weights."""
        for coupling in self.couplings:
            assert isinstance(coupling, NeighbourCoupling)
            coupling.start(generator)

    def forward(self, features: Tensor) -> list[Tensor]:
        """Return L latent levels of (B, C, h, w), each half as high and wide as the previous one."""
        return self.couple(decompose(features, levels=self.levels))

    def couple(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Apply all couplings in order to levels (B, C, h_l, w_l)."""
        pyramid = list(pyramid)
        for level, coupling in zip(self.steps, self.couplings, strict=True):
            size = pyramid[level].shape[2:]
            neighbours = [
                F.interpolate(pyramid[other], size=size, mode="nearest") for other in _neighbours(level, self.levels)
            ]
            pyramid[level] = coupling(pyramid[level], neighbours)
        return pyramid


def _neighbours(level: int, levels: int) -> list[int]:
    return [other for other in (level - 1, level + 1) if 0 <= other < levels]


class NeighbourCoupling(nn.Module):
    """Affine coupling of a level conditioned on its neighbours, then an invertible mix of channels; volume 1."""

    permutation: Tensor  # (C, C)
    sign: Tensor  # (C,)

    def __init__(self, config: PyramidFlowConfig, *, width: int, neighbours: int) -> None:
        super().__init__()
        kernel = config.kernel
        self.over = 1 if config.volume == "channel" else (2, 3)
        self.first = nn.Conv2d(neighbours * width, 2 * width, kernel, padding=kernel // 2, bias=False)
        self.second = nn.Conv2d(2 * width, 2 * width, kernel, padding=kernel // 2, bias=False)
        self.lower = nn.Parameter(torch.zeros(width, width))
        self.upper = nn.Parameter(torch.zeros(width, width))
        self.stretch = nn.Parameter(torch.zeros(width))
        self.register_buffer("permutation", torch.eye(width))
        self.register_buffer("sign", torch.ones(width))

    def start(self, generator: torch.Generator) -> None:
        """Draw new weights: no scale, no shift, and a random rotation of the channels."""
        nn.init.kaiming_uniform_(self.first.weight, a=5**0.5, generator=generator)
        nn.init.zeros_(self.second.weight)
        width = len(self.sign)
        rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        permutation, lower, upper = torch.linalg.lu(rotation)
        with torch.no_grad():
            self.lower.copy_(lower)
            self.upper.copy_(upper)
            self.stretch.copy_(upper.diagonal().abs().log())
            self.sign.copy_(upper.diagonal().sign())
            self.permutation.copy_(permutation)

    def mixing(self) -> Tensor:
        """Return W = P L U with |det W| = 1, (C, C)."""
        stretch = (self.stretch - self.stretch.mean()).exp() * self.sign  # (C,)
        lower = self.lower.tril(-1) + torch.eye(len(self.sign), device=self.sign.device)
        return self.permutation @ lower @ (self.upper.triu(1) + stretch.diag())

    def forward(self, x: Tensor, neighbours: Sequence[Tensor]) -> Tensor:
        """Transform (B, C, h, w), given its neighbours resized to (h, w)."""
        if neighbours:
            parameters = self.second(F.leaky_relu(self.first(torch.cat(list(neighbours), dim=1))))  # (B, 2C, h, w)
            s, t = parameters.chunk(2, dim=1)
            s = CLAMP * 0.636 * (s / CLAMP).atan()
            x = x * (s - s.mean(dim=self.over, keepdim=True)).exp() + t
        return F.conv2d(x, self.mixing()[:, :, None, None])


def decompose(features: Tensor, *, levels: int) -> list[Tensor]:
    """Return the Laplacian pyramid of (B, C, h, w) with max pooling, as the authors build it.

    Each level is the difference from the next, upsampled; the last is the coarsest image. Sizes are halved, rounded up.
    """
    pyramid = []
    for _ in range(levels - 1):
        coarser = F.max_pool2d(blur(features), 2, ceil_mode=True)
        pyramid.append(features - _up(coarser, features))
        features = coarser
    return [*pyramid, features]


def compose(pyramid: Sequence[Tensor]) -> Tensor:
    """Invert `decompose`: return (B, C, h, w)."""
    features = pyramid[-1]
    for finer in reversed(pyramid[:-1]):
        features = _up(features, finer) + finer
    return features


def _up(coarser: Tensor, like: Tensor) -> Tensor:
    return blur(F.interpolate(coarser, size=like.shape[2:], mode="nearest"))


def blur(grid: Tensor) -> Tensor:
    """Apply the binomial filter (1 4 6 4 1) / 16 along both axes of (B, C, h, w)."""
    C = grid.shape[1]
    row = grid.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (row[:, None] * row).expand(C, 1, 5, 5)
    return F.conv2d(F.pad(grid, (2, 2, 2, 2), mode="replicate"), kernel, groups=C)


class SimilarityStage(TrainingStage):
    """Train the flow to make the latents of normal images similar."""

    name = "pyramidflow"
    gradient_clip = 1.0
    final_rate = 0.1
    worker_images = 2

    def __init__(self, head: PyramidFlow) -> None:
        super().__init__(head.flow, head.config.training)
        self.head = head

    def optimiser(self) -> torch.optim.Optimizer:
        """Return Adam with the authors' settings."""
        return torch.optim.Adam(
            self.module.parameters(), lr=self.learning_rate, betas=(0.5, 0.9), eps=1e-4, weight_decay=1e-5
        )

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Return the mean magnitude of the spectrum of the difference of two images, over all pairs of the batch.

        A single image is paired with its mirror image.
        """
        finest = features[:, : self.head.channels]
        if len(finest) == 1:
            finest = torch.cat([finest, finest.flip(3)])
        latents = self.head.flow(finest)
        one, other = torch.triu_indices(len(finest), len(finest), offset=1, device=finest.device)
        differences = [(latent[one] - latent[other]).square() for latent in latents]  # (pairs, C, h_l, w_l)
        return {"loss": torch.fft.fft2(compose(differences).mean(dim=1)).abs().mean()}
