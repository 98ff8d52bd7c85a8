"""What holds the decoder to the normal: a space shared with text, and losses in it.

The paper (arXiv 2501.00346) names cross-modal feature distillation and normality promotion; its formulas are not at
hand, so these are ours. Axes: B images, L levels, N places, J numbers of the joint space, P prompts, the normal ones
first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.types import JointMaps


class JointSpace(nn.Module):
    """From the standardised tokens of each level into the space that images share with text; nothing here learns.

    The formula is that of `types.JointMaps`, after the tokens have been brought back to their own scale.

    Args:
        dims: D_l of each level.
    """

    mean: Tensor  # (D,) of the raw features
    deviation: Tensor  # (D,)
    weight: Tensor  # (D, J), that of all levels one under the other
    bias: Tensor  # (L, J)
    layer_norm: Tensor  # (), 1 where the pair normalises each token, else 0

    def __init__(self, *, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = list(dims)
        self.register_buffer("mean", torch.zeros(sum(dims)))
        self.register_buffer("deviation", torch.ones(sum(dims)))
        self.register_buffer("weight", torch.zeros(sum(dims), 1))
        self.register_buffer("bias", torch.zeros(len(self.dims), 1))
        self.register_buffer("layer_norm", torch.zeros(()))

    def take(self, maps: JointMaps, *, mean: Tensor, deviation: Tensor) -> None:
        """Take over the pair's ways into the space, and the scale of the raw features, (D,) each."""
        self.mean, self.deviation = mean.clone(), deviation.clone()
        self.weight = torch.cat(maps.weights)
        self.bias = torch.stack(maps.biases)
        self.layer_norm = torch.tensor(float(maps.layer_norm))

    def forward(self, levels: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
        """Tokens of each level, (B, N, D_l) each, to those of the chosen ones, (B, chosen, N, J) of length one."""
        means, deviations = torch.split(self.mean, self.dims), torch.split(self.deviation, self.dims)
        weights = torch.split(self.weight, self.dims)
        joint = []
        for level in chosen:
            raw = levels[level] * deviations[level] + means[level]  # (B, N, D_l)
            centre = raw.mean(dim=-1, keepdim=True) * self.layer_norm
            spread = (raw.var(dim=-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            token = (raw - centre) / (1 + (spread - 1) * self.layer_norm)
            joint.append(F.normalize(token @ weights[level] + self.bias[level], dim=-1))
        return torch.stack(joint, dim=1)


def state_logits(similarity: Tensor, *, normal: int, temperature: float) -> Tensor:
    """How normal and how abnormal: log sum_p exp(s_p / temperature) over the prompts of each state.

    Args:
        similarity: (..., P) cosines to the prompts.
        normal: how many of the prompts, the first ones, say normal.

    Returns:
        (..., 2): normal, abnormal. A softmax over them is the likelihood of the state.
    """
    scaled = similarity / temperature
    return torch.stack([scaled[..., :normal].logsumexp(-1), scaled[..., normal:].logsumexp(-1)], dim=-1)


def margin(similarity: Tensor, *, normal: int, temperature: float) -> Tensor:
    """How much more abnormal than normal, log odds: (..., P) to (...)."""
    said = state_logits(similarity, normal=normal, temperature=temperature)
    return said[..., 1] - said[..., 0]


def distances(levels: Sequence[Tensor], decoded: Sequence[Tensor]) -> Tensor:
    """1 - cos(E_l, D_l) of each place, (B, L, N), for (B, N, D_l) each."""
    return torch.stack(
        [1 - F.cosine_similarity(E, D, dim=-1) for E, D in zip(levels, decoded, strict=True)], dim=1
    )


def prompt_loss(
    normal_likeness: Tensor, abnormal_likeness: Tensor | None, *, normal: int, temperature: float
) -> Tensor:
    """What teaches the prompts: CE of normal patches to the normal state, and of damaged ones to the abnormal state.

    Args:
        normal_likeness: (..., P) of patches of normal images.
        abnormal_likeness: (..., P) of damaged patches; None = there are none.
    """
    of_normal = -state_logits(normal_likeness, normal=normal, temperature=temperature).log_softmax(-1)
    loss = of_normal[..., 0].mean()
    if abnormal_likeness is not None:
        said = state_logits(abnormal_likeness, normal=normal, temperature=temperature)
        loss = loss - said.log_softmax(-1)[..., 1].mean()
    return loss


def distillation(encoded: Tensor, decoded: Tensor) -> Tensor:
    """Cross-modal feature distillation: decoded patches are as like each prompt as the encoded ones.

    mean |s(D) - s(E)| over (B, L, N, P) similarityes, in which the prompts have no gradient.
    """
    return (decoded - encoded).abs().mean()


def promotion(decoded: Tensor, *, normal: int, temperature: float) -> Tensor:
    """Normality promotion: CE of decoded patches to the normal state, (B, L, N, P) similarityes to a scalar."""
    said = state_logits(decoded, normal=normal, temperature=temperature)
    return -said.log_softmax(-1)[..., 0].mean()
