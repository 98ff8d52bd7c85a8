"""Scale of the patch scores near the border of an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class BorderScale(nn.Module):
    """Bring the patch scores of cells near the border to the scale of the inner cells, for each expert and category.

    Not from a paper. The padding of the convolutions changes the features near the border, so that normal patches there
    score higher. With median and q90, the quantile at 0.9, of the patch scores of held-out normal images at a distance
    r from the border, and of the inner cells (r > `width`),

        score' = (score - median_r) * gain_r + min(median_r, median_inner)
        gain_r = min(1, (q90_inner - median_inner) / (q90_r - median_r))

    so that scores are made smaller and never larger: at the border of a plain background they vary too little for a
    scale. The outermost cells, r = 0, have the scale of r = 1.

    Args:
        affected: for each of the E experts, whether its scores are changed.
        width: of the border in cells.
    """

    gain: Tensor  # (K, E, h, w); 1 x 1 before the fit
    shift: Tensor  # (K, E, h, w)

    by_subclass = ("gain", "shift")

    def __init__(self, affected: Sequence[bool], *, width: int) -> None:
        super().__init__()
        self.affected = tuple(affected)
        self.width = width
        self.register_buffer("gain", torch.ones(1, len(affected), 1, 1))
        self.register_buffer("shift", torch.zeros(1, len(affected), 1, 1))

    def fit(self, maps: Sequence[NDArray[np.float32]], members: Sequence[int] | NDArray[np.int64]) -> None:
        """Fit gains and shifts.

        Args:
            maps: (m, E, h, w) of held-out normal images of each category.
            members: (K,) the category of each subclass, an index into `maps`.
        """
        rows = [self._measured(own, range(len(self.affected))) for own in maps]
        self.gain, self.shift = (torch.stack(each)[torch.as_tensor(members)] for each in zip(*rows, strict=True))

    def append(self, maps: NDArray[np.float32], experts: Sequence[int] | NDArray[np.int64]) -> None:
        """Append gains and shifts of a subclass.

        Args:
            maps: (m, E', h, w) of held-out normal images by some of the experts.
            experts: (E',) numbers of these.
        """
        gain, shift = self._measured(maps, experts)
        self.gain, self.shift = torch.cat([self.gain, gain[None]]), torch.cat([self.shift, shift[None]])

    def append_like(self, subclass: int) -> None:
        """Append the gains and shifts of another subclass for a new one."""
        self.gain = torch.cat([self.gain, self.gain[subclass, None]])
        self.shift = torch.cat([self.shift, self.shift[subclass, None]])

    def _measured(self, maps: NDArray[np.float32], experts: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return gain and shift (E, h, w) of one subclass."""
        ring = rings(maps.shape[2:], self.width)
        gain, shift = np.ones((len(self.affected), *ring.shape)), np.zeros((len(self.affected), *ring.shape))
        inner = int(ring.max())
        for place, expert in enumerate(experts):
            if not self.affected[expert]:
                continue
            median, high = np.quantile(maps[:, place][:, ring == inner], [0.5, 0.9])
            for each in range(1, inner):
                cells = ring == each
                lower, upper = np.quantile(maps[:, place][:, cells], [0.5, 0.9])
                factor = min(1.0, (high - median) / max(upper - lower, 1e-6))
                gain[expert, cells] = factor
                shift[expert, cells] = min(lower, median) - factor * lower
        return torch.from_numpy(gain).float(), torch.from_numpy(shift).float()

    def copy(self, fitted: BorderScale, rows: Sequence[int]) -> None:
        """Take the gains and shifts of these subclasses of another one."""
        self.gain, self.shift = fitted.gain[rows].clone(), fitted.shift[rows].clone()

    def forward(self, scores: Tensor, subclass: Tensor, expert: int) -> Tensor:
        """Return the scores (B, V, h, w) by an expert on the scale of the inner cells.

        Args:
            subclass: (B,) the subclass that each image is routed to.
        """
        if not self.affected[expert]:
            return scores
        return scores * self.gain[subclass, expert, None] + self.shift[subclass, expert, None]

    def scaled(
        self,
        patches: NDArray[np.float32],
        subclasses: NDArray[np.int64],
        experts: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Return the scores (m, E', V, h, w) by some of the experts, or all, on the scale of the inner cells.

        Args:
            subclasses: (m,).
            experts: (E',) their numbers; None = all.
        """
        numbers = range(len(self.affected)) if experts is None else experts
        rows, scores = torch.from_numpy(subclasses), torch.from_numpy(patches)
        both = [self(scores[:, place], rows, int(expert)) for place, expert in enumerate(numbers)]
        return torch.stack(both, dim=1).numpy()


def rings(grid: Sequence[int], width: int) -> NDArray[np.int64]:
    """Return the distance of each cell (h, w) from the border, from 1 for the two outermost to the first inner one.

    Args:
        width: of the border; cells farther away than this are inner cells, or, in a small grid, the innermost ones.
    """
    from_edge = [np.minimum(np.arange(side), np.arange(side)[::-1]) for side in grid]
    distance = np.minimum(from_edge[0][:, None], from_edge[1][None])
    return np.clip(distance, 1, max(1, min(width + 1, int(distance.max())))).astype(np.int64)
