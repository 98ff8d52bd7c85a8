"""A gated mixture of experts over patch tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.config import GatingConfig


class Gated(NamedTuple):
    """Output of the mixture."""

    tokens: Tensor  # (B, N, d)
    balance: Tensor  # scalar load-balance loss, 0 if all experts are used equally


class Gate(nn.Module):
    """Gating network: selects experts for each token.

    Shazeer et al. 2017 (arXiv 1701.06538), Eq. 3-5:

        G(t) = softmax(keep_top_k(H(t), k)),    H(t) = t W_g + eps softplus(t W_noise),    eps ~ N(0, 1).

    The noise is drawn in training only. Logits have 32 bits also under autocast: with 16 bits, experts tie.

    Args:
        width: d.
    """

    def __init__(self, config: GatingConfig, *, width: int) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.gate = nn.Parameter(torch.zeros(width, config.experts))
        self.noise = nn.Parameter(torch.zeros(width, config.experts))

    def start(self, generator: torch.Generator) -> None:
        """Draw initial weights with nearly equal logits; all experts have the same amount of noise."""
        with torch.no_grad():
            self.gate.normal_(0, 0.02, generator=generator)
            self.noise.zero_()

    def forward(self, tokens: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return weights and logits of tokens (N, d), both (N, E). Rows of weights add up to 1 and have k nonzeros.

        Args:
            generator: draws the noise; None = no noise.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            logits = tokens.float() @ self.gate  # (N, E)
            if generator is not None:
                eps = torch.randn(logits.shape, generator=generator).to(logits.device)
                logits = logits + eps * F.softplus(tokens.float() @ self.noise)
        best, chosen = logits.topk(self.top_k, dim=-1)  # (N, k)
        # A softmax over the kept logits equals Eq. 3, in which the other logits are -inf.
        return torch.zeros_like(logits).scatter(-1, chosen, best.softmax(dim=-1)), logits


def balance(weights: Tensor, logits: Tensor) -> Tensor:
    """Return the load-balance loss E sum_e f_e p_e - 1, which is 0 if all experts are used equally.

    Fedus et al. 2022 (arXiv 2101.03961), Eq. 4-6, less 1. f_e is the share of expert e in all assignments, without
    gradient; p_e is the mean over tokens of the softmax of the logits. Negative if the most used experts have the
    smaller probabilities.

    Args:
        weights: (N, E), 0 for experts that are not used.
        logits: (N, E).
    """
    used = (weights > 0).to(logits.dtype)
    share = used.sum(dim=0) / used.sum()  # (E,) f
    probability = logits.softmax(dim=-1).mean(dim=0)  # (E,) p
    return logits.shape[-1] * (share * probability).sum() - 1


class GatedExperts(nn.Module):
    """z + sum_e w_e Expert_e(LN(z)), the experts d -> 2d -> GELU -> d.

    In training each expert processes the tokens routed to it. Without gradients all experts process all tokens, and the
    weights of unused experts are 0: the same result, which can be exported.

    Args:
        width: d.
    """

    def __init__(self, config: GatingConfig, *, width: int) -> None:
        super().__init__()
        experts = config.experts
        self.norm = nn.LayerNorm(width)
        self.gate = Gate(config, width=width)
        self.weight_in = nn.Parameter(torch.zeros(experts, width, 2 * width))
        self.bias_in = nn.Parameter(torch.zeros(experts, 1, 2 * width))
        self.weight_out = nn.Parameter(torch.zeros(experts, 2 * width, width))
        self.bias_out = nn.Parameter(torch.zeros(experts, 1, width))

    def start(self, generator: torch.Generator) -> None:
        """Draw initial weights that differ between experts and change the tokens little."""
        self.gate.start(generator)
        width = self.weight_in.shape[1]
        with torch.no_grad():
            self.weight_in.normal_(0, width**-0.5, generator=generator)
            self.weight_out.normal_(0, 0.5 * (2 * width) ** -0.5, generator=generator)
            self.bias_in.zero_()
            self.bias_out.zero_()

    def forward(self, tokens: Tensor, *, generator: torch.Generator | None = None) -> Gated:
        """Transform (B, N, d) tokens; `generator` draws the noise of the gate, None = no noise."""
        flat = self.norm(tokens).flatten(0, 1)  # (B N, d)
        weights, logits = self.gate(flat, generator=generator)  # (B N, E)
        mixed = self._routed(flat, weights) if torch.is_grad_enabled() else self._dense(flat, weights)
        return Gated(tokens + mixed.view_as(tokens), balance(weights, logits))

    def _dense(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Return sum_e w_e Expert_e(t), (N, d), from tokens (N, d) and weights (N, E)."""
        hidden = torch.baddbmm(self.bias_in, tokens.expand(len(self.weight_in), -1, -1), self.weight_in)
        outputs = torch.baddbmm(self.bias_out, F.gelu(hidden), self.weight_out)  # (E, N, d)
        return (outputs * weights.T[..., None]).sum(dim=0)

    def _routed(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Return what `_dense` returns, but compute each expert on the tokens with a nonzero weight only."""
        mixed = weights.new_zeros(tokens.shape)
        for expert, weight in enumerate(weights.T):
            rows = weight.nonzero()[:, 0]
            hidden = torch.addmm(self.bias_in[expert], tokens[rows], self.weight_in[expert])
            outputs = torch.addmm(self.bias_out[expert], F.gelu(hidden), self.weight_out[expert])
            mixed = mixed.index_add(0, rows, outputs * weight[rows, None])
        return mixed
