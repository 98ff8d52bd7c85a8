"""One discriminator for all kinds of normal (SimpleNet): the papers' baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normweave.heads import state
from normweave.heads.base import Head, TrainingStage
from normweave.heads.grid import replace_border
from normweave.types import FitData, PatchScores


class SimpleNet(Head):
    """Tell normal features from the same features with noise on them.

    Liu et al. 2023 (arXiv 2303.15140), section 3: an adaptor q = W x + b, q- = q + N(0, noise^2), a
    discriminator D = linear, batch norm, LeakyReLU 0.2, linear, the truncated L1 loss with th+ = -th- =
    margin (see `NoiseStage.loss`), and the score -D(q).

    Args:
        shape: (D, h, w) of the features.
        hidden: the discriminator's width.
        noise: deviation of the noise on the adapted features.
        margin: how far from 0 the discriminator must be to be done with a patch.
        epochs, batch_images, learning_rate, patience: of the stage; the adaptor learns at half the rate.
        border: outermost cells that take the score of their inner neighbours (ours).
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        hidden: int,
        noise: float,
        margin: float,
        epochs: int,
        batch_images: int,
        learning_rate: float,
        patience: int,
        border: int,
    ) -> None:
        super().__init__()
        self.subclass_names: tuple[str, ...] = ()
        self.discriminator = Discriminator(width=shape[0], hidden=hidden)
        self.noise = noise
        self.margin = margin
        self.epochs = epochs
        self.batch_images = batch_images
        self.learning_rate = learning_rate
        self.patience = patience
        self.border = border
        self.grid = shape[1:]
        self.eval()

    def train(self, mode: bool = True) -> SimpleNet:
        """Stay in eval mode; only the stage wakes the batch norm, in the discriminator itself."""
        return super().train(False)

    def begin(self, data: FitData) -> None:
        """Draw the initial weights."""
        self.discriminator.start(torch.Generator().manual_seed(data.seed))

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """One."""
        return (
            NoiseStage(
                self.discriminator,
                noise=self.noise,
                margin=self.margin,
                epochs=self.epochs,
                batch_images=self.batch_images,
                learning_rate=self.learning_rate,
                patience=self.patience,
            ),
        )

    def finish(self, data: FitData) -> None:
        """Nothing is left to do."""

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        B, _, h, w = features.shape
        adapted = self.discriminator.adapt(features)  # (B*P, D)
        scores = replace_border(-self.discriminator(adapted).view(B, h, w), self.border, grid=self.grid)
        return PatchScores(scores=scores, image_scores=None, routing=None)

    def state(self) -> dict[str, Tensor]:
        """Weights and batch-norm statistics."""
        return state.state(self)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take them over."""
        state.load_state(self, tensors)


class Discriminator(nn.Module):
    """Adaptor and discriminator: patches of features to one number each, higher = more normal."""

    def __init__(self, *, width: int, hidden: int) -> None:
        super().__init__()
        self.adaptor = nn.Linear(width, width)
        self.hidden = nn.Linear(width, hidden)
        self.standardise = nn.BatchNorm1d(hidden)
        self.bend = nn.LeakyReLU(0.2)
        self.out = nn.Linear(hidden, 1, bias=False)

    def start(self, generator: torch.Generator) -> None:
        """Draw new weights, by Glorot's rule as the authors' code does."""
        for layer in (self.adaptor, self.hidden, self.out):
            nn.init.xavier_normal_(layer.weight, generator=generator)
        nn.init.zeros_(self.adaptor.bias)
        nn.init.zeros_(self.hidden.bias)
        self.standardise.reset_parameters()

    def adapt(self, features: Tensor) -> Tensor:
        """(B, D, h, w) to (B*P, D)."""
        patches: Tensor = self.adaptor(features.permute(0, 2, 3, 1))  # (B, h, w, D)
        return patches.flatten(0, 2)

    def forward(self, adapted: Tensor) -> Tensor:
        """(N, D) to (N,)."""
        score: Tensor = self.out(self.bend(self.standardise(self.hidden(adapted))))  # (N, 1)
        return score.squeeze(1)


class NoiseStage(TrainingStage):
    """Train a `Discriminator` with noise for anomalies."""

    name: str = "simplenet"
    gradient_clip: float = 0.0
    final_rate: float = 1.0

    def __init__(
        self,
        discriminator: Discriminator,
        *,
        noise: float,
        margin: float,
        epochs: int,
        batch_images: int,
        learning_rate: float,
        patience: int,
    ) -> None:
        self.discriminator = discriminator
        self.module: nn.Module = discriminator
        self.noise = noise
        self.margin = margin
        self.epochs = epochs
        self.batch_images = batch_images
        self.learning_rate = learning_rate
        self.patience = patience

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam as in the paper: half the rate for the adaptor, weight decay 1e-5."""
        adaptor = list(self.discriminator.adaptor.parameters())
        rest = [
            parameter
            for name, parameter in self.discriminator.named_parameters()
            if not name.startswith("adaptor.")
        ]
        return torch.optim.Adam(
            [{"params": adaptor, "lr": self.learning_rate / 2}, {"params": rest, "lr": self.learning_rate}],
            weight_decay=1e-5,
        )

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Truncated L1 loss: mean max(0, margin - D(q)) + mean max(0, margin + D(q + noise)).

        Normal and noised patches pass the batch norm together, as in the authors' code.
        """
        normal = self.discriminator.adapt(features)  # (N, D)
        noise = torch.randn(normal.shape, generator=generator).to(normal.device) * self.noise
        score = self.discriminator(torch.cat([normal, normal + noise]))  # (2N,)
        of_normal, of_noised = score.chunk(2)
        return {"loss": (self.margin - of_normal).relu().mean() + (self.margin + of_noised).relu().mean()}
