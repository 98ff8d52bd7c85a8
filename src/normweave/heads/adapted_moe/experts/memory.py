"""Memory banks: distance to the nearest stored normal patch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normweave.config import MemoryExpertConfig
from normweave.heads.adapted_moe.experts.base import Experts, Normals, products
from normweave.heads.memory_bank import coreset, draw_patches, project

CHUNK = 256  # stored patches compared at once; bounds memory to B * T * CHUNK * P numbers


class MemoryExperts(Experts):
    """Distance to the nearest normal patch in the memory bank, divided by the mean distance of normal patches to it.

    d(x) = |x - m|, m the nearest stored patch (arXiv 2106.08265). With `calibrated` the score is d / mu(m), which is
    not from a paper. mu(m) is the mean distance of the normal patches whose nearest stored patch is m. It is shrunk
    towards the mean over all stored patches by 3 pseudo-counts, then averaged over the 10 stored patches nearest to m,
    including m. The search for mu leaves out the group of each patch, since the group of a test image is not in the
    memory bank either.
    """

    bank: Tensor  # (K, M, D); rows beyond an expert's own number are zero
    offset: Tensor  # (K, M) -|m|^2 / 2; minus infinity where there is no patch
    usual: Tensor  # (K, M) mu(m)

    pseudo_counts = 3
    neighbours = 10

    def __init__(self, config: MemoryExpertConfig, *, shape: tuple[int, int, int], unit: float = 1.0) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("bank", torch.zeros(1, 1, shape[0]))
        self.register_buffer("offset", torch.zeros(1, 1))
        self.register_buffer("usual", torch.ones(1, 1))

    def fit(self, normals: Normals, *, generator: torch.Generator) -> None:
        """Fill the memory banks, and measure the mean distance of normal patches to every stored patch."""
        stored = [self._store(normals, expert, generator) for expert in range(normals.number)]
        most = max(len(patches) for patches, _ in stored)
        shape = (normals.number, most)
        self.bank = torch.zeros(*shape, self.bank.shape[2])
        self.offset = torch.full(shape, -torch.inf)
        self.usual = torch.ones(shape)
        for expert, (patches, groups) in enumerate(stored):
            self.bank[expert, : len(patches)] = patches
            self.offset[expert, : len(patches)] = -0.5 * patches.square().sum(dim=1)
            if self.config.calibrated:
                self.usual[expert, : len(patches)] = self._measure(normals, expert, patches, groups)

    def _store(self, normals: Normals, expert: int, generator: torch.Generator) -> tuple[Tensor, NDArray[np.int64]]:
        """Return the coreset (M, D) of an expert and the group of each patch (M,)."""
        own = np.flatnonzero(normals.experts == expert)
        own = own[torch.randperm(len(own), generator=generator)[: self.config.max_pool].sort().values.numpy()]
        each = max(1, self.config.max_pool // len(own))
        pool, groups = [], []
        for row in own:
            drawn, _ = draw_patches(normals.source, normals.rows[row : row + 1], at_most=each, generator=generator)
            pool.append(drawn)
            groups.append(np.full(len(drawn), normals.groups[row]))
        patches = torch.cat(pool)  # (N, D)
        keep = min(self.config.max_patches, len(patches))
        chosen = coreset(project(patches, self.config.projection, generator=generator), keep, generator=generator)
        return patches[chosen], np.concatenate(groups)[chosen.numpy()]

    def _measure(self, normals: Normals, expert: int, patches: Tensor, groups: NDArray[np.int64]) -> Tensor:
        """Return mu of each stored patch (M,)."""
        total = torch.zeros(len(patches), dtype=torch.float64)
        count = torch.zeros(len(patches), dtype=torch.float64)
        single = torch.zeros(1, 1, dtype=torch.int64)
        for batch, features in normals.batches(np.flatnonzero(normals.experts == expert)):
            for row, image in zip(batch, features, strict=True):
                others = torch.from_numpy(groups != normals.groups[row])
                if not others.any():
                    continue
                offset = torch.where(others, -0.5 * patches.square().sum(dim=1), -torch.inf)
                distance, index = nearest(image[None, None], patches[None], offset[None], single)
                total.index_add_(0, index.flatten(), distance.flatten().double())
                count.index_add_(0, index.flatten(), torch.ones(index.numel(), dtype=torch.float64))
        if not count.any():  # one group only: no distance to other groups
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
        """Return the distance of every patch, (B, T, 1, h, w)."""
        distance, index = nearest(features, self.bank, self.offset, experts)
        if self.config.calibrated:
            distance = distance / self.usual[experts[..., None], index]
        return distance.view(*experts.shape, 1, *features.shape[3:])


def nearest(features: Tensor, bank: Tensor, offset: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance to the nearest stored patch of each chosen expert.

    The nearest patch has the largest x . m - |m|^2 / 2. Its distance is then computed from the difference, because the
    expansion of the square loses small distances to rounding.

    Args:
        features: (B, S, D, h, w), S = 1 or T.
        bank: (K, M, D).
        offset: (K, M) -|m|^2 / 2, minus infinity where a bank has no patch.
        experts: (B, T).

    Returns:
        (B, T, P) distance and (B, T, P) int64 row of the bank.
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
