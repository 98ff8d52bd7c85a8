"""PatchCore: distance to the nearest stored normal patch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normweave.config import MemoryBankConfig
from normweave.heads.base import Head
from normweave.heads.grid import replace_border
from normweave.passes import Tensors, per_image
from normweave.types import FeatureSource, FitData, PatchScores

CHUNK = 1024  # stored patches compared at once: as fast as more, and (queries, CHUNK) numbers are small


class MemoryBank(Head):
    """Keep a coreset of normal patches. The score of a patch is its distance to the nearest of them.

    Roth et al. 2022 (arXiv 2106.08265), equations 5 and 6: s(x) = min over m in the bank of |x - m|. Without
    equation 7, the re-weighting of the image score. The pool is bounded, the paper's is not. The paper does
    not replace the scores of the border cells.

    Args:
        shape: (D, h, w) of the features.
    """

    bank: Tensor  # (M, D)

    distributed = True

    def __init__(self, config: MemoryBankConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.config = config
        self.grid = shape[1:]
        self.register_buffer("bank", torch.empty(0, shape[0]))

    @torch.no_grad()
    def begin(self, data: FitData) -> None:
        """Choose the bank from the patches of all fit images."""
        config = self.config
        generator = torch.Generator().manual_seed(data.seed)
        pool, origins = draw_patches(data.features, np.arange(len(data)), at_most=config.max_pool, generator=generator)
        keep = min(config.max_patches, max(1, round(config.share * len(pool))))
        chosen = coreset(project(pool, config.projection, generator=generator), keep, generator=generator)
        self.bank = pool[chosen].to(self.bank.device)
        self.origins = origins[chosen.numpy()]

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        B, D, h, w = features.shape
        patches = features.permute(0, 2, 3, 1).reshape(-1, D)  # (B*P, D)
        distance, index = nearest(patches, self.bank)
        scores = replace_border(distance.view(B, h, w), self.config.border, grid=self.grid)
        # The cells of the border keep their own nearest patch, which is at the border of a good image in most cases.
        return PatchScores(scores=scores, image_scores=None, routing=None, nearest=index.view(B, h, w))


def nearest(queries: Tensor, bank: Tensor, *, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Return the distance to the nearest row of the bank, and the index of that row.

    Found by |x - m|^2 = |x|^2 - 2 x.m + |m|^2, the bank taken `chunk` rows at a time. The distance itself is
    then computed from the difference: the expansion loses small distances to rounding.

    Args:
        queries: (N, D).
        bank: (M, D), M >= 1.
        chunk: bounds the memory to N * chunk numbers.

    Returns:
        (N,) distance and (N,) int64 row of the bank.
    """
    best = queries.new_full((queries.shape[0],), torch.inf)  # |x|^2 is left out: the same for every m
    index = torch.zeros(queries.shape[0], dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), chunk):
        part = bank[start : start + chunk]  # (m, D)
        squared = torch.addmm(part.square().sum(1), queries, part.T, alpha=-2)  # (N, m)
        value, row = squared.min(dim=1)  # (N,), (N,)
        closer = value < best
        best = torch.where(closer, value, best)
        index = torch.where(closer, row + start, index)
    return (queries - bank[index]).square().sum(1).sqrt(), index


def draw_patches(
    source: FeatureSource, rows: NDArray[np.int64], *, at_most: int, generator: torch.Generator
) -> tuple[Tensor, NDArray[np.int64]]:
    """Draw patches of these (n,) images at random without replacement, equally many from each (up to one).

    Returns:
        (N, D) patches, N <= at_most, in the order of `rows`; and (N, 3) row of the source, grid row and grid column of
        each.
    """
    each, over = divmod(at_most, max(1, len(rows)))
    quota = torch.full((len(rows),), each)
    quota[torch.randperm(len(rows), generator=generator)[:over]] += 1
    return draw_quota(source, rows, quota, generator=generator)


def draw_quota(
    source: FeatureSource, rows: NDArray[np.int64], quota: Tensor, *, generator: torch.Generator
) -> tuple[Tensor, NDArray[np.int64]]:
    """Draw as many patches of each of these (n,) images as `quota` (n,), or all of it; return as `draw_patches`.

    They are drawn before an image is read, so that they are the same wherever the images are.
    """
    _, h, w = source.shape
    quota = quota.clamp(max=h * w)
    most = int(quota.max())
    cells = torch.stack([torch.randperm(h * w, generator=generator)[:most] for _ in rows])  # (n, most)
    (pool,) = per_image(source, _patches, rows=rows, aligned=(cells, quota))
    drawn = torch.cat([own[:count] for own, count in zip(cells, quota, strict=True)])
    owners = np.repeat(rows, quota.numpy())
    return pool, np.stack([owners, *np.divmod(drawn.numpy(), w)], axis=1)


def _patches(features: Tensor, cells: Tensor, quota: Tensor) -> Tensors:
    """Return the first patches (N, D) at the cells (B, most) of each image, as many as its quota (B,)."""
    images = zip(features.flatten(2), cells, quota, strict=True)
    return (torch.cat([image[:, own[:count]].T for image, own, count in images]),)


def project(patches: Tensor, dimensions: int, *, generator: torch.Generator) -> Tensor:
    """Project (N, D) to (N, dimensions) by a random matrix that approximately preserves distances.

    Johnson and Lindenstrauss 1984: x R / sqrt(dimensions), entries of R from N(0, 1). Patches are returned unchanged if
    dimensions is 0 or at least D.
    """
    width = patches.shape[1]
    if dimensions == 0 or dimensions >= width:
        return patches
    matrix = torch.randn(width, dimensions, generator=generator) / math.sqrt(dimensions)
    return patches @ matrix


def coreset(points: Tensor, keep: int, *, generator: torch.Generator, given: Tensor | None = None) -> Tensor:
    """Choose rows of (N, d) points such that every point is near a chosen one: greedy k-centre, a 2-approximation.

    Gonzalez 1985; algorithm 1 of arXiv 2106.08265: from a first point drawn at random, always add the point
    that is farthest from the chosen ones.

    Args:
        given: (M, d) points that are chosen already; the first new one is then the farthest from them.

    Returns:
        (keep,) int64, all different, in the order in which they were chosen.
    """
    squares = points.square().sum(1)  # (N,)
    farness = torch.full_like(squares, torch.inf)  # squared distance to the nearest chosen point
    distance = torch.empty_like(squares)
    chosen = torch.empty(keep, dtype=torch.int64)
    latest = int(torch.randint(len(points), (1,), generator=generator))
    if given is not None:
        farness = nearest(points, given)[0].square()
        latest = int(farness.argmax())
    for step in range(keep):
        chosen[step] = latest
        torch.addmv(squares, points, points[latest], alpha=-2, out=distance)
        distance += squares[latest]
        torch.minimum(farness, distance, out=farness)
        farness[latest] = -torch.inf  # never twice, even if rounding or duplicates leave no farther point
        latest = int(farness.argmax())
    return chosen
