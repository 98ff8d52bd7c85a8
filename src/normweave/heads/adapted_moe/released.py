"""Adapted-MoE as in the first author's released code; docs/equations.md lists its differences from the paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.config import AdaptedMoEReleasedConfig, DiscriminatorExpertConfig
from normweave.heads.adapted_moe.adaption import PaperAdaption, statistics
from normweave.heads.adapted_moe.experts.discriminator import DiscriminatorExperts
from normweave.heads.adapted_moe.router import select_experts
from normweave.heads.base import Head, TrainingStage, batches
from normweave.heads.novelty import SubclassNovelty, block_statistics
from normweave.types import FitData, PatchScores, Routing

DRAWN_PATCHES = 100
"""Patches drawn of each training image for the mean and std of an expert's patches."""


class AdaptedMoEReleased(Head):
    """Adapted-MoE with a shared projection, a router of patches and adaption at test time only.

    With z = (A x + a) / |A x + a| for each patch x of an image, and y its subclass:

        router: log p_k(z) = log softmax_j(w_j . z)[k]; an image is routed by the mean of log p_k over its patches
        experts: D_k(z), the discriminators of `DiscriminatorExperts`
        at test: z' = (z - mean(z)) std_k / std(z) + c_k, then z' / |z'|; the score of a patch is -D_k(z')

    `JointStage.loss` trains all of it in one stage. The image score is the maximum of the patch scores. The distance to
    the known subclasses is that of `SubclassNovelty`; the released code has none.

    Args:
        shape: (D, h, w) of the features.
    """

    def __init__(
        self, config: AdaptedMoEReleasedConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.config = config
        self.network = JointNetwork(config, shape=shape)
        self.adaption = PaperAdaption(width=shape[0])
        self.novelty = SubclassNovelty(statistics=2 * shape[0])

    @property
    def can_exclude(self) -> bool:  # type: ignore[override]
        """Whether there is more than one expert."""
        return len(self.subclass_names) > 1

    @torch.no_grad()
    def begin(self, data: FitData) -> None:
        """Fit the statistics of the subclasses and draw the initial weights; without labels there is one expert."""
        self.subclass_names = data.names or ("all",)
        samples = [block_statistics(features).numpy() for _, features in batches(data.features)]
        self.novelty.fit(np.concatenate(samples), data.subclasses.clip(min=0))
        self.network.start(experts=len(self.subclass_names), generator=torch.Generator().manual_seed(data.seed))

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """Return one stage, which trains the projection, the router and the experts."""
        return (JointStage(self.network, self.config),)

    @torch.no_grad()
    def finish(self, data: FitData) -> None:
        """Fit c_k and std_k to patches drawn of each image."""
        generator = torch.Generator().manual_seed(data.seed)
        samples = []
        for _, features in batches(data.features):
            drawn = draw(self.network(features), DRAWN_PATCHES, generator)
            samples.append(statistics(drawn).numpy())
        subclasses = data.subclasses.clip(min=0)
        self.adaption.fit(np.concatenate(samples), subclasses, subclasses)

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        return self._score(features, allowed=None)

    @torch.no_grad()
    def score_excluding(self, features: Tensor, subclasses: Tensor) -> PatchScores:
        """Score each image without the expert of its own subclass; with one expert as `forward`.

        Args:
            features: (B, D, h, w).
            subclasses: (B,) indices into `subclass_names`; -1: no expert is left out.
        """
        K = len(self.network.router)
        others = torch.arange(K, device=features.device) != subclasses[:, None]  # (B, K)
        return self._score(features, allowed=others if K > 1 else None)

    @torch.no_grad()
    def embed(self, features: Tensor) -> Tensor:
        """Return the mean of z over the patches, (B, D)."""
        patches: Tensor = self.network(features)
        return patches.mean(dim=(2, 3))

    def _score(self, features: Tensor, *, allowed: Tensor | None) -> PatchScores:
        """Score by the experts (B, K) that are allowed; None = all."""
        patches = self.network(features)  # (B, D, h, w)
        routed = self.network.log_probabilities(patches).mean(dim=(2, 3))  # (B, K)
        distances = self.novelty(block_statistics(features))  # (B, K)
        if allowed is not None:
            routed = routed.masked_fill(~allowed, -torch.inf)  # weight 0
            distances = distances.masked_fill(~allowed, torch.inf)
        choice = select_experts(routed, temperature=1.0, top_k=self.config.top_k)
        adapted = self.adaption(patches, statistics(patches), choice.experts)  # (B, T, D, h, w)
        by_expert = self.network.experts(adapted, choice.experts)[:, :, 0]  # (B, T, h, w)
        scores = (choice.weights[..., None, None] * by_expert).sum(dim=1)  # Eq. 4; the weights sum to 1
        return PatchScores(
            scores=scores,
            image_scores=scores.amax(dim=(1, 2)),
            routing=Routing(
                weights=torch.zeros_like(routed).scatter(1, choice.experts, choice.weights),
                subclass=choice.experts[:, 0],
                distance=distances.amin(dim=1),
                adapted=self.adaption.changes(routed),
            ),
        )


class JointNetwork(nn.Module):
    """Projection, router and experts; the output is z of every patch, (B, D, h, w) -> (B, D, h, w)."""

    def __init__(self, config: AdaptedMoEReleasedConfig, *, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.projection = nn.Conv2d(shape[0], shape[0], kernel_size=1)  # A, a
        self.router = nn.Parameter(torch.zeros(1, shape[0]))  # (K, D) w_k
        expert = DiscriminatorExpertConfig(hidden=config.hidden, margin=config.margin)
        self.experts = DiscriminatorExperts(expert, shape=shape)

    def start(self, *, experts: int, generator: torch.Generator) -> None:
        """Draw the initial weights: by Glorot's rule for the projection, as in SimpleNet, else as torch draws them."""
        nn.init.xavier_normal_(self.projection.weight, generator=generator)
        nn.init.zeros_(self.projection.bias)  # type: ignore[arg-type]
        width = self.router.shape[1]
        bound = width**-0.5
        self.router = nn.Parameter(torch.empty(experts, width).uniform_(-bound, bound, generator=generator))
        self.experts.start(experts=experts, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """Return z of every patch."""
        return F.normalize(self.projection(features), dim=1)

    def log_probabilities(self, patches: Tensor) -> Tensor:
        """Return log p_k of every patch, (B, D, h, w) -> (B, K, h, w)."""
        return F.conv2d(patches, self.router[..., None, None]).log_softmax(dim=1)


class JointStage(TrainingStage):
    """Train projection, router and experts together.

    Args:
        network: is trained.
    """

    name = "released"
    final_rate = 0.0

    def __init__(self, network: JointNetwork, config: AdaptedMoEReleasedConfig) -> None:
        super().__init__(network, config.training)
        self.network = network
        self.config = config
        self.accumulate = config.accumulate

    def optimiser(self) -> torch.optim.Optimizer:
        """Return AdamW. The projection has half the learning rate of the experts, as in SimpleNet, the router 5 times.

        With 2e-4 for the experts the router has the 1e-3 of `NetworkRoutingConfig`.
        """
        network, rate = self.network, self.learning_rate
        return torch.optim.AdamW(
            [
                {"params": list(network.projection.parameters()), "lr": rate / 2},
                {"params": [network.router], "lr": rate * 5},
                {"params": list(network.experts.parameters()), "lr": rate},
            ]
        )

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Return the loss, averaged over patches drawn of each image:

            max(0, margin - D_y(z)) + max(0, margin + D_y(z_e)) - log p_y(z),
            z_e = (A x + a + e) / |A x + a + e|,    e ~ N(0, noise^2 I)

        The centre loss is left out: the released code computes it, but does not add it.
        """
        own = subclasses.clamp_min(0)
        projected = self.network.projection(draw(features, self.config.patches, generator))  # (B, D, n, 1)
        noise = torch.randn(projected.shape, generator=generator).to(projected.device)
        normal, noised = F.normalize(projected, dim=1), F.normalize(projected + self.config.noise * noise, dim=1)
        hinge = normal.new_zeros(())
        for expert in own.bincount().nonzero().squeeze(1):
            both = torch.cat([normal[own == expert], noised[own == expert]])  # (2b, D, n, 1)
            patches = both.flatten(2).transpose(1, 2).flatten(0, 1)  # (2bn, D)
            outputs = self.network.experts.discriminate(patches[None], expert[None], training=training)
            of_normal, of_noised = outputs.chunk(2, dim=1)  # (1, bn) each
            margin = self.config.margin
            hinge = hinge + (margin - of_normal).relu().sum() + (margin + of_noised).relu().sum()
        hinge = hinge / normal[:, 0].numel()
        routing = F.nll_loss(self.network.log_probabilities(normal), own[:, None, None].expand(-1, *normal.shape[2:]))
        return {"loss": hinge + routing, "hinge": hinge, "routing": routing}


def draw(features: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Draw patches of each image without replacement, (B, D, h, w) -> (B, D, number, 1); all if there are no more."""
    B, _, h, w = features.shape
    if number >= h * w:
        return features
    order = torch.rand(B, 1, h * w, generator=generator).argsort(dim=2).to(features.device)
    return features.flatten(2).take_along_dim(order[..., :number], dim=2)[..., None]
