"""The joint space of image patches and text prompts, and the losses in it.

The paper (arXiv 2501.00346) names cross-modal feature distillation and normality promotion. We had no access to its
formulas, so these are our own. Axes: B images, L levels, N positions, J dimensions of the joint space, P prompts, the
normal ones first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.types import JointMaps


class JointSpace(nn.Module):
    """Fixed projection of the standardised tokens of each level into the joint space of images and text.

    The formula is that of `types.JointMaps`, applied to the tokens in their raw scale.

    Args:
        dims: D_l of each level.
    """

    mean: Tensor  # (D,) of the raw features
    std: Tensor  # (D,)
    weight: Tensor  # (D, J), W_l of all levels concatenated
    bias: Tensor  # (L, J)
    layer_norm: Tensor  # (1,) if the pair normalises each token, else (0,): a shape, so that export has no branch

    def __init__(self, *, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = list(dims)
        self.register_buffer("mean", torch.zeros(sum(dims)))
        self.register_buffer("std", torch.ones(sum(dims)))
        self.register_buffer("weight", torch.zeros(sum(dims), 1))
        self.register_buffer("bias", torch.zeros(len(self.dims), 1))
        self.register_buffer("layer_norm", torch.zeros(0))

    def fit(self, maps: JointMaps, *, mean: Tensor, std: Tensor) -> None:
        """Store the maps of a vision-language pair, and the mean and std of the raw features, (D,) each."""
        self.mean, self.std = mean.clone(), std.clone()
        self.weight = torch.cat(maps.weights)
        self.bias = torch.stack(maps.biases)
        self.layer_norm = torch.ones(int(maps.layer_norm))

    def forward(self, levels: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
        """Project the tokens of the chosen levels, (B, N, D_l) each, to (B, chosen, N, J) of length one."""
        means, stds = torch.split(self.mean, self.dims), torch.split(self.std, self.dims)
        weights = torch.split(self.weight, self.dims)
        joint = []
        for level in chosen:
            weight, bias = weights[level], self.bias[level]
            if len(self.layer_norm):
                raw = levels[level] * stds[level] + means[level]  # (B, N, D_l)
                projected = F.layer_norm(raw, raw.shape[-1:]) @ weight + bias
            else:  # the same projection, without computing the raw tokens
                projected = levels[level] @ (stds[level][:, None] * weight) + (means[level] @ weight + bias)
            joint.append(F.normalize(projected, dim=-1))
        return torch.stack(joint, dim=1)


def state_logits(similarity: Tensor, *, normal: int, temperature: float) -> Tensor:
    """Return the logits of the states normal and abnormal: log sum_p exp(s_p / temperature) over their prompts.

    Args:
        similarity: (..., P) cosines to the prompts.
        normal: number of normal prompts, which come first.

    Returns:
        (..., 2): normal, abnormal. A softmax over them is the likelihood of the state.
    """
    scaled = similarity / temperature
    return torch.stack([scaled[..., :normal].logsumexp(-1), scaled[..., normal:].logsumexp(-1)], dim=-1)


def margin(similarity: Tensor, *, normal: int, temperature: float) -> Tensor:
    """Return the log odds of abnormal against normal, (...), from cosines (..., P)."""
    logits = state_logits(similarity, normal=normal, temperature=temperature)
    return logits[..., 1] - logits[..., 0]


def distances(levels: Sequence[Tensor], decoded: Sequence[Tensor]) -> Tensor:
    """Return 1 - cos(E_l, D_l) at each position, (B, L, N), of encoded and decoded tokens (B, N, D_l) per level."""
    pairs = zip(levels, decoded, strict=True)
    # F.cosine_similarity normalises D before the product, which takes twice as long with gradients.
    return torch.stack([1 - (F.normalize(E, dim=-1) * D).sum(-1) / D.norm(dim=-1).clamp_min(1e-8) for E, D in pairs], 1)


def prompt_loss(
    normal_similarity: Tensor, abnormal_similarity: Tensor | None, *, normal: int, temperature: float
) -> Tensor:
    """Return the cross entropy of normal patches to the normal state plus that of anomalous ones to the abnormal state.

    Args:
        normal_similarity: (..., P) of patches of normal images.
        abnormal_similarity: (..., P) of patches of synthetic anomalies; None if there are none.
    """
    log_likelihood = state_logits(normal_similarity, normal=normal, temperature=temperature).log_softmax(-1)
    loss = -log_likelihood[..., 0].mean()
    if abnormal_similarity is not None:
        logits = state_logits(abnormal_similarity, normal=normal, temperature=temperature)
        loss = loss - logits.log_softmax(-1)[..., 1].mean()
    return loss


def distillation(encoded: Tensor, decoded: Tensor) -> Tensor:
    """Return the cross-modal feature distillation loss: mean |s(D) - s(E)| of cosines (B, L, N, P) to the prompts.

    It trains decoded patches to be as similar to each prompt as the encoded ones. The prompts get no gradient.
    """
    return (decoded - encoded).abs().mean()


def promotion(decoded: Tensor, *, normal: int, temperature: float) -> Tensor:
    """Return the normality promotion loss: the mean cross-entropy of decoded patches to the normal state.

    Args:
        decoded: (B, L, N, P) cosines of decoded patches to the prompts.
    """
    logits = state_logits(decoded, normal=normal, temperature=temperature)
    return -logits.log_softmax(-1)[..., 0].mean()
