"""One expert a kind of normal: how unlike its normal patches a patch is.

Every kind of expert answers for all experts of a batch in one product. The interface: `fit(normals, generator)` learns
in closed form, and `forward(features (B, S, D, h, w), experts (B, T)) -> (B, T, V, h, w)` scores with the experts
asked, where S = 1 (all see the same features) or S = T (adapted for each). V = 1 is a map; where V = 2 the second one
is for the score of the whole image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.config import DiscriminatorExpertConfig
from normweave.heads.adapted_moe.discovery import BATCH_IMAGES
from normweave.heads.base import TrainingStage
from normweave.heads.dfm import principal_components
from normweave.heads.memory_bank import coreset, draw_patches, project
from normweave.types import FeatureSource

CHUNK = 256  # stored patches compared at once; bounds memory to B * T * CHUNK * P numbers


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
        offset.reshape(B * S, T // S * N, 1),
        weights.reshape(B * S, T // S * N, D),
        features.reshape(B * S, D, h * w),
    )  # (B*S, T/S*N, P)
    return product.view(B, T, N, h * w)


class Discriminators(nn.Module):
    """The paper's experts: SimpleNet's discriminator, one a subclass (arXiv 2303.15140, section 3.4).

    D(x) = v . leaky_relu(batch_norm(W x + b), 0.2), trained to be above the margin on normal patches x and below
    minus the margin on x + N(0, noise^2 I); the score of a patch is -D(x), without noise. Each expert has a batch norm
    of its own.

    Args:
        width: D.
        hidden: H.
        noise: deviation of the noise.
        margin: how far from 0 an expert must be to be done with a patch.
        patches: drawn of each expert's images a training step.
    """

    running_mean: Tensor  # (K, H)
    running_variance: Tensor  # (K, H)

    standardised = False
    momentum = 0.1

    def __init__(self, config: DiscriminatorExpertConfig, *, width: int, unit: float) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.noise = config.noise * unit
        self.margin = config.margin
        self.patches = config.patches
        self.weight = nn.Parameter(torch.zeros(1, hidden, width))  # W
        self.bias = nn.Parameter(torch.zeros(1, hidden))  # b
        self.gain = nn.Parameter(torch.ones(1, hidden))
        self.shift = nn.Parameter(torch.zeros(1, hidden))
        self.readout = nn.Parameter(torch.zeros(1, hidden))  # v
        self.register_buffer("running_mean", torch.zeros(1, hidden))
        self.register_buffer("running_variance", torch.ones(1, hidden))

    def start(self, *, experts: int, generator: torch.Generator) -> None:
        """Draw the weights of so many experts, as torch draws those of a linear layer."""
        hidden, width = self.weight.shape[1:]

        def uniform(*shape: int, inputs: int) -> nn.Parameter:
            return nn.Parameter(
                torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            )

        self.weight = uniform(experts, hidden, width, inputs=width)
        self.bias = uniform(experts, hidden, inputs=width)
        self.readout = uniform(experts, hidden, inputs=hidden)
        self.gain = nn.Parameter(torch.ones(experts, hidden))
        self.shift = nn.Parameter(torch.zeros(experts, hidden))
        self.running_mean = torch.zeros(experts, hidden)
        self.running_variance = torch.ones(experts, hidden)

    def fit(self, normals: Normals, *, generator: torch.Generator) -> None:
        """Nothing in closed form: `DiscriminatorStage` trains them."""

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
        """-D of every patch by the experts asked, (B, T, 1, h, w)."""
        B, T = experts.shape
        # The batch norm with its remembered statistics is part of the linear layer.
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
        experts: are changed.
        expert_of: (features (B, D, h, w), given subclasses (B,)) -> (B,) the expert of each image.
        adapt: (features, experts (B,)) -> (B, D, h, w) as the experts see them.
    """

    name = "experts"
    gradient_clip = 0.0
    final_rate = 1.0

    def __init__(
        self,
        experts: Discriminators,
        *,
        expert_of: Callable[[Tensor, Tensor], Tensor],
        adapt: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.module: nn.Module = experts
        self.experts = experts
        self.expert_of = expert_of
        self.adapt = adapt
        training = experts.config.training
        self.epochs, self.batch_images, self.patience = (
            training.epochs,
            training.batch_images,
            training.patience,
        )

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam with SimpleNet's weight decay."""
        return torch.optim.Adam(
            self.experts.parameters(), lr=self.experts.config.training.learning_rate, weight_decay=1e-5
        )

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """The hinge loss on a batch."""
        own = self.expert_of(features, subclasses)  # (B,)
        adapted = self.adapt(features, own).flatten(2).transpose(1, 2)  # (B, P, D)
        present = own.bincount().nonzero().squeeze(1)  # (E,)
        drawn = torch.stack(
            [self._draw(adapted[own == expert].flatten(0, 1), generator) for expert in present]
        )  # (E, n, D)
        noise = torch.randn(drawn.shape, generator=generator, device=generator.device).to(drawn.device)
        both = torch.cat([drawn, drawn + self.experts.noise * noise], dim=1)  # (E, 2n, D)
        # Normal and noised patches go through the batch norm together, as in SimpleNet's code.
        normal, noised = self.experts.discriminate(both, present, training=training).chunk(2, dim=1)
        normal_loss = (self.experts.margin - normal).relu().mean()
        noised_loss = (self.experts.margin + noised).relu().mean()
        return {"loss": normal_loss + noised_loss, "normal": normal_loss, "noised": noised_loss}

    def _draw(self, patches: Tensor, generator: torch.Generator) -> Tensor:
        places = torch.randint(
            len(patches), (self.experts.patches,), generator=generator, device=generator.device
        )
        return patches[places.to(patches.device)]


class Memories(nn.Module):
    """Distance to the nearest of the expert's stored normal patches, in units of what is usual there.

    d(x) = |x - m|, m the nearest stored patch (arXiv 2106.08265). With `calibrated` the score is d / mu(m) (ours):
    mu(m) is the mean distance of those normal patches of *other* groups whose nearest is m, drawn towards the mean
    over all by 3 pseudo-counts, then averaged over the 10 stored patches nearest to m, itself among them. A patch's
    own group is left out when its nearest is sought, as no test image has its own group in the memory.

    Args:
        width: D.
        max_patches: stored for each expert, at most.
        max_pool: patches of each expert from which the coreset is chosen.
        projection: numbers a patch in the random projection in which it is chosen; 0 = all.
    """

    bank: Tensor  # (K, M, D); rows beyond an expert's own number are zero
    offset: Tensor  # (K, M) -|m|^2 / 2; minus infinity where there is no patch
    usual: Tensor  # (K, M) mu(m)

    standardised = False
    pseudo_counts = 3
    neighbours = 10

    def __init__(
        self,
        *,
        width: int,
        max_patches: int,
        max_pool: int,
        projection: int,
        calibrated: bool,
    ) -> None:
        super().__init__()
        self.max_patches = max_patches
        self.max_pool = max_pool
        self.projection = projection
        self.calibrated = calibrated
        self.register_buffer("bank", torch.zeros(1, 1, width))
        self.register_buffer("offset", torch.zeros(1, 1))
        self.register_buffer("usual", torch.ones(1, 1))

    def fit(self, normals: Normals, *, generator: torch.Generator) -> None:
        """Fill the memories, and measure what is usual around every stored patch."""
        stored = [self._store(normals, expert, generator) for expert in range(normals.number)]
        most = max(len(patches) for patches, _ in stored)
        shape = (normals.number, most)
        self.bank = torch.zeros(*shape, self.bank.shape[2])
        self.offset = torch.full(shape, -torch.inf)
        self.usual = torch.ones(shape)
        for expert, (patches, groups) in enumerate(stored):
            self.bank[expert, : len(patches)] = patches
            self.offset[expert, : len(patches)] = -0.5 * patches.square().sum(dim=1)
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

    def _measure(self, normals: Normals, expert: int, patches: Tensor, groups: NDArray[np.int64]) -> Tensor:
        """mu of each stored patch (M,)."""
        total = torch.zeros(len(patches), dtype=torch.float64)
        count = torch.zeros(len(patches), dtype=torch.float64)
        only = torch.zeros(1, 1, dtype=torch.int64)
        for places, features in normals.batches(np.flatnonzero(normals.experts == expert)):
            for place, image in zip(places, features, strict=True):
                others = torch.from_numpy(groups != normals.groups[place])
                if not others.any():
                    continue
                offset = torch.where(others, -0.5 * patches.square().sum(dim=1), -torch.inf)
                distance, index = nearest(image[None, None], patches[None], offset[None], only)
                total.index_add_(0, index.flatten(), distance.flatten().double())
                count.index_add_(0, index.flatten(), torch.ones(index.numel(), dtype=torch.float64))
        if not count.any():  # one group only: nothing is known of other parts
            return torch.ones(len(patches))
        overall = total.sum() / count.sum()
        usual = (total + self.pseudo_counts * overall) / (count + self.pseudo_counts)  # (M,)
        nearby = min(self.neighbours, len(patches))
        near = torch.cat(
            [
                torch.cdist(patches[start : start + CHUNK], patches).topk(nearby, largest=False).indices
                for start in range(0, len(patches), CHUNK)
            ]
        )  # (M, 10), itself among them
        return usual[near].mean(dim=1).clamp_min(1e-6).float()

    def forward(self, features: Tensor, experts: Tensor) -> Tensor:
        """Distance of every patch, (B, T, 1, h, w)."""
        distance, index = nearest(features, self.bank, self.offset, experts)
        if self.calibrated:
            distance = distance / self.usual[experts[..., None], index]
        return distance.view(*experts.shape, 1, *features.shape[3:])


def nearest(features: Tensor, bank: Tensor, offset: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """The stored patch nearest to each patch, in the memory of each expert asked.

    Found by the largest x . m - |m|^2 / 2, then measured from the difference: the expansion of the square loses small
    distances to rounding.

    Args:
        features: (B, S, D, h, w), S = 1 or T.
        bank: (K, M, D).
        offset: (K, M) -|m|^2 / 2, minus infinity where a memory holds no patch.
        experts: (B, T).

    Returns:
        (B, T, P) distance and (B, T, P) int64 row of the memory.
    """
    shape = (*experts.shape, features.shape[3] * features.shape[4])
    best = features.new_full(shape, -torch.inf)
    index = torch.zeros(shape, dtype=torch.int64, device=features.device)
    for start in range(0, bank.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        value, row = products(features, bank[:, part][experts], offset[:, part][experts]).max(dim=2)
        index = torch.where(value > best, row + start, index)
        best = torch.maximum(best, value)
    patches = features.flatten(3).transpose(2, 3)  # (B, S, P, D)
    return (patches - bank[experts[..., None], index]).square().sum(dim=3).sqrt(), index


class Gaussians(nn.Module):
    """Mahalanobis distance to the patches of the expert's subclass.

    d(x) = |W (x - m)| with W' W the inverse of the patches' covariance: that of the subclass mixed with that within all
    subclasses, then shrunk towards its mean variance (the one-Gaussian form of PaDiM, arXiv 2011.08785, for all places
    together).

    Args:
        channels: D', the first so many of a patch are looked at; the finest stages come first.
        pooled: weight of the covariance of all subclasses' patches, in [0, 1].
        shrinkage: share of the mean variance, in (0, 1].
    """

    whitener: Tensor  # (K, D', D') W
    offset: Tensor  # (K, D') -W m

    standardised = False

    def __init__(self, *, channels: int, pooled: float, shrinkage: float) -> None:
        super().__init__()
        self.pooled = pooled
        self.shrinkage = shrinkage
        self.register_buffer("whitener", torch.eye(channels)[None])
        self.register_buffer("offset", torch.zeros(1, channels))

    def fit(self, normals: Normals, *, generator: torch.Generator) -> None:
        """Means and covariances, summed in float64 over one pass."""
        channels = self.offset.shape[1]
        count = torch.zeros(normals.number, dtype=torch.float64)
        total = torch.zeros(normals.number, channels, dtype=torch.float64)
        square = torch.zeros(normals.number, channels, channels, dtype=torch.float64)
        for places, features in normals.batches():
            for place, image in zip(places, features[:, :channels].flatten(2).double(), strict=True):
                expert = normals.experts[place]
                count[expert] += image.shape[1]
                total[expert] += image.sum(dim=1)
                square[expert] += image @ image.T
        mean = total / count[:, None]  # (K, D')
        own = _covariance(square, total, count)  # (K, D', D')
        together = _covariance(square.sum(dim=0)[None], total.sum(dim=0)[None], count.sum()[None])
        mixed = (1 - self.pooled) * own + self.pooled * together
        variance = mixed.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-6)  # (K,)
        identity = torch.eye(channels, dtype=torch.float64)
        shrunk = (1 - self.shrinkage) * mixed + self.shrinkage * variance[:, None, None] * identity
        factor = torch.linalg.cholesky(shrunk)
        whitener = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        self.whitener = whitener.float()
        self.offset = -(whitener @ mean[..., None]).squeeze(2).float()

    def forward(self, features: Tensor, experts: Tensor) -> Tensor:
        """Distance of every patch, (B, T, 1, h, w)."""
        seen = features[:, :, : self.offset.shape[1]]  # (B, S, D', h, w)
        whitened = products(seen, self.whitener[experts], self.offset[experts])  # (B, T, D', P)
        return (whitened * whitened).sum(dim=2).sqrt().view(*experts.shape, 1, *features.shape[3:])


def _covariance(square: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """From sums of x x' (K, D, D) and x (K, D) over (K,) many x."""
    mean = total / count[:, None]
    return square / count[:, None, None] - mean[:, :, None] * mean[:, None]


class Subspaces(nn.Module):
    """What the principal components of the whole images of a subclass cannot rebuild.

    r = (x - m) - C C' (x - m) with x the whole feature map, averaged to a few cells and flattened (DFM, arXiv
    1909.11786, one for each expert); the score of a cell is the root of r^2 summed over channels, bilinear in
    between.

    Args:
        shape: (D, h, w).
        cells: the grid is averaged to at most cells x cells, F = D * cells * cells.
        variance: share that the components keep, in (0, 1).
        max_images: of each expert, drawn at random; bounds memory.
    """

    mean: Tensor  # (K, F)
    components: Tensor  # (K, F, r); columns beyond an expert's own number are zero

    standardised = False

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        cells: int,
        variance: float,
        max_images: int,
    ) -> None:
        super().__init__()
        D, h, w = shape
        self.grid = (h, w)
        self.cells = (min(cells, h), min(cells, w))
        self.variance = variance
        self.max_images = max_images
        numbers = D * self.cells[0] * self.cells[1]
        self.register_buffer("mean", torch.zeros(1, numbers))
        self.register_buffer("components", torch.zeros(1, numbers, 1))

    def fit(self, normals: Normals, *, generator: torch.Generator) -> None:
        """Mean and components of each expert's images."""
        found = []
        for expert in range(normals.number):
            own = np.flatnonzero(normals.experts == expert)
            drawn = torch.randperm(len(own), generator=generator)[: self.max_images].sort().values.numpy()
            flat = torch.cat(
                [self._flat(few[:, None])[:, 0] for _, few in normals.batches(own[drawn])]
            )  # (n, F)
            found.append(principal_components(flat, variance=self.variance))
        most = max(1, *(components.shape[1] for _, components in found))
        self.mean = torch.stack([mean for mean, _ in found])
        self.components = torch.stack([F.pad(each, (0, most - each.shape[1])) for _, each in found])

    def _flat(self, features: Tensor) -> Tensor:
        pooled = to_cells(features.flatten(0, 1), self.cells, grid=self.grid)  # (B*S, D, cells, cells)
        return pooled.view(*features.shape[:2], self.mean.shape[1])  # (B, S, F)

    def forward(self, features: Tensor, experts: Tensor) -> Tensor:
        """Residual of every cell, (B, T, 1, h, w)."""
        B, S, D, h, w = features.shape
        flat = self._flat(features)  # (B, S, F)
        if S > 1:  # each image as each expert sees it; to the experts not asked it is zero
            asked = experts[..., None].expand_as(flat)
            flat = flat.new_zeros(B, len(self.mean), flat.shape[2]).scatter(1, asked, flat)  # (B, K, F)
        # All experts, asked or not: to gather their components would cost more than the product.
        centred = flat.transpose(0, 1) - self.mean[:, None]  # (K, B, F)
        coordinates = torch.bmm(centred, self.components)  # (K, B, r)
        residual = torch.baddbmm(centred, coordinates, self.components.transpose(1, 2), alpha=-1)  # (K, B, F)
        squared = residual.view(len(self.mean), B, D, *self.cells).square().sum(dim=2)  # (K, B, cells, cells)
        cells = squared.sqrt().transpose(0, 1)  # (B, K, cells, cells)
        asked = experts[..., None, None].expand(*experts.shape, *self.cells)
        return to_grid(cells.gather(1, asked), (h, w))[:, :, None]


class Layouts(nn.Module):
    """What whole images of all subclasses together cannot rebuild, measured against what is usual for the expert's own.

    Ours. Residuals r = (x - m) - C C' (x - m) as in `Subspaces`, but of one subspace for all experts and at two cell
    sizes; how large they are on normal images is measured on images of groups that the subspace was not fit on, for
    each expert. Two maps: the first looks at all channels and tells where, by the highest of both sizes and of the
    `Detail` that they are too coarse for; the second looks at the coarsest stage and tells whether.

    Args:
        shape: (D, h, w).
        coarse: the last so many channels belong to the coarsest stage.
        cells: of the finer of the two sizes, a side; the coarser has half as many.
        variance, most: the components keep this share of the variance, and are never more than `most`.
        own: weight of the expert's own scale against that of all images, in [0, 1].
        max_images: drawn at random; bounds memory.
    """

    standardised = True
    """Scores have mean 0 and deviation 1 on images left out of the fit, so nothing need be held out."""

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        coarse: int,
        cells: int,
        variance: float,
        most: int,
        own: float,
        max_images: int,
    ) -> None:
        super().__init__()
        self.max_images = max_images
        D, h, w = shape
        self.views = nn.ModuleList(
            View(
                grid=(h, w),
                channels=(first, D),
                cells=(min(side, h), min(side, w)),
                by_cells=by_cells,
                variance=variance,
                most=most,
                own=own,
            )
            for first, by_cells in ((0, True), (D - coarse, False))
            for side in (cells, max(1, cells // 2))
        )
        self.detail = Detail(shape=shape, cells=(min(cells, h), min(cells, w)), own=own)

    @property
    def _views(self) -> list[View]:
        return [view for view in self.views if isinstance(view, View)]

    def fit(self, normals: Normals, *, generator: torch.Generator) -> None:
        """Fit each view on whole images, a few numbers of which are kept."""
        count = len(normals.rows)
        drawn = torch.randperm(count, generator=generator)[: self.max_images].sort().values.numpy()
        # Every expert needs an image among those drawn.
        missing = np.setdiff1d(normals.experts, normals.experts[drawn])
        first = [int(np.flatnonzero(normals.experts == expert)[0]) for expert in missing]
        drawn = np.concatenate([drawn, np.array(first, dtype=drawn.dtype)])
        pooled: list[list[Tensor]] = [[] for _ in self._views]
        for _, features in normals.batches(drawn):
            for parts, view in zip(pooled, self._views, strict=True):
                parts.append(view.pool(features))
        left_out = [
            view.fit(torch.cat(parts), normals.experts[drawn], normals.groups[drawn], generator=generator)
            for parts, view in zip(pooled, self._views, strict=True)
        ]
        self.detail.fit(normals, drawn, left_out[0])

    def forward(self, features: Tensor, experts: Tensor) -> Tensor:
        """Where, and whether: (B, T, 2, h, w)."""
        B, S, _, h, w = features.shape
        images = features.flatten(0, 1)  # (B*S, D, h, w)
        asked = experts.reshape(B * S, experts.shape[1] // S)  # of each of these; S = 1 or T
        residuals = [view.residual(images) for view in self._views]
        fine, coarse, fine_last, coarse_last = (
            to_grid(view(residual, asked), (h, w))
            for view, residual in zip(self._views, residuals, strict=True)
        )
        where = torch.maximum(torch.maximum(fine, coarse), self.detail(images, residuals[0], asked))
        both = torch.stack([where, 0.5 * (fine_last + coarse_last)], dim=2)  # (B*S, T/S, 2, h, w)
        return both.view(*experts.shape, 2, h, w)


class View(nn.Module):
    """One cell size and range of channels of a `Layouts`.

    With S the covariance between channels and s^2 the mean square, channel by channel and cell by cell, of the
    residuals r of images left out of the fit, a cell scores

        by_cells:  sqrt(sum over channels of r^2 / (half s^2 of channel and cell + half s^2 of the channel))
        otherwise: sqrt(r' (half S + half its mean variance I)^-1 r) / root of its mean square at this cell

    less its mean and divided by its deviation on those images.

    Args:
        grid: (h, w).
        channels: first and one past the last.
        cells: (rows, columns).
    """

    mean: Tensor  # (F,)
    components: Tensor  # (F, r)
    weights: Tensor  # by_cells: (K, D', cells, cells) one by the mean squares
    whitener: Tensor  # otherwise: (K, D', D')
    usual: Tensor  # otherwise: (K, cells, cells) root mean square of |whitener r|
    centre: Tensor  # (K,)
    deviation: Tensor  # (K,)

    folds = 4

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        channels: tuple[int, int],
        cells: tuple[int, int],
        by_cells: bool,
        variance: float,
        most: int,
        own: float,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.channels = channels
        self.cells = cells
        self.by_cells = by_cells
        self.variance = variance
        self.most = most
        self.own = own
        width = channels[1] - channels[0]
        numbers = width * cells[0] * cells[1]
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("components", torch.zeros(numbers, 1))
        if by_cells:
            self.register_buffer("weights", torch.ones(1, width, *cells))
        else:
            self.register_buffer("whitener", torch.eye(width)[None])
            self.register_buffer("usual", torch.ones(1, *cells))
        self.register_buffer("centre", torch.zeros(1))
        self.register_buffer("deviation", torch.ones(1))

    def pool(self, features: Tensor) -> Tensor:
        """(n, D, h, w) to (n, F)."""
        first, last = self.channels
        return to_cells(features[:, first:last], self.cells, grid=self.grid).flatten(1)

    def fit(
        self,
        pooled: Tensor,
        experts: NDArray[np.int64],
        groups: NDArray[np.int64],
        *,
        generator: torch.Generator,
    ) -> Tensor:
        """Learn from (n, F) pooled images, the expert (n,) and the group (n,) of each.

        Returns:
            (n, D', cells, cells) what is left of each by a subspace that has not seen its group.
        """
        fold = _folds(groups, self.folds, generator=generator)
        residual = torch.empty_like(pooled)
        for part in range(int(fold.max()) + 1):
            out = torch.from_numpy(fold == part)
            # One group only: nothing can be left out, and the residuals come out too small.
            mean, components = self._components(pooled if out.all() else pooled[~out])
            residual[out] = _residual(pooled[out], mean, components)
        self.mean, self.components = self._components(pooled)
        left_out = residual.view(len(pooled), -1, *self.cells)
        self._measure(left_out, torch.from_numpy(experts))
        return left_out

    def _components(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean, components = principal_components(rows, variance=self.variance)
        return mean, components[:, : self.most].contiguous()

    def _measure(self, residual: Tensor, experts: Tensor) -> None:
        """What is usual for each expert, from residuals (n, D', cells, cells) of images left out."""
        owned = [residual[experts == expert] for expert in range(int(experts.max()) + 1)]

        def mixed(measure: Callable[[Tensor, int], Tensor]) -> Tensor:
            """own x that of the expert's images + (1 - own) x that of all images, one a row."""
            return torch.stack(
                [
                    self.own * measure(few, expert) + (1 - self.own) * measure(residual, expert)
                    for expert, few in enumerate(owned)
                ]
            )

        tiny = 1e-6
        if self.by_cells:
            square = mixed(lambda few, _: few.square().mean(dim=0))  # (K, D', cells, cells)
            self.weights = 1 / (0.5 * square + 0.5 * square.mean(dim=(2, 3), keepdim=True) + tiny)
        else:
            covariance = mixed(lambda few, _: _second_moment(few))  # (K, D', D')
            variance = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] + tiny  # (K, 1, 1)
            shrunk = 0.5 * covariance + 0.5 * variance * torch.eye(covariance.shape[1])
            factor = torch.linalg.cholesky(shrunk.double())
            # Not inv: batched, of 432 channels, MKL's LU fails or never ends.
            identity = torch.eye(factor.shape[1], dtype=factor.dtype).expand_as(factor)
            self.whitener = torch.linalg.solve_triangular(factor, identity, upper=False).float()
            self.usual = torch.ones(len(owned), *self.cells)
            self.usual = (
                mixed(lambda few, expert: self._by(few, expert).square().mean(dim=0)).sqrt() + tiny
            )  # (K, cells, cells)
        scores = [self._by(few, expert) for expert, few in enumerate(owned)]
        self.centre = torch.stack([each.mean() for each in scores])
        self.deviation = torch.stack([each.std(correction=0) for each in scores]) + tiny

    def _by(self, residual: Tensor, expert: int) -> Tensor:
        """Distances (N, cells, cells) by one expert."""
        return self._distance(residual, torch.full((len(residual), 1), expert))[:, 0]

    def _distance(self, residual: Tensor, experts: Tensor) -> Tensor:
        """(N, D', cells, cells) by the experts (N, T) asked to (N, T, cells, cells)."""
        if self.by_cells:
            return _weighed(residual.square(), self.weights, experts).sqrt()
        N, T = experts.shape
        whitened = torch.bmm(self.whitener[experts].flatten(1, 2), residual.flatten(2))  # (N, T*D', P)
        square = whitened.view(N, T, *residual.shape[1:]).square().sum(dim=2)
        return square.sqrt() / self.usual[experts]

    def residual(self, features: Tensor) -> Tensor:
        """What the subspace cannot rebuild of (N, D, h, w): (N, D', cells, cells)."""
        pooled = self.pool(features)
        width = self.channels[1] - self.channels[0]
        return _residual(pooled, self.mean, self.components).view(pooled.shape[0], width, *self.cells)

    def forward(self, residual: Tensor, experts: Tensor) -> Tensor:
        """Standardised scores by the experts (N, T) asked, (N, T, cells, cells)."""
        distance = self._distance(residual, experts)
        return (distance - self.centre[experts][..., None, None]) / self.deviation[experts][..., None, None]


class Detail(nn.Module):
    """What is left of the full grid once the whole-image subspace has explained the layout.

    g = x - up(pool(x) - r) with r the residual of the finest view: the features less the rebuilt layout, brought back
    to the grid; a cell scores sqrt(sum over channels of (g - m)^2 / (half s^2 of channel and cell + half s^2 of the
    channel)), standardised, as `View` does by cells. m and s^2 are measured on images left out of the subspace.

    Args:
        shape: (D, h, w).
        cells: of the finest view.
        own: weight of the expert's own s^2 against that of all images, in [0, 1].
    """

    mean: Tensor  # (D, h, w)
    weights: Tensor  # (K, D, h, w)
    centre: Tensor  # (K,)
    deviation: Tensor  # (K,)
    up: Tensor  # (cells^2, h*w) `to_grid` as a product, which is faster; not saved, since it follows from the sizes

    def __init__(self, *, shape: tuple[int, int, int], cells: tuple[int, int], own: float) -> None:
        super().__init__()
        self.grid = shape[1:]
        self.cells = cells
        self.own = own
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("weights", torch.ones(1, *shape))
        self.register_buffer("centre", torch.zeros(1))
        self.register_buffer("deviation", torch.ones(1))
        each = torch.eye(cells[0] * cells[1]).view(-1, 1, *cells)
        self.register_buffer("up", to_grid(each, self.grid).flatten(1), persistent=False)

    def fit(self, normals: Normals, places: NDArray[np.int64], left_out: Tensor) -> None:
        """Learn from (n,) places in the normals and what the view left of them (n, D, cells, cells), in two passes."""
        tiny = 1e-6
        K = normals.number
        experts = torch.from_numpy(normals.experts)
        counts = experts[places].bincount(minlength=K).double()  # (K,)
        sums = torch.zeros(K, *self.mean.shape, dtype=torch.float64)
        squares = torch.zeros_like(sums)
        for few, rest in self._rests(normals, places, left_out):
            sums.index_add_(0, experts[few], rest.double())
            squares.index_add_(0, experts[few], rest.double().square())
        mean = sums.sum(dim=0) / counts.sum()
        # Of each expert's own images, around the mean of all: E (g - m)^2 = E g^2 - 2 m E g + m^2.
        each = (squares - 2 * mean * sums) / counts[:, None, None, None] + mean.square()
        everyone = squares.sum(dim=0) / counts.sum() - mean.square()
        square = self.own * each + (1 - self.own) * everyone
        self.mean = mean.float()
        self.weights = (1 / (0.5 * square + 0.5 * square.mean(dim=(2, 3), keepdim=True) + tiny)).float()
        moments = torch.zeros(K, 2, dtype=torch.float64)  # of each expert's scores and their squares
        for few, rest in self._rests(normals, places, left_out):
            own = self._distance(rest, experts[few][:, None]).double().flatten(1)  # (B, P)
            moments.index_add_(
                0, experts[few], torch.stack([own.mean(dim=1), own.square().mean(dim=1)], dim=1)
            )
        first, second = (moments / counts[:, None]).unbind(dim=1)
        self.centre = first.float()
        self.deviation = (second - first.square()).clamp_min(0).sqrt().float() + tiny

    def _rests(
        self, normals: Normals, places: NDArray[np.int64], left_out: Tensor
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        done = 0
        for few, features in normals.batches(places):
            yield few, self._rest(features, left_out[done : done + len(few)])
            done += len(few)

    def _rest(self, features: Tensor, residual: Tensor) -> Tensor:
        explained = to_cells(features, self.cells, grid=self.grid) - residual
        rows = features.flatten(0, 1).flatten(1)  # (N*D, h*w)
        return torch.addmm(rows, explained.flatten(0, 1).flatten(1), self.up, alpha=-1).view(features.shape)

    def _distance(self, rest: Tensor, experts: Tensor) -> Tensor:
        """(N, D, h, w) by the experts (N, T) asked to (N, T, h, w)."""
        centred = rest - self.mean
        return _weighed(centred * centred, self.weights, experts).sqrt()

    def forward(self, features: Tensor, residual: Tensor, experts: Tensor) -> Tensor:
        """Standardised scores of (N, D, h, w), of which the view left `residual`, by the experts (N, T) asked.

        Returns:
            (N, T, h, w).
        """
        distance = self._distance(self._rest(features, residual), experts)
        return (distance - self.centre[experts][..., None, None]) / self.deviation[experts][..., None, None]


def _weighed(squares: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Squares (N, D, y, x) summed over D with the weights (K, D, y, x) of the experts (N, T) asked: (N, T, y, x).

    One expert at a time: the weights of all, gathered for each image, would be larger than the features by T.
    """
    N, D, y, x = squares.shape
    ones = squares.new_ones(N, 1, D)  # ONNX Runtime sums one image's rows five times as fast by a product
    sums = [ones @ (squares * weights[each]).flatten(2) for each in experts.unbind(dim=1)]  # (N, 1, P) each
    return torch.cat(sums, dim=1).view(*experts.shape, y, x)


def _residual(rows: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """What is left of (n, F) after its projection on orthonormal columns (F, r)."""
    centred = rows - mean
    return torch.addmm(centred, centred @ components, components.T, alpha=-1)


def _second_moment(residual: Tensor) -> Tensor:
    """Mean of r r' over the cells of (n, D, y, x), (D, D)."""
    rows = residual.permute(0, 2, 3, 1).flatten(0, 2)  # (n*y*x, D)
    return rows.T @ rows / len(rows)


def _folds(groups: NDArray[np.int64], most: int, *, generator: torch.Generator) -> NDArray[np.int64]:
    """Deal whole groups into at most so many parts, (n,) -> (n,) part of each."""
    names, members = np.unique(groups, return_inverse=True)
    dealt = torch.randperm(len(names), generator=generator).numpy() % most
    return np.asarray(dealt[members], dtype=np.int64)


def to_cells(features: Tensor, cells: tuple[int, int], *, grid: tuple[int, int]) -> Tensor:
    """Average (N, D, h, w) to (N, D, *cells); the grid (h, w) as numbers, not as read off a tensor, for the export."""
    if grid[0] % cells[0] == 0 and grid[1] % cells[1] == 0:
        return F.avg_pool2d(features, (grid[0] // cells[0], grid[1] // cells[1]))
    return F.adaptive_avg_pool2d(features, cells)


def to_grid(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, T, cells, cells) to (B, T, h, w), bilinear."""
    return F.interpolate(cells, size=grid, mode="bilinear", align_corners=False)


Experts = Discriminators | Memories | Gaussians | Subspaces | Layouts
