"""Discriminators: the paper's experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.config import DiscriminatorExpertConfig
from normweave.heads.adapted_moe.experts.base import Adapt, Assign, Experts, products
from normweave.heads.base import TrainingStage


class DiscriminatorExperts(Experts):
    """One discriminator of SimpleNet for each subclass (arXiv 2303.15140, section 3.4).

    D(x) = v . leaky_relu(batch_norm(W x + b), 0.2) is trained to be above the margin on normal patches x and below
    minus the margin on x + N(0, noise^2 I). The score of a patch is -D(x), without noise. Each expert has its own batch
    norm.
    """

    running_mean: Tensor  # (K, H)
    running_variance: Tensor  # (K, H)

    momentum = 0.1

    def __init__(self, config: DiscriminatorExpertConfig, *, shape: tuple[int, int, int], unit: float = 1.0) -> None:
        super().__init__()
        self.config = config
        self.noise = config.noise * unit
        hidden, width = config.hidden, shape[0]
        self.weight = nn.Parameter(torch.zeros(1, hidden, width))  # W
        self.bias = nn.Parameter(torch.zeros(1, hidden))  # b
        self.gain = nn.Parameter(torch.ones(1, hidden))
        self.shift = nn.Parameter(torch.zeros(1, hidden))
        self.readout = nn.Parameter(torch.zeros(1, hidden))  # v
        self.register_buffer("running_mean", torch.zeros(1, hidden))
        self.register_buffer("running_variance", torch.ones(1, hidden))

    def start(self, *, experts: int, generator: torch.Generator) -> None:
        """Draw the initial weights as torch draws those of a linear layer."""
        hidden, width = self.weight.shape[1:]

        def uniform(*shape: int, inputs: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator))

        self.weight = uniform(experts, hidden, width, inputs=width)
        self.bias = uniform(experts, hidden, inputs=width)
        self.readout = uniform(experts, hidden, inputs=hidden)
        self.gain = nn.Parameter(torch.ones(experts, hidden))
        self.shift = nn.Parameter(torch.zeros(experts, hidden))
        self.running_mean = torch.zeros(experts, hidden)
        self.running_variance = torch.ones(experts, hidden)

    def stages(self, *, assign: Assign, adapt: Adapt) -> Sequence[TrainingStage]:
        """Return the stage that trains all discriminators."""
        return (DiscriminatorStage(self, assign=assign, adapt=adapt),)

    def discriminate(self, patches: Tensor, experts: Tensor, *, training: bool) -> Tensor:
        """Return D (E, n) of (E, n, D) patches by (E,) different experts.

        With `training` the batch norm uses the statistics of these patches and updates its running statistics.
        """
        hidden = torch.baddbmm(self.bias[experts, None], patches, self.weight[experts].transpose(1, 2))  # (E, n, H)
        if training:
            mean, variance = hidden.mean(dim=1), hidden.var(dim=1, correction=0)  # (E, H) each
            with torch.no_grad():
                self.running_mean[experts] += self.momentum * (mean - self.running_mean[experts])
                self.running_variance[experts] += self.momentum * (variance - self.running_variance[experts])
        else:
            mean, variance = self.running_mean[experts], self.running_variance[experts]
        scale = self.gain[experts] / (variance + 1e-5).sqrt()  # (E, H)
        normalised = (hidden - mean[:, None]) * scale[:, None] + self.shift[experts, None]
        return torch.bmm(F.leaky_relu(normalised, 0.2), self.readout[experts, :, None]).squeeze(2)

    def forward(self, features: Tensor, experts: Tensor) -> Tensor:
        """Return -D of every patch, (B, T, 1, h, w)."""
        B, T = experts.shape
        # The batch norm with its running statistics is folded into the linear layer.
        scale = self.gain / (self.running_variance + 1e-5).sqrt()  # (K, H)
        weight = self.weight * scale[..., None]  # (K, H, D)
        bias = (self.bias - self.running_mean) * scale + self.shift  # (K, H)
        hidden = F.leaky_relu(products(features, weight[experts], bias[experts]), 0.2)  # (B, T, H, P)
        score = -(self.readout[experts][:, :, None] @ hidden)  # (B, T, 1, P)
        return score.view(B, T, 1, *features.shape[3:])


class DiscriminatorStage(TrainingStage):
    """Train all discriminators together, each on the patches of its own images.

    Loss: mean max(0, margin - D(x)) + mean max(0, margin + D(x + e)), e ~ N(0, noise^2 I), averaged over the experts
    that have images in the batch.

    Args:
        experts: are trained.
    """

    name = "experts"

    def __init__(self, experts: DiscriminatorExperts, *, assign: Assign, adapt: Adapt) -> None:
        super().__init__(experts, experts.config.training)
        self.experts = experts
        self.assign = assign
        self.adapt = adapt

    def optimiser(self) -> torch.optim.Optimizer:
        """Return Adam with SimpleNet's weight decay."""
        return torch.optim.Adam(self.experts.parameters(), lr=self.learning_rate, weight_decay=1e-5)

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Return the hinge loss of a batch."""
        own = self.assign(features, subclasses)  # (B,)
        adapted = self.adapt(features, own).flatten(2).transpose(1, 2)  # (B, P, D)
        present = own.bincount().nonzero().squeeze(1)  # (E,)
        drawn = torch.stack(
            [self._draw(adapted[own == expert].flatten(0, 1), generator) for expert in present]
        )  # (E, n, D)
        noise = torch.randn(drawn.shape, generator=generator, device=generator.device).to(drawn.device)
        both = torch.cat([drawn, drawn + self.experts.noise * noise], dim=1)  # (E, 2n, D)
        # Normal and noised patches go through the batch norm together, as in SimpleNet's code.
        normal, noised = self.experts.discriminate(both, present, training=training).chunk(2, dim=1)
        normal_loss = (self.experts.config.margin - normal).relu().mean()
        noised_loss = (self.experts.config.margin + noised).relu().mean()
        return {"loss": normal_loss + noised_loss, "normal": normal_loss, "noised": noised_loss}

    def _draw(self, patches: Tensor, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(patches), (self.experts.config.patches,), generator=generator, device=generator.device)
        return patches[rows.to(patches.device)]
