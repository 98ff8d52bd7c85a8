"""Memory banks: distance to the nearest stored normal patch."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from normweave.config import MemoryExpertConfig
from normweave.heads.adapted_moe.experts.base import Experts, Normals
from normweave.heads.memory_bank import coreset, draw_quota
from normweave.nearest import BLOCK, largest_product
from normweave.passes import Batches, Tensors, added

CHUNK = 256  # stored patches that are compared with all others at once


class MemoryExperts(Experts):
    """Distance to the nearest normal patch in the memory bank.

    d(x) = |V'x - m|, m the nearest stored patch (arXiv 2106.08265, equations 5 and 6). V are the leading principal
    components of the patches, which the paper does not have: they save part of the products of the search. The
    bank holds patches of all subclasses. With `shared` an image is compared with all of them, otherwise with those of
    the experts that it is routed to.

    With `calibrated` the score is d / mu(m), which is not from a paper. mu(m) is the mean distance of the normal
    patches whose nearest stored patch is m. It is shrunk towards the mean over all stored patches by 3 pseudo-counts,
    then averaged over the 10 stored patches nearest to m, including m. The search for mu leaves out the group of each
    patch, since the group of a test image is not in the memory bank either.
    """

    components: Tensor  # (D, r) V
    bank: Tensor  # (M, r)
    owner: Tensor  # (M,) int64, the expert from whose images the patch is
    usual: Tensor  # (M,) mu(m)
    added_bank: Tensor  # (M', r) patches of the added experts, up to a multiple of `BLOCK`; only if there are any
    added_offset: Tensor  # (M',) -|m|^2 / 2, or -inf where there is no patch
    added_owner: Tensor  # (M',)

    distributed = True
    default_adaption = "off"
    by_subclass = ()
    of_added = ("added_bank", "added_offset", "added_owner")
    grows = ("bank", "usual", *of_added)

    pseudo_counts = 3
    neighbours = 10

    def __init__(self, config: MemoryExpertConfig, *, shape: tuple[int, int, int], unit: float = 1.0) -> None:
        super().__init__()
        self.config = config
        self.united = config.shared
        width = shape[0]
        dimensions = min(config.dimensions, width) or width
        self.register_buffer("components", torch.eye(width, dimensions))
        self.register_buffer("bank", torch.zeros(1, dimensions))
        self.register_buffer("owner", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("usual", torch.ones(1))
        self._added = 0  # experts
        self._first_patches: int | None = None  # of the first training, before those of the added experts; None: all

    def fit(self, normals: Normals, *, generator: torch.Generator) -> None:
        """Fill the memory bank, and measure the mean distance of normal patches to every stored patch."""
        pools = [np.arange(len(normals.rows))]
        if not self.config.shared:
            pools = [np.flatnonzero(normals.experts == expert) for expert in range(normals.number)]
        drawn = [self._draw(normals, own, generator, at_most=self.config.max_pool) for own in pools]
        patches = torch.cat([each for each, _ in drawn])
        width, dimensions = patches.shape[1], self.bank.shape[1]
        self.components = torch.eye(width) if dimensions == width else _principal_components(patches, dimensions)
        stored, origins = [], []
        for pool, places in drawn:
            projected = pool @ self.components
            keep = min(self.config.max_patches, len(projected))
            chosen = coreset(projected, keep, generator=generator)
            stored.append(projected[chosen])
            origins.append(places[chosen.numpy()])
        origin = np.concatenate(origins)
        images = np.searchsorted(normals.rows, origin[:, 0])
        self.bank = torch.cat(stored)
        self.owner = torch.from_numpy(normals.experts[images])
        self.origins = origin if self.config.shared else None
        self.usual = torch.ones(len(self.bank))
        if self.config.calibrated:
            self.usual = self._measure(normals, normals.groups[images])

    def add(self, normals: Normals, *, first: int, generator: torch.Generator) -> None:
        """Append patches of these images that are far from the stored ones; V does not change.

        They are at most an equal share of `max_patches` for each expert, chosen from as large a share of `max_pool`.
        Those of all added experts are searched by a product of their own, so that the distances to the patches of the
        first training keep every bit.
        """
        expert = first + self._added
        experts = expert + 1
        pool = max(1, self.config.max_pool // experts)
        patches, places = self._draw(normals, np.arange(len(normals.rows)), generator, at_most=pool)
        projected = patches @ self.components
        keep = min(max(1, self.config.max_patches // experts), len(projected))
        chosen = coreset(projected, keep, generator=generator, given=self.bank)
        self.bank = torch.cat([self.bank, projected[chosen]])
        self.owner = torch.cat([self.owner, torch.full((keep,), expert)])
        self.usual = torch.cat([self.usual, self.usual.mean().expand(keep)])
        self.origins = places[chosen.numpy()]

    def remove(self, expert: int, *, first: int) -> None:
        """Remove the patches of an added expert."""
        kept = self.owner != expert
        self.bank, self.usual, owner = self.bank[kept], self.usual[kept], self.owner[kept]
        self.owner = torch.where(owner > expert, owner - 1, owner)

    def set_number(self, number: int, *, first: int) -> None:
        """Note which patches are those of added experts, and prepare their search."""
        self._added, self._first_patches = number - first, None
        for name in self.of_added:
            self._buffers.pop(name, None)
        if not self._added:
            return
        self._first_patches = known = int((self.owner < first).sum())
        bank, owner = self.bank[known:], self.owner[known:]
        bank, offset = _to_blocks(bank, _offset(bank))
        owner = F.pad(owner, (0, len(bank) - len(owner)), value=first)
        for name, tensor in zip(self.of_added, (bank, offset, owner), strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def _draw(
        self, normals: Normals, own: NDArray[np.int64], generator: torch.Generator, *, at_most: int
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """Return patches (N, D) of these images, indices into `normals.rows`, and the place of each (N, 3)."""
        own = own[torch.randperm(len(own), generator=generator)[:at_most].sort().values.numpy()]
        quota = torch.full((len(own),), max(1, at_most // len(own)))
        return draw_quota(normals.source, normals.rows[own], quota, generator=generator)

    def _measure(self, normals: Normals, groups: NDArray[np.int64]) -> Tensor:
        """Return mu of each stored patch (M,); `groups` (M,) are those of the stored patches."""
        total, count = normals.over(
            partial(self._distance_sums, torch.from_numpy(groups)),
            merge=added,
            aligned=(torch.from_numpy(normals.groups), torch.from_numpy(normals.experts)),
        )
        if not count.any():  # one group only: no distance to other groups
            return torch.ones(len(self.bank))
        overall = total.sum() / count.sum()
        usual = (total + self.pseudo_counts * overall) / (count + self.pseudo_counts)  # (M,)
        nearby = min(self.neighbours, len(self.bank))
        near = torch.cat(
            [
                torch.cdist(self.bank[start : start + CHUNK], self.bank).topk(nearby, largest=False).indices
                for start in range(0, len(self.bank), CHUNK)
            ]
        )  # (M, 10), itself among them
        return usual[near].mean(dim=1).clamp_min(1e-6).float()

    def _distance_sums(self, stored: Tensor, batches: Batches) -> Tensors:
        """Return the sum of the distances to each stored patch (M,), whose groups are `stored`, and their number."""
        total = torch.zeros(len(self.bank), dtype=torch.float64)
        count = torch.zeros(len(self.bank), dtype=torch.float64)
        for features, groups, experts in batches:
            for image, group, expert in zip(features, groups, experts, strict=True):
                others = stored != group
                if not self.config.shared:
                    others &= self.owner == expert
                if not others.any():
                    continue
                distance, index = self._nearest(self._project(image[None]), others[None])
                total.index_add_(0, index.flatten(), distance.flatten().double())
                count.index_add_(0, index.flatten(), torch.ones(index.numel(), dtype=torch.float64))
        return total, count

    def forward(self, features: Tensor, experts: Tensor) -> Tensor:
        """Return the distance of every patch to those of each expert, (B, T, 1, h, w)."""
        views = features.expand(-1, experts.shape[1], -1, -1, -1).unbind(dim=1)
        allowed = [self.owner == each[:, None] for each in experts.unbind(dim=1)]  # (B, M) each
        return torch.stack([self._score(view, own)[0] for view, own in zip(views, allowed, strict=True)], dim=1)

    def score_united(self, features: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the distance of every patch to those of all allowed experts, and the nearest of them."""
        owner = self.owner[: self._first_patches]
        return self._score(features, None if allowed is None else allowed[:, owner], allowed)

    def _score(self, features: Tensor, allowed: Tensor | None, experts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the scores (B, 1, h, w) and the nearest stored patch (B, h, w).

        Args:
            allowed: as of `_nearest`.
            experts: (B, K) bool, the experts whose added patches count, too; None = those of none.
        """
        patches = self._project(features)
        distance, index = self._nearest(patches, allowed)
        if self._first_patches is not None and experts is not None:
            counts = experts[:, self.added_owner]  # (B, M')
            away, own = _search(patches, self.added_bank, self.added_offset[None].masked_fill(~counts, -torch.inf))
            closer = (away < distance) & counts.gather(1, own)
            distance = torch.where(closer, away, distance)
            index = torch.where(closer, own + self._first_patches, index)
        if self.config.calibrated:
            distance = distance / self.usual[index]
        B, _, h, w = features.shape
        return distance.view(B, 1, h, w), index.view(B, h, w)

    def _project(self, features: Tensor) -> Tensor:
        """Return V'x of every patch, (B, D, h, w) -> (B, P, r)."""
        return features.flatten(2).transpose(1, 2) @ self.components

    def _nearest(self, patches: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the distance (B, P) of every patch to the nearest patch of the first training, and its row (B, P).

        Args:
            patches: (B, P, r).
            allowed: (B, M) bool, the stored patches that count; None = all.
        """
        bank = self.bank[: self._first_patches]
        offset = _offset(bank)[None]  # (1 or B, M)
        if allowed is not None:
            offset = offset.masked_fill(~allowed, -torch.inf)
        return _search(patches, *_to_blocks(bank, offset))


def _search(patches: Tensor, bank: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance (B, P) of patches (B, P, r) to the nearest one of a bank (M, r), and its row (B, P).

    The nearest patch has the largest x . m - |m|^2 / 2. Its distance is then computed from the difference, because the
    expansion of the square loses small distances to rounding.

    Args:
        offset: (1 or B, M) -|m|^2 / 2, or -inf for a patch that does not count.
    """
    index: Tensor = largest_product(patches, bank, offset)
    return (patches - bank[index]).square().sum(dim=2).sqrt(), index


def _offset(bank: Tensor) -> Tensor:
    """Return -|m|^2 / 2 of each stored patch, (M, r) -> (M,)."""
    return -0.5 * bank.square().sum(dim=1)


def _to_blocks(bank: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Append rows to a bank (M, r) up to a multiple of `BLOCK`, with which no product (..., M) is the largest."""
    if missing := -len(bank) % BLOCK:
        bank, offset = F.pad(bank, (0, 0, 0, missing)), F.pad(offset, (0, missing), value=-torch.inf)
    return bank, offset


def _principal_components(patches: Tensor, number: int) -> Tensor:
    """Return the leading eigenvectors (D, number) of the covariance of patches (N, D)."""
    centred = (patches - patches.mean(dim=0)).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))  # ascending eigenvalues
    leading: Tensor = vectors[:, -number:].flip(1).float().contiguous()
    return leading
