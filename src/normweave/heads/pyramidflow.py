"""How far the latent pyramid of an image lies from the mean one of the normal images (PyramidFlow)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.errors import ConfigError
from normweave.heads import state
from normweave.heads.base import Head, TrainingStage
from normweave.heads.grid import replace_border
from normweave.types import FitData, PatchScores

CLAMP = 2.0
"""A coupling scales by at most exp(2 * 0.636 * pi / 2), about 7.4, before the volume is normalised."""
BATCH_IMAGES = 16


class PyramidFlow(Head):
    """Volume-preserving flow over a Laplacian pyramid, contrasted with a latent template.

    Lei et al. 2023 (arXiv 2303.02595). The features are taken apart into a pyramid x_1 .. x_L (section 3.1); in each
    block the odd and then the even levels are coupled with their neighbours (3.2), with the volume held at 1 (3.3):

        z_d = W (exp(n(s_d)) x_d + t_d),   (s_d, t_d) = net(x_{d-1}, x_{d+1}),   n(s) = s - mean(s),   |det W| = 1

    Trained so that normal images become alike, by the spectrum of what differs within a batch (3.4), and scored by the
    difference from the template, the mean latent of the normal images:

        L = mean |FFT2(mean_c compose(|z^i - z^j|^2))|,     map = mean_c compose(|z - template|)

    The paper's input is the first layer of a ResNet18 at 1024 pixels, or the image; ours is the finest level of the
    features. It normalises the volume by running means over batches; we by each image's own, over the channels of a
    place or the places of a channel, so that the volume is 1 exactly. Padding repeats the edge instead of zeros.

    Args:
        shape: (D, h, w) of the features.
        dims: D_l of each level, finest first; the finest is looked at.
        levels: L of the pyramid.
        blocks: that all levels pass.
        kernel: side of the convolutions, odd.
        volume: what n averages over.
        epochs, batch_images, learning_rate, patience: of the stage.
        border: outermost cells that take the score of their inner neighbours (ours).

    Raises:
        ConfigError: the levels' widths do not add up.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        dims: Sequence[int],
        levels: int,
        blocks: int,
        kernel: int,
        volume: Literal["channel", "space"],
        epochs: int,
        batch_images: int,
        learning_rate: float,
        patience: int,
        border: int,
    ) -> None:
        super().__init__()
        if sum(dims) != shape[0]:
            raise ConfigError(f"The levels' widths {list(dims)} must add up to {shape[0]} channels.")
        self.subclass_names: tuple[str, ...] = ()
        self.channels = dims[0]
        self.grid = shape[1:]
        self.epochs = epochs
        self.batch_images = batch_images
        self.learning_rate = learning_rate
        self.patience = patience
        self.border = border
        self.flow = LatentPyramid(
            width=self.channels, levels=levels, blocks=blocks, kernel=kernel, volume=volume
        )
        h, w = self.grid
        for level in range(levels):
            self.register_buffer(f"template{level}", torch.zeros(self.channels, h, w))
            h, w = (h + 1) // 2, (w + 1) // 2
        self.eval()

    def begin(self, data: FitData) -> None:
        """Draw the initial weights."""
        self.flow.start(torch.Generator().manual_seed(data.seed))

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """One."""
        return (SimilarityStage(self),)

    @torch.no_grad()
    def finish(self, data: FitData) -> None:
        """The template is the mean over all fit normals."""
        sums = [self.get_buffer(f"template{level}").new_zeros(()) for level in range(self.flow.levels)]
        for start in range(0, len(data), BATCH_IMAGES):
            rows = range(start, min(start + BATCH_IMAGES, len(data)))
            latents = self.flow(data.features.read(rows)[:, : self.channels])
            sums = [total + latent.sum(dim=0) for total, latent in zip(sums, latents, strict=True)]
        for level, total in enumerate(sums):
            setattr(self, f"template{level}", total / len(data))

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        latents = self.flow(features[:, : self.channels])
        apart = [
            (latent - self.get_buffer(f"template{level}")).abs() for level, latent in enumerate(latents)
        ]  # (B, C, h_l, w_l)
        scores = compose(apart).mean(dim=1)  # (B, h, w)
        scores = replace_border(scores, self.border, grid=self.grid)
        return PatchScores(scores=scores, image_scores=None, routing=None)

    def state(self) -> dict[str, Tensor]:
        """Weights and templates."""
        return state.state(self)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take them over."""
        state.load_state(self, tensors)


class LatentPyramid(nn.Module):
    """Features to their Laplacian pyramid, and on through the blocks."""

    def __init__(
        self, *, width: int, levels: int, blocks: int, kernel: int, volume: Literal["channel", "space"]
    ) -> None:
        super().__init__()
        self.levels = levels
        self.steps = [
            level for _ in range(blocks) for first in (1, 0) for level in range(first, levels, 2)
        ]  # which level each coupling changes
        self.couplings = nn.ModuleList(
            NeighbourCoupling(
                width=width, neighbours=len(_neighbours(level, levels)), kernel=kernel, volume=volume
            )
            for level in self.steps
        )

    def start(self, generator: torch.Generator) -> None:
        """Draw new weights."""
        for coupling in self.couplings:
            assert isinstance(coupling, NeighbourCoupling)
            coupling.start(generator)

    def forward(self, features: Tensor) -> list[Tensor]:
        """(B, C, h, w) to L levels, each half as high and wide as the one before."""
        return self.couple(decompose(features, levels=self.levels))

    def couple(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """All couplings one after the other, on levels (B, C, h_l, w_l)."""
        pyramid = list(pyramid)
        for level, coupling in zip(self.steps, self.couplings, strict=True):
            size = pyramid[level].shape[2:]
            around = [
                F.interpolate(pyramid[other], size=size, mode="nearest")
                for other in _neighbours(level, self.levels)
            ]
            pyramid[level] = coupling(pyramid[level], around)
        return pyramid


def _neighbours(level: int, levels: int) -> list[int]:
    return [other for other in (level - 1, level + 1) if 0 <= other < levels]


class NeighbourCoupling(nn.Module):
    """Change a level by what its neighbours say, and mix its channels; the volume stays what it is."""

    lower: Tensor
    upper: Tensor
    permutation: Tensor  # (C, C)
    sign: Tensor  # (C,)

    def __init__(
        self, *, width: int, neighbours: int, kernel: int, volume: Literal["channel", "space"]
    ) -> None:
        super().__init__()
        self.over = 1 if volume == "channel" else (2, 3)
        self.first = nn.Conv2d(neighbours * width, 2 * width, kernel, padding=kernel // 2, bias=False)
        self.second = nn.Conv2d(2 * width, 2 * width, kernel, padding=kernel // 2, bias=False)
        self.lower = nn.Parameter(torch.zeros(width, width))
        self.upper = nn.Parameter(torch.zeros(width, width))
        self.stretch = nn.Parameter(torch.zeros(width))
        self.register_buffer("permutation", torch.eye(width))
        self.register_buffer("sign", torch.ones(width))

    def start(self, generator: torch.Generator) -> None:
        """Nothing is scaled or shifted yet; the channels are mixed by a random rotation."""
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
        """W = P L U with |det W| = 1, (C, C)."""
        stretch = (self.stretch - self.stretch.mean()).exp() * self.sign  # (C,)
        lower = self.lower.tril(-1) + torch.eye(len(self.sign), device=self.sign.device)
        return self.permutation @ lower @ (self.upper.triu(1) + stretch.diag())

    def forward(self, x: Tensor, around: Sequence[Tensor]) -> Tensor:
        """(B, C, h, w) and its neighbours at that size to the same shape."""
        if around:
            said = self.second(F.leaky_relu(self.first(torch.cat(list(around), dim=1))))  # (B, 2C, h, w)
            s, t = said.chunk(2, dim=1)
            s = CLAMP * 0.636 * (s / CLAMP).atan()
            x = x * (s - s.mean(dim=self.over, keepdim=True)).exp() + t
        return F.conv2d(x, self.mixing()[:, :, None, None])


def decompose(features: Tensor, *, levels: int) -> list[Tensor]:
    """Laplacian pyramid with maxima, as the authors build it: what a level has more than the next, blown up.

    (B, C, h, w) to L levels, sizes halved and rounded up; the last holds what is left.
    """
    pyramid = []
    for _ in range(levels - 1):
        coarser = F.max_pool2d(blur(features), 2, ceil_mode=True)
        pyramid.append(features - _up(coarser, features))
        features = coarser
    return [*pyramid, features]


def compose(pyramid: Sequence[Tensor]) -> Tensor:
    """The way back from `decompose`, (B, C, h, w)."""
    features = pyramid[-1]
    for finer in reversed(pyramid[:-1]):
        features = _up(features, finer) + finer
    return features


def _up(coarser: Tensor, like: Tensor) -> Tensor:
    return blur(F.interpolate(coarser, size=like.shape[2:], mode="nearest"))


def blur(grid: Tensor) -> Tensor:
    """Binomial filter (1 4 6 4 1) / 16 along both axes of (B, C, h, w)."""
    C = grid.shape[1]
    row = grid.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (row[:, None] * row).expand(C, 1, 5, 5)
    return F.conv2d(F.pad(grid, (2, 2, 2, 2), mode="replicate"), kernel, groups=C)


class SimilarityStage(TrainingStage):
    """Make the latents of normal images alike."""

    name: str = "pyramidflow"
    gradient_clip: float = 1.0
    final_rate: float = 0.1

    def __init__(self, head: PyramidFlow) -> None:
        self.head = head
        self.module: nn.Module = head.flow
        self.epochs = head.epochs
        self.batch_images = head.batch_images
        self.learning_rate = head.learning_rate
        self.patience = head.patience

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam with the authors' settings."""
        return torch.optim.Adam(
            self.module.parameters(), lr=self.learning_rate, betas=(0.5, 0.9), eps=1e-4, weight_decay=1e-5
        )

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Mean size of the spectrum of what differs between two images, over all pairs of the batch.

        An image that is alone is paired with its mirror image.
        """
        finest = features[:, : self.head.channels]
        if len(finest) == 1:
            finest = torch.cat([finest, finest.flip(3)])
        latents = self.head.flow(finest)
        one, other = torch.triu_indices(len(finest), len(finest), offset=1, device=finest.device)
        apart = [(latent[one] - latent[other]).square() for latent in latents]  # (pairs, C, h_l, w_l)
        return {"loss": torch.fft.fft2(compose(apart).mean(dim=1)).abs().mean()}
