"""Contract of the experts, and the parts that several of them use.

All experts of a head are one module and compute their scores in one batched product.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.heads.base import TrainingStage
from normweave.passes import BATCH_IMAGES, Merge, Statistics, Tensors, over, per_image
from normweave.types import FeatureSource

T = TypeVar("T")
Assign = Callable[[Tensor, Tensor], Tensor]
"""(features (B, D, h, w), given subclasses (B,)) to the expert of each image (B,)."""
Adapt = Callable[[Tensor, Tensor], Tensor]
"""(features (B, D, h, w), experts (B,)) to the features adapted for these experts (B, D, h, w)."""


@dataclass(frozen=True)
class Normals:
    """Normal images, each assigned to one expert."""

    source: FeatureSource
    """Each image is adapted for its own expert."""
    rows: NDArray[np.int64]
    """(n,) images of the source to fit on."""
    experts: NDArray[np.int64]
    """(n,) 0..K-1, each at least once."""
    groups: NDArray[np.int64]
    """(n,) physical part, lot or session."""

    @property
    def number(self) -> int:
        """K."""
        return int(self.experts.max()) + 1

    def batches(self, chosen: NDArray[np.int64] | None = None) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Yield indices into `rows` and the features (B, D, h, w) of the chosen images, a few at a time; None = all."""
        chosen = np.arange(len(self.rows)) if chosen is None else chosen
        for start in range(0, len(chosen), BATCH_IMAGES):
            batch = chosen[start : start + BATCH_IMAGES]
            yield batch, self.source.read(self.rows[batch])

    def over(
        self,
        statistics: Statistics[T],
        *,
        merge: Merge[T],
        chosen: NDArray[np.int64] | None = None,
        aligned: Tensors = (),
    ) -> T:
        """Return `passes.over` of the chosen images; None = all. `batches` reads them on this machine."""
        rows = self.rows if chosen is None else self.rows[chosen]
        return over(self.source, statistics, merge=merge, rows=rows, aligned=aligned)

    def per_image(self, function: Callable[..., Tensors], chosen: NDArray[np.int64]) -> Tensors:
        """Return `passes.per_image` of the chosen images."""
        return per_image(self.source, function, rows=self.rows[chosen])


class Experts(nn.Module):
    """K experts, one for each subclass, that score how much patches differ from the normal patches of the subclass.

    A new type of expert overrides `fit` and `forward`, or `start`, `stages` and `forward` if it is trained by gradient.
    It is built as `Class(config, shape=(D, h, w), unit=unit)`, where unit is the std of a channel of its features.
    """

    standardised: bool = False
    """Scores already have mean 0 and std 1 on normal images outside of the fit, so that none are held out for this."""
    default_adaption: Literal["off", "full", "guarded"] = "guarded"
    """Test-time adaption with `head.adaption.method=auto`."""
    maps: int = 1
    """V, the number of maps; with 2 the second gives the image score."""
    distributed: bool = False
    """Whether `fit` reads the images by `Normals.over` and `Normals.per_image` only, and there is no training stage:
    then they can be on several machines."""
    united: bool = False
    """The experts score together, by `score_united`, whatever an image is routed to."""
    origins: NDArray[np.int64] | None = None
    """(M, 3) row of the fit data, grid row and grid column of the stored patches that `score_united` refers to, as
    `Head.origins`; None: no such patches, or loaded."""

    def start(self, *, experts: int, generator: torch.Generator) -> None:
        """Draw the initial weights of this many experts."""

    def stages(self, *, assign: Assign, adapt: Adapt) -> Sequence[TrainingStage]:
        """Return the training stages; none if nothing is trained by gradient."""
        return ()

    def fit(self, normals: Normals, *, generator: torch.Generator) -> None:
        """Fit everything in closed form, after the stages."""

    def add(self, normals: Normals, *, first: int, generator: torch.Generator) -> None:
        """Append an expert that is fitted to images of one new subclass; the others do not change.

        Only for experts of the fusion; `set_number` follows.

        Args:
            first: number of experts of the first training.
        """
        raise NotImplementedError

    def remove(self, expert: int, *, first: int) -> None:
        """Remove what an added expert has beside its row of the buffers in `by_subclass`; `set_number` follows."""

    def set_number(self, number: int, *, first: int) -> None:
        """Note the number of experts and that of the first training: an exported graph needs them as constants."""

    @abstractmethod
    def forward(self, features: Tensor, experts: Tensor) -> Tensor:
        """Score patches by some of the experts.

        Args:
            features: (B, S, D, h, w); S = 1: the same features for all experts; S = T: adapted for each.
            experts: (B, T) int64 indices of the experts.

        Returns:
            (B, T, V, h, w). V = 1 is the map. With V = 2 the maximum of the second map is the image score.
        """

    def score_united(self, features: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Score patches by all allowed experts together; only for experts that are `united`.

        Args:
            features: (B, D, h, w).
            allowed: (B, K) bool; None = all.

        Returns:
            (B, V, h, w) scores, and (B, h, w) int64 the most similar stored patch, a row of `origins`.
        """
        raise NotImplementedError


def products(features: Tensor, weights: Tensor, offset: Tensor) -> Tensor:
    """Return offset + weights . patch for every chosen expert and every patch, in one batched product.

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


def to_cells(features: Tensor, cells: tuple[int, int], *, grid: tuple[int, int]) -> Tensor:
    """Average (N, D, h, w) to (N, D, *cells). The grid (h, w) is an argument: a constant in the ONNX graph."""
    if grid[0] % cells[0] == 0 and grid[1] % cells[1] == 0:
        return F.avg_pool2d(features, (grid[0] // cells[0], grid[1] // cells[1]))
    return F.adaptive_avg_pool2d(features, cells)


def to_grid(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Interpolate (B, T, cells, cells) to (B, T, h, w) bilinearly."""
    return F.interpolate(cells, size=grid, mode="bilinear", align_corners=False)


def fine_channels(share: float, width: int) -> int:
    """Return the number of channels in this share of `width` channels, at least 1."""
    return max(1, round(share * width))
