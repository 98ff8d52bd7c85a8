"""Mean-shifted contrastive adaptation: distance of an image's mean feature to its nearest normal images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.config import MeanShiftConfig
from normweave.errors import DataError
from normweave.heads.base import Head, TrainingStage, batches
from normweave.types import FitData, PatchScores


class MeanShift(Head):
    """Mean-shifted contrastive adaptation of image features. It is an image-level head.

    Reiss and Hoshen 2021 (arXiv 2106.03844). With phi(x) of length one and c the mean of phi over the training images
    before adaptation, normalised to length one:

        theta(x) = (phi(x) - c) / |phi(x) - c|                                              Eq. 4
        L = -log exp(theta' theta'' / tau) / sum over all other views of exp(theta' . / tau)  Eq. 5
        L_angular = -phi(x) c                                                               Eq. 2
        score = mean over the k nearest training images of 1 - phi(x) phi(y)                Eq. 6

    The paper adapts the last stages of a ResNet on two augmented views of an image. Our backbone is frozen and its
    features are cached: phi is their mean over the image through a small residual adapter, and a view is the mean
    over a random rectangle of the grid. Features are divided by their standard deviations, but not centred: around 0
    there is no mean to shift by. The map has one cell, which holds the image's score.

    Args:
        shape: (D, h, w) of the features.
    """

    offset: Tensor  # (D,) mean of the raw features, in standard deviations
    centre: Tensor  # (D,) c
    bank: Tensor  # (N, D), rows of length one
    image_level = True

    def __init__(self, config: MeanShiftConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.config = config
        self.adapter = Adapter(width=shape[0], hidden=config.hidden)
        self.register_buffer("offset", torch.zeros(shape[0]))
        self.register_buffer("centre", torch.zeros(shape[0]))
        self.register_buffer("bank", torch.zeros(0, shape[0]))
        self.eval()

    @torch.no_grad()
    def begin(self, data: FitData) -> None:
        """Draw the initial weights, which leave the features unchanged, and compute the centre."""
        if len(data) == 0:
            raise DataError("Mean-Shifted has no normal image to learn from. Give it at least one.")
        self.adapter.start(torch.Generator().manual_seed(data.seed))
        if data.mean is not None and data.std is not None:
            self.offset = data.mean / data.std
        total = torch.stack([phi.sum(dim=0) for phi in self._adapted(data)]).sum(dim=0)
        self.centre = F.normalize(total, dim=0)

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """Return one stage, which trains the adapter."""
        return (MeanShiftedStage(self),)

    @torch.no_grad()
    def finish(self, data: FitData) -> None:
        """Store the adapted features of the normal images."""
        generator = torch.Generator().manual_seed(data.seed)
        rows = torch.randperm(len(data), generator=generator)[: self.config.max_images].sort().values
        self.bank = torch.cat(self._adapted(data, rows.numpy()))

    def _adapted(self, data: FitData, rows: NDArray[np.int64] | None = None) -> list[Tensor]:
        """Return the adapted image features phi of the chosen rows (None = all images), a tensor (n, D) per batch."""
        return [self.adapter(features.mean(dim=(2, 3)) + self.offset) for _, features in batches(data.features, rows)]

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        similarity = self.adapter(features.mean(dim=(2, 3)) + self.offset) @ self.bank.T  # (B, N)
        nearest = similarity.topk(min(self.config.neighbours, len(self.bank)), dim=1).values  # (B, k)
        return PatchScores(scores=1 - nearest.mean(dim=1)[:, None, None], image_scores=None, routing=None)


class Adapter(nn.Module):
    """phi = n(g + W_2 relu(W_1 g + b_1)), with n(x) = x / |x|; initially n(g)."""

    def __init__(self, *, width: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, width, bias=False)

    def start(self, generator: torch.Generator) -> None:
        """Draw new weights."""
        nn.init.xavier_normal_(self.first.weight, generator=generator)
        nn.init.zeros_(self.first.bias)
        nn.init.zeros_(self.second.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Return phi, unit vectors (B, D), from mean features (B, D)."""
        return F.normalize(features + self.second(self.first(features).relu()), dim=1)


def contrast(one: Tensor, other: Tensor, *, temperature: float) -> Tensor:
    """Return the NT-Xent loss over two views of each image, (B, D) each.

    Chen et al. 2020, arXiv 2002.05709, Eq. 1, with rows normalised to length one.
    """
    views = F.normalize(torch.cat([one, other]), dim=1)  # (2B, D)
    similarity = views @ views.T / temperature  # (2B, 2B)
    B = len(one)
    similarity = similarity.masked_fill(torch.eye(2 * B, dtype=torch.bool, device=one.device), -torch.inf)
    partner = torch.arange(2 * B, device=one.device).roll(B)
    return F.cross_entropy(similarity, partner)


def view(features: Tensor, *, smallest: float, generator: torch.Generator) -> Tensor:
    """Return means of (B, D, h, w) over a random rectangle of each grid, (B, D).

    As in a random resized crop, the area is uniform in [smallest, 1] of the grid, and the ratio of the sides is that of
    the grid times a log-uniform factor in [3/4, 4/3]. Rounding to cells can make the area slightly smaller.
    """
    B, _, h, w = features.shape
    area = smallest + (1 - smallest) * torch.rand(B, generator=generator)
    aspect = torch.exp((2 * torch.rand(B, generator=generator) - 1) * 0.5 * torch.tensor(4 / 3).log())
    inside = torch.ones(B, h, w)
    sides = ((h, area.sqrt() * aspect, (h, 1)), (w, area.sqrt() / aspect, (1, w)))
    for length, share, shape in sides:
        cells = (length * share).round().clamp(1, length)  # (B,)
        start = ((length - cells + 1) * torch.rand(B, generator=generator)).floor()  # (B,)
        index = torch.arange(length)
        inside *= ((index >= start[:, None]) & (index < (start + cells)[:, None])).view(B, *shape)
    inside = inside.to(features.device)
    return (features * inside[:, None]).sum(dim=(2, 3)) / inside.sum(dim=(1, 2))[:, None]


class MeanShiftedStage(TrainingStage):
    """Train the adapter with the contrastive loss and, if configured, the angular loss."""

    name = "mean-shift"
    worker_images = None

    def __init__(self, head: MeanShift) -> None:
        super().__init__(head.adapter, head.config.training)
        self.head = head

    def optimiser(self) -> torch.optim.Optimizer:
        """Return SGD with the authors' weight decay."""
        return torch.optim.SGD(self.module.parameters(), lr=self.learning_rate, weight_decay=5e-5)

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Return the contrastive loss of the mean-shifted views, plus the angular loss if configured."""
        head, config = self.head, self.head.config
        offset = head.offset.to(features.device)
        views = [
            head.adapter(view(features, smallest=config.smallest_view, generator=generator) + offset) for _ in range(2)
        ]
        centre = head.centre.to(features.device)
        shifted = [phi - centre for phi in views]
        losses = {"contrast": contrast(shifted[0], shifted[1], temperature=config.temperature)}
        loss = losses["contrast"]
        if config.angular:
            losses["angular"] = -torch.stack([phi @ centre for phi in views]).mean()
            loss = loss + losses["angular"]
        return losses | {"loss": loss}
