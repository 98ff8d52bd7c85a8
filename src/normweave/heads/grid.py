"""Treatment of the border of a grid of scores."""

import torch.nn.functional as F
from torch import Tensor


def replace_border(scores: Tensor, border: int, *, grid: tuple[int, int]) -> Tensor:
    """Replace the scores of the outermost cells of (B, h, w) by that of the nearest inner cell.

    The features of these cells depend on the padding of the convolutions. At least one cell is kept.

    Args:
        grid: (h, w) as numbers, which are constants in an exported graph; the shape of a tensor is not.
    """
    height, width = grid
    above, beside = min(border, (height - 1) // 2), min(border, (width - 1) // 2)
    inner = scores[:, above : height - above, beside : width - beside]
    return F.pad(inner[:, None], (beside, beside, above, above), mode="replicate")[:, 0]
