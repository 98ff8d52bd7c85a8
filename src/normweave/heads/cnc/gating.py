"""A gated mixture of experts over patch tokens: each pattern of patches has its own way through the bottleneck."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gated(NamedTuple):
    """What the experts made of the tokens."""

    tokens: Tensor  # (B, N, d)
    balance: Tensor  # scalar, 0 where all experts are asked alike


class Gate(nn.Module):
    """Which experts each token is sent to.

    Shazeer et al. 2017 (arXiv 1701.06538), Eq. 3-5:

        G(t) = softmax(keep_top_k(H(t), k)),    H(t) = t W_g + eps softplus(t W_noise),    eps ~ N(0, 1).

    The noise is drawn in training only. Logits are of 32 bits under autocast too: in 16, experts tie.

    Args:
        width: d.
        experts: E.
        top_k: k, 1 <= k <= E.
    """

    def __init__(self, *, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Parameter(torch.zeros(width, experts))
        self.noise = nn.Parameter(torch.zeros(width, experts))

    def start(self, generator: torch.Generator) -> None:
        """Draw new weights: nearly all experts alike, and as much noise for each."""
        with torch.no_grad():
            self.gate.normal_(0, 0.02, generator=generator)
            self.noise.zero_()

    def forward(self, tokens: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Weights and logits of tokens (N, d), both (N, E); rows of weights add up to 1, k of them are not 0.

        Args:
            generator: of the noise; None = without.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            logits = tokens.float() @ self.gate  # (N, E)
            if generator is not None:
                eps = torch.randn(logits.shape, generator=generator).to(logits.device)
                logits = logits + eps * F.softplus(tokens.float() @ self.noise)
        best, chosen = logits.topk(self.top_k, dim=-1)  # (N, k)
        # A softmax over the kept logits equals Eq. 3, where the others are -inf and weigh 0.
        return torch.zeros_like(logits).scatter(-1, chosen, best.softmax(dim=-1)), logits


def balance(weights: Tensor, logits: Tensor) -> Tensor:
    """How unevenly the experts are asked: E sum_e f_e p_e - 1, which is 0 where they are asked alike.

    Fedus et al. 2022 (arXiv 2101.03961), Eq. 4-6, less 1. f_e is the share of all questions that expert e is asked,
    which has no gradient, p_e the mean over tokens of the softmax of the logits. Below 0 where those who are asked most
    are the less likely ones.

    Args:
        weights: (N, E), 0 for experts not asked.
        logits: (N, E).
    """
    asked = (weights > 0).to(logits.dtype)
    share = asked.sum(dim=0) / asked.sum()  # (E,) f
    likely = logits.softmax(dim=-1).mean(dim=0)  # (E,) p
    return logits.shape[-1] * (share * likely).sum() - 1


class GatedExperts(nn.Module):
    """z + sum_e w_e Expert_e(LN(z)), the experts d -> 2d -> GELU -> d as one batched product.

    All experts see all tokens and the gate's weights are 0 for those not asked: with the few small experts of CNC this
    needs no sorting of tokens, and exports.

    Args:
        width: d.
        experts: E.
        top_k: experts asked a token.
    """

    def __init__(self, *, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = Gate(width=width, experts=experts, top_k=top_k)
        self.weight_in = nn.Parameter(torch.zeros(experts, width, 2 * width))
        self.bias_in = nn.Parameter(torch.zeros(experts, 1, 2 * width))
        self.weight_out = nn.Parameter(torch.zeros(experts, 2 * width, width))
        self.bias_out = nn.Parameter(torch.zeros(experts, 1, width))

    def start(self, generator: torch.Generator) -> None:
        """Draw new weights: experts differ from the first step on, and change the tokens little."""
        self.gate.start(generator)
        width = self.weight_in.shape[1]
        with torch.no_grad():
            self.weight_in.normal_(0, width**-0.5, generator=generator)
            self.weight_out.normal_(0, 0.5 * (2 * width) ** -0.5, generator=generator)
            self.bias_in.zero_()
            self.bias_out.zero_()

    def forward(self, tokens: Tensor, *, generator: torch.Generator | None = None) -> Gated:
        """(B, N, d) to the same; `generator` draws the gate's noise, None = without."""
        read = self.norm(tokens)
        flat = read.flatten(0, 1)  # (B N, d)
        weights, logits = self.gate(flat, generator=generator)  # (B N, E)
        # (E, B N, 2d), then (E, B N, d)
        hidden = F.gelu(torch.baddbmm(self.bias_in, flat.expand(len(self.weight_in), -1, -1), self.weight_in))
        said = torch.baddbmm(self.bias_out, hidden, self.weight_out)
        mixed = (said * weights.T[..., None]).sum(dim=0)  # (B N, d)
        return Gated(tokens + mixed.view_as(tokens), balance(weights, logits))
