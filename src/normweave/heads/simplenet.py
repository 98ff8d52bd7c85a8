"""SimpleNet: one discriminator of normal features for all subclasses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normweave.config import SimpleNetConfig
from normweave.heads.base import Head, TrainingStage
from normweave.heads.grid import replace_border
from normweave.types import FitData, PatchScores


class SimpleNet(Head):
    """Discriminate normal features from the same features with added noise.

    Liu et al. 2023 (arXiv 2303.15140), section 3: an adaptor q = W x + b, q- = q + N(0, noise^2), a
    discriminator D = linear, batch norm, LeakyReLU 0.2, linear, the truncated L1 loss with th+ = -th- =
    margin (see `NoiseStage.loss`), and the score -D(q). The paper does not replace the scores of the border cells.

    Args:
        shape: (D, h, w) of the features.
    """

    def __init__(self, config: SimpleNetConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.config = config
        self.grid = shape[1:]
        self.discriminator = Discriminator(width=shape[0], hidden=config.hidden)
        self.eval()

    def begin(self, data: FitData) -> None:
        """Draw the initial weights."""
        self.discriminator.start(torch.Generator().manual_seed(data.seed))

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """Return one stage, which trains the discriminator."""
        return (NoiseStage(self.discriminator, self.config),)

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        B, _, h, w = features.shape
        adapted = self.discriminator.adapt(features)  # (B*P, D)
        scores = replace_border(-self.discriminator(adapted).view(B, h, w), self.config.border, grid=self.grid)
        return PatchScores(scores=scores, image_scores=None, routing=None)


class Discriminator(nn.Module):
    """Adaptor and discriminator: one number for each patch, higher = more normal."""

    def __init__(self, *, width: int, hidden: int) -> None:
        super().__init__()
        self.adaptor = nn.Linear(width, width)
        self.hidden = nn.Linear(width, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.activation = nn.LeakyReLU(0.2)
        self.out = nn.Linear(hidden, 1, bias=False)

    def start(self, generator: torch.Generator) -> None:
        """Draw new weights by Glorot's rule, as the authors' code does."""
        for layer in (self.adaptor, self.hidden, self.out):
            nn.init.xavier_normal_(layer.weight, generator=generator)
        nn.init.zeros_(self.adaptor.bias)
        nn.init.zeros_(self.hidden.bias)
        self.norm.reset_parameters()

    def adapt(self, features: Tensor) -> Tensor:
        """Return the adapted patches of (B, D, h, w), (B*P, D)."""
        patches: Tensor = self.adaptor(features.permute(0, 2, 3, 1))  # (B, h, w, D)
        return patches.flatten(0, 2)

    def forward(self, adapted: Tensor) -> Tensor:
        """Return D(q) of (N, D) adapted patches, (N,)."""
        score: Tensor = self.out(self.activation(self.norm(self.hidden(adapted))))  # (N, 1)
        return score.squeeze(1)


class NoiseStage(TrainingStage):
    """Train a `Discriminator` on normal patches and on normal patches with added noise."""

    name = "simplenet"

    def __init__(self, discriminator: Discriminator, config: SimpleNetConfig) -> None:
        super().__init__(discriminator, config.training)
        self.discriminator = discriminator
        self.config = config

    def optimiser(self) -> torch.optim.Optimizer:
        """Return Adam as in the paper: half the learning rate for the adaptor, weight decay 1e-5."""
        adaptor = list(self.discriminator.adaptor.parameters())
        others = [
            parameter for name, parameter in self.discriminator.named_parameters() if not name.startswith("adaptor.")
        ]
        rate = self.learning_rate
        return torch.optim.Adam(
            [{"params": adaptor, "lr": rate / 2}, {"params": others, "lr": rate}], weight_decay=1e-5
        )

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Return the truncated L1 loss: mean max(0, margin - D(q)) + mean max(0, margin + D(q + noise)).

        Normal and noised patches pass the batch norm together, as in the authors' code.
        """
        margin = self.config.margin
        normal = self.discriminator.adapt(features)  # (N, D)
        noise = torch.randn(normal.shape, generator=generator).to(normal.device) * self.config.noise
        of_normal, of_noised = self.discriminator(torch.cat([normal, normal + noise])).chunk(2)  # (N,) each
        return {"loss": (margin - of_normal).relu().mean() + (margin + of_noised).relu().mean()}
