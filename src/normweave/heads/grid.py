"""What the edge of a grid is worth."""

import torch.nn.functional as F
from torch import Tensor


def replace_border(scores: Tensor, border: int, *, grid: tuple[int, int]) -> Tensor:
    """Give the outermost cells of (B, h, w) the score of the nearest inner one.

    They see the convolutions' padding, which no two images fill alike. On a small grid at least one cell is inner.

    Args:
        grid: (h, w) as numbers: what is read off a tensor is not a constant in an exported graph.
    """
    height, width = grid
    above, beside = min(border, (height - 1) // 2), min(border, (width - 1) // 2)
    inner = scores[:, above : height - above, beside : width - beside]
    return F.pad(inner[:, None], (beside, beside, above, above), mode="replicate")[:, 0]
