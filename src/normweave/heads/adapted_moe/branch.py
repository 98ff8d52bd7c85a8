"""Expert branch: the test-time adaption, the experts, and the scale of their scores."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.config import AdaptionConfig, SingleExpertConfig
from normweave.heads import locate
from normweave.heads.adapted_moe.adaption import Adaption, build_adaption, statistics
from normweave.heads.adapted_moe.experts.base import Experts
from normweave.passes import Tensors, per_image
from normweave.types import FeatureSource

FEWEST_HELD_OUT = 3
"""Held-out images that an expert needs for a score scale of its own; with fewer it has that of all experts."""


class ExpertBranch(nn.Module):
    """Adaption, experts, and mean and std of their scores on held-out normal images.

    Args:
        expert: settings of the experts.
        adaption: settings of the adaption; `auto` is the default of the experts.
        shape: (D, h, w) of the features.
    """

    scale_mean: Tensor  # (K,) of each expert's patch scores on held-out normals of its own subclass
    scale_std: Tensor  # (K,)

    by_subclass = ("scale_mean", "scale_std")

    def __init__(self, expert: SingleExpertConfig, adaption: AdaptionConfig, *, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.config = expert
        implementation = locate("normweave.heads.adapted_moe.experts", expert)
        self.adaption = build_adaption(adaption, default=implementation.default_adaption, width=shape[0])
        # Patches of length one have channels with a std of about 1 / sqrt(D).
        unit = shape[0] ** -0.5 if self.adaption.unit_length else 1.0
        self.experts: Experts = implementation(expert, shape=shape, unit=unit)
        self.register_buffer("scale_mean", torch.zeros(1))
        self.register_buffer("scale_std", torch.ones(1))

    @property
    def number(self) -> int:
        """Return K, the number of experts; 0 if `remove` has deleted them."""
        return len(self.scale_mean)

    def unit_scale(self, number: int) -> None:
        """Keep the scores of `number` experts as they are: mean 0 and std 1 are assumed."""
        self.scale_mean, self.scale_std = torch.zeros(number), torch.ones(number)

    def remove(self) -> None:
        """Delete the experts of this branch. Buffers of size 0 mark this, also after loading."""
        self.unit_scale(0)
        for name, tensor in list(self.experts.state_dict().items()):
            module, _, leaf = name.rpartition(".")
            setattr(self.experts.get_submodule(module), leaf, tensor[:0].clone())

    def adapt(self, features: Tensor, experts: Tensor) -> Tensor:
        """Return training images adapted for their own experts (B,), (B, D, h, w)."""
        return adapt(self.adaption, features, experts)

    def measure(
        self, source: FeatureSource, rows: NDArray[np.int64], experts: NDArray[np.int64], *, number: int
    ) -> None:
        """Set mean and std of the patch scores of each expert.

        Args:
            source: features adapted for the expert of each image.
            rows: (n,) held-out images; empty = mean 0 and std 1.
            experts: the expert of each image of the source.
            number: K.
        """
        self.unit_scale(number)
        if len(rows) == 0:
            return
        own = experts[rows]
        images = np.zeros(number)
        sums = np.zeros((number, 2))  # of the mean score of an image, and of its mean squared score
        (moments,) = per_image(source, self._moments, rows=rows, aligned=(torch.from_numpy(own),))
        np.add.at(images, own, 1)
        np.add.at(sums, own, moments.numpy())
        few = images < FEWEST_HELD_OUT
        sums[few] = sums.sum(axis=0)
        images[few] = len(rows)
        mean, square = (sums / images[:, None]).T  # (K,) each
        self.scale_mean = torch.from_numpy(mean).float()
        self.scale_std = torch.from_numpy(np.sqrt(np.maximum(square - mean**2, 1e-12))).float()

    def _moments(self, features: Tensor, experts: Tensor) -> Tensors:
        """Return the mean score and the mean squared score (B, 2) of images by their own expert (B,)."""
        flat = self.experts(features[:, None], experts[:, None]).flatten(1).double().numpy()  # (B, P)
        return (torch.from_numpy(np.stack([flat.mean(axis=1), (flat**2).mean(axis=1)], axis=1)),)

    def forward(self, features: Tensor, samples: Tensor, experts: Tensor) -> Tensor:
        """Return the scores of (B, D, h, w) with `statistics` (B, 2D) by experts (B, T), (B, T, V, h, w), on one scale.

        V is explained in `experts.base`.
        """
        scores: Tensor = self.experts(self.adaption(features, samples, experts), experts)
        mean, std = self.scale_mean[experts], self.scale_std[experts]  # (B, T) each
        return (scores - mean[..., None, None, None]) / std[..., None, None, None]


def adapt(adaption: Adaption, features: Tensor, experts: Tensor) -> Tensor:
    """Return training images adapted for their own experts (B,), (B, D, h, w)."""
    adapted: Tensor = adaption(features, statistics(features), experts[:, None])
    return adapted[:, 0]
