"""Subspace experts: PCA residual of whole feature maps."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from normweave.config import SubspaceExpertConfig
from normweave.heads.adapted_moe.experts.base import Experts, Normals, to_cells, to_grid
from normweave.heads.dfm import principal_components
from normweave.passes import Tensors


class SubspaceExperts(Experts):
    """PCA residual of the whole feature map, with the principal components of the subclass.

    r = (x - m) - C C' (x - m) with x the whole feature map, averaged to cells and flattened (DFM, arXiv 1909.11786, one
    for each expert). The score of a cell is the norm of r over its channels, with bilinear interpolation between
    cells. F = D * cells * cells.
    """

    mean: Tensor  # (K, F)
    components: Tensor  # (K, F, r); columns beyond an expert's own number are zero

    distributed = True
    default_adaption = "off"

    def __init__(self, config: SubspaceExpertConfig, *, shape: tuple[int, int, int], unit: float = 1.0) -> None:
        super().__init__()
        self.config = config
        D, h, w = shape
        self.grid = (h, w)
        self.cells = (min(config.cells, h), min(config.cells, w))
        numbers = D * self.cells[0] * self.cells[1]
        self.register_buffer("mean", torch.zeros(1, numbers))
        self.register_buffer("components", torch.zeros(1, numbers, 1))

    def fit(self, normals: Normals, *, generator: torch.Generator) -> None:
        """Fit mean and components to the images of each expert."""
        found = []
        for expert in range(normals.number):
            own = np.flatnonzero(normals.experts == expert)
            drawn = torch.randperm(len(own), generator=generator)[: self.config.max_images].sort().values.numpy()
            (flat,) = normals.per_image(partial(_flat, self.cells, self.grid), own[drawn])  # (n, F)
            found.append(principal_components(flat, variance=self.config.variance))
        most = max(1, *(components.shape[1] for _, components in found))
        self.mean = torch.stack([mean for mean, _ in found])
        self.components = torch.stack([F.pad(each, (0, most - each.shape[1])) for _, each in found])

    def _flat(self, features: Tensor) -> Tensor:
        (flat,) = _flat(self.cells, self.grid, features.flatten(0, 1))  # (B*S, F)
        return flat.view(*features.shape[:2], self.mean.shape[1])  # (B, S, F)

    def forward(self, features: Tensor, experts: Tensor) -> Tensor:
        """Return the residual of every cell, (B, T, 1, h, w)."""
        B, S, D, h, w = features.shape
        flat = self._flat(features)  # (B, S, F)
        if S > 1:  # features adapted for each expert; zero for the other experts
            chosen = experts[..., None].expand_as(flat)
            flat = flat.new_zeros(B, len(self.mean), flat.shape[2]).scatter(1, chosen, flat)  # (B, K, F)
        # All experts, also those that are not chosen: gathering components costs more than the product.
        centred = flat.transpose(0, 1) - self.mean[:, None]  # (K, B, F)
        coordinates = torch.bmm(centred, self.components)  # (K, B, r)
        residual = torch.baddbmm(centred, coordinates, self.components.transpose(1, 2), alpha=-1)  # (K, B, F)
        squared = residual.view(len(self.mean), B, D, *self.cells).square().sum(dim=2)  # (K, B, cells, cells)
        cells = squared.sqrt().transpose(0, 1)  # (B, K, cells, cells)
        chosen = experts[..., None, None].expand(*experts.shape, *self.cells)
        return to_grid(cells.gather(1, chosen), (h, w))[:, :, None]


def _flat(cells: tuple[int, int], grid: tuple[int, int], features: Tensor) -> Tensors:
    """Average (N, D, h, w) to cells and flatten to (N, F)."""
    return (to_cells(features, cells, grid=grid).flatten(1),)
