"""One expert a kind of normal: how unlike its normal patches a patch is.

Every kind of expert answers for all experts of a batch in one product. The interface: `fit(normals, generator)` learns
in closed form, and `forward(features (B, S, D, h, w), experts (B, T)) -> (B, T, h, w)` scores with the experts asked,
where S = 1 (all see the same features) or S = T (adapted for each).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.heads.dfm import principal_components
from normweave.heads.memory_bank import coreset, draw_patches, project
from normweave.types import FeatureSource

BATCH_IMAGES = 16


@dataclass(frozen=True)
class Normals:
    """Normal images with the expert that each belongs to."""

    source: FeatureSource
    """Adapted, each image for its own expert."""
    rows: NDArray[np.int64]
    """(n,) images of the source to learn from."""
    experts: NDArray[np.int64]
    """(n,) 0..K-1, each at least once."""
    groups: NDArray[np.int64]
    """(n,) physical part, lot or session."""

    @property
    def number(self) -> int:
        """K."""
        return int(self.experts.max()) + 1

    def batches(self, rows: NDArray[np.int64] | None = None) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Places in `rows` and features (B, D, h, w), a few images at a time."""
        places = np.arange(len(self.rows)) if rows is None else rows
        for start in range(0, len(places), BATCH_IMAGES):
            few = places[start : start + BATCH_IMAGES]
            yield few, self.source.read(self.rows[few])


def products(features: Tensor, weights: Tensor, offset: Tensor) -> Tensor:
    """offset + weights . patch for every expert asked and every patch, in one batched product.

    Args:
        features: (B, S, D, h, w), S = 1 or T.
        weights: (B, T, N, D).
        offset: (B, T, N).

    Returns:
        (B, T, N, P).
    """
    B, S, D, h, w = features.shape
    T, N = weights.shape[1:3]
    # With S = 1 the experts' rows are stacked, so the features need not be copied for each expert.
    product = torch.baddbmm(
        offset.reshape(B * S, -1, 1), weights.reshape(B * S, -1, D), features.reshape(B * S, D, h * w)
    )  # (B*S, T/S*N, P)
    return product.view(B, T, N, h * w)


class Discriminators(nn.Module):
    """The paper's experts: SimpleNet's discriminator, one a subclass (arXiv 2303.15140, section 3.4).

    D(x) = v . leaky_relu(batch_norm(W x + b), 0.2), trained to be above the margin on normal patches x and below minus
    the margin on x + N(0, noise^2 I); the score of a patch is -D(x), without noise. The batch norm is each expert's own.

    Args:
        width: D.
        hidden: H.
    """

    running_mean: Tensor  # (K, H)
    running_variance: Tensor  # (K, H)

    momentum = 0.1

    def __init__(self, *, width: int, hidden: int, experts: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, hidden, width))  # W
        self.bias = nn.Parameter(torch.zeros(experts, hidden))  # b
        self.gain = nn.Parameter(torch.ones(experts, hidden))
        self.shift = nn.Parameter(torch.zeros(experts, hidden))
        self.readout = nn.Parameter(torch.zeros(experts, hidden))  # v
        self.register_buffer("running_mean", torch.zeros(experts, hidden))
        self.register_buffer("running_variance", torch.ones(experts, hidden))

    def start(self, *, experts: int, generator: torch.Generator) -> None:
        """Draw the weights of so many experts, as torch draws those of a linear layer."""
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

    def fit(self, normals: Normals, *, generator: torch.Generator) -> None:
        """Nothing in closed form: `DiscriminatorLesson` trains them."""

    def discriminate(self, patches: Tensor, experts: Tensor, *, training: bool) -> Tensor:
        """D of (E, n, D) patches by the (E,) experts, each once: (E, n).

        With `training` the batch norm takes the statistics of these patches and remembers them.
        """
        hidden = torch.baddbmm(
            self.bias[experts, None], patches, self.weight[experts].transpose(1, 2)
        )  # (E, n, H)
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
        """-D of every patch by the experts asked, (B, T, h, w)."""
        B, T = experts.shape
        # The batch norm with its remembered statistics is part of the linear layer.
        scale = self.gain / (self.running_variance + 1e-5).sqrt()  # (K, H)
        weight = self.weight * scale[..., None]  # (K, H, D)
        bias = (self.bias - self.running_mean) * scale + self.shift  # (K, H)
        hidden = F.leaky_relu(products(features, weight[experts], bias[experts]), 0.2)  # (B, T, H, P)
        score = -(self.readout[experts][:, :, None] @ hidden)  # (B, T, 1, P)
        return score.view(B, T, *features.shape[3:])


class DiscriminatorLesson:
    """Train all discriminators together, each on the patches of its own images.

    Loss: mean max(0, margin - D(x)) + mean max(0, margin + D(x + e)), e ~ N(0, noise^2 I), averaged over the experts
    that have images in the batch.

    Args:
        experts: are changed.
        expert_of: (features (B, D, h, w), given subclasses (B,)) -> (B,) the expert of each image.
        adapt: (features, experts (B,)) -> (B, D, h, w) as the experts see them.
        noise: deviation of e.
        patches: drawn of each expert's images a step.
    """

    name = "experts"

    def __init__(
        self,
        experts: Discriminators,
        *,
        expert_of: Callable[[Tensor, Tensor], Tensor],
        adapt: Callable[[Tensor, Tensor], Tensor],
        noise: float,
        margin: float,
        patches: int,
        epochs: int,
        batch_images: int,
        learning_rate: float,
        patience: int,
    ) -> None:
        self.module = experts
        self.experts = experts
        self.expert_of = expert_of
        self.adapt = adapt
        self.noise = noise
        self.margin = margin
        self.patches = patches
        self.epochs = epochs
        self.batch_images = batch_images
        self.learning_rate = learning_rate
        self.patience = patience

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam with SimpleNet's weight decay."""
        return torch.optim.Adam(self.experts.parameters(), lr=self.learning_rate, weight_decay=1e-5)

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """The hinge loss on a batch."""
        own = self.expert_of(features, subclasses)  # (B,)
        adapted = self.adapt(features, own).flatten(2).transpose(1, 2)  # (B, P, D)
        present = own.unique()  # (E,)
        drawn = torch.stack(
            [self._draw(adapted[own == expert].flatten(0, 1), generator) for expert in present]
        )  # (E, n, D)
        noise = torch.randn(drawn.shape, generator=generator, device=generator.device).to(drawn.device)
        both = torch.cat([drawn, drawn + self.noise * noise], dim=1)  # (E, 2n, D)
        # Normal and noised patches go through the batch norm together, as in SimpleNet's code.
        normal, noised = self.experts.discriminate(both, present, training=training).chunk(2, dim=1)
        normal_loss = (self.margin - normal).relu().mean()
        noised_loss = (self.margin + noised).relu().mean()
        return {"loss": normal_loss + noised_loss, "normal": normal_loss, "noised": noised_loss}

    def _draw(self, patches: Tensor, generator: torch.Generator) -> Tensor:
        places = torch.randint(len(patches), (self.patches,), generator=generator, device=generator.device)
        return patches[places.to(patches.device)]


class Memories(nn.Module):
    """Distance to the nearest of the expert's stored normal patches, in units of what is usual there.

    d(x) = |x - m|, m the nearest stored patch (arXiv 2106.08265). With `calibrated` the score is d / mu(m) (ours): mu(m)
    is the mean distance of those normal patches of *other* groups whose nearest is m, drawn towards the mean over all
    by 3 pseudo-counts, then averaged over m and its 10 nearest stored neighbours. A patch's own group is left out
    when its nearest is sought, as no test image has its own group in the memory.

    Args:
        width: D.
        max_patches: stored for each expert, at most.
        max_pool: patches of each expert from which the coreset is chosen.
        projection: numbers a patch in the random projection in which it is chosen; 0 = all.
    """

    bank: Tensor  # (K, M, D); rows beyond an expert's own number are zero
    half_squares: Tensor  # (K, M) |m|^2 / 2; infinite where there is no patch
    usual: Tensor  # (K, M) mu(m)

    pseudo_counts = 3
    neighbours = 10
    chunk = 256  # stored patches compared at once; bounds memory to B*T*chunk*P numbers

    def __init__(
        self,
        *,
        width: int,
        max_patches: int,
        max_pool: int,
        projection: int,
        calibrated: bool,
        experts: int = 1,
    ) -> None:
        super().__init__()
        self.max_patches = max_patches
        self.max_pool = max_pool
        self.projection = projection
        self.calibrated = calibrated
        self.register_buffer("bank", torch.zeros(experts, 1, width))
        self.register_buffer("half_squares", torch.zeros(experts, 1))
        self.register_buffer("usual", torch.ones(experts, 1))

    def fit(self, normals: Normals, *, generator: torch.Generator) -> None:
        """Fill the memories, and measure what is usual around every stored patch."""
        stored = [self._store(normals, expert, generator) for expert in range(normals.number)]
        most = max(len(patches) for patches, _ in stored)
        shape = (normals.number, most)
        self.bank = torch.zeros(*shape, self.bank.shape[2])
        self.half_squares = torch.full(shape, torch.inf)
        self.usual = torch.ones(shape)
        for expert, (patches, groups) in enumerate(stored):
            self.bank[expert, : len(patches)] = patches
            self.half_squares[expert, : len(patches)] = 0.5 * patches.square().sum(dim=1)
            if self.calibrated:
                self.usual[expert, : len(patches)] = self._measure(normals, expert, patches, groups)

    def _store(
        self, normals: Normals, expert: int, generator: torch.Generator
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """The expert's coreset (M, D) and the group of each patch (M,)."""
        own = np.flatnonzero(normals.experts == expert)
        own = own[torch.randperm(len(own), generator=generator)[: self.max_pool].sort().values.numpy()]
        each = max(1, self.max_pool // len(own))
        pool, groups = [], []
        for place in own:
            drawn = draw_patches(
                normals.source, normals.rows[place : place + 1], at_most=each, generator=generator
            )
            pool.append(drawn)
            groups.append(np.full(len(drawn), normals.groups[place]))
        patches = torch.cat(pool)  # (N, D)
        keep = min(self.max_patches, len(patches))
        chosen = coreset(project(patches, self.projection, generator=generator), keep, generator=generator)
        return patches[chosen], np.concatenate(groups)[chosen.numpy()]

    def _measure(
        self, normals: Normals, expert: int, patches: Tensor, groups: NDArray[np.int64]
    ) -> Tensor:
        """mu of each stored patch (M,)."""
        total = torch.zeros(len(patches), dtype=torch.float64)
        count = torch.zeros(len(patches), dtype=torch.float64)
        for places, features in normals.batches(np.flatnonzero(normals.experts == expert)):
            for place, image in zip(places, features, strict=True):
                others = torch.from_numpy(groups != normals.groups[place])
                if not others.any():
                    continue
                kept = torch.where(others, 0.5 * patches.square().sum(dim=1), torch.inf)
                distance, index = nearest_of(image[None, None], patches[None, None], kept[None, None])
                total.index_add_(0, index.flatten(), distance.flatten().double())
                count.index_add_(0, index.flatten(), torch.ones(index.numel(), dtype=torch.float64))
        if not count.any():  # one group only: nothing is known of other parts
            return torch.ones(len(patches))
        overall = total.sum() / count.sum()
        usual = (total + self.pseudo_counts * overall) / (count + self.pseudo_counts)  # (M,)
        near = torch.cat(
            [
                torch.cdist(some, patches).topk(min(self.neighbours + 1, len(patches)), largest=False).indices
                for some in patches.split(1024)
            ]
        )  # (M, 11): itself and its neighbours
        return usual[near].mean(dim=1).clamp_min(1e-6).float()

    def forward(self, features: Tensor, experts: Tensor) -> Tensor:
        """Distance of every patch, (B, T, h, w)."""
        distance, index = None, None
        for start in range(0, self.bank.shape[1], self.chunk):
            part = slice(start, start + self.chunk)
            ...
        return distance
