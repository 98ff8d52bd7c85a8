"""A feature source at hand."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


class InMemory:
    """Features (n, D, h, w) that remember which images were asked for."""

    def __init__(self, features: Tensor | ArrayLike) -> None:
        self.features = torch.as_tensor(features, dtype=torch.float32)
        self.shape = tuple(self.features.shape[1:])
        self.asked: list[NDArray[np.int64]] = []

    @property
    def most(self) -> int:
        """How many were asked for at once, at most."""
        return max((len(rows) for rows in self.asked), default=0)

    def __len__(self) -> int:
        return len(self.features)

    def read(self, rows: Sequence[int]) -> Tensor:
        self.asked.append(np.asarray(rows))
        return self.features[torch.as_tensor(np.asarray(rows), dtype=torch.int64)]
