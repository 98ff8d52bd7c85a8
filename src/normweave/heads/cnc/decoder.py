"""Decoder that reconstructs the tokens of each level from the fused tokens of all levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.config import CNCConfig
from normweave.heads.cnc.gating import GatedExperts


class Decoded(NamedTuple):
    """Output of the decoder."""

    levels: tuple[Tensor, ...]  # each (B, N, D_l), in the order of the features' levels
    balance: Tensor  # scalar load-balance loss; 0 without experts


class Attention(nn.Module):
    """Multi-head attention: Wo softmax((Wq q)(Wk m)' / sqrt(d / heads)) Wv m.

    Args:
        width: d of the queries and of the output, split between the heads.
        memory: width of the keys' and values' input m.
    """

    def __init__(self, *, width: int, memory: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory, width)
        self.value = nn.Linear(memory, width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Attend from queries (B, N, d) to (B or 1, M, memory); return (B, N, d)."""
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(queries)), self._split(self.key(memory)), self._split(self.value(memory))
        )  # (B, heads, N, d / heads)
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return attended

    def _split(self, tokens: Tensor) -> Tensor:
        B, N, d = tokens.shape
        return tokens.view(B, N, self.heads, d // self.heads).transpose(1, 2)  # (B, heads, N, d / heads)


class Block(nn.Module):
    """A transformer block: x + Attention(LN x), then x + MLP(LN x)."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.attention = Attention(width=width, memory=width, heads=heads)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform (B, N, d)."""
        normed = self.before_attention(tokens)
        tokens = tokens + self.attention(normed, normed)
        outputs: Tensor = tokens + self.mlp(self.before_mlp(tokens))
        return outputs


class NormalityGuide(nn.Module):
    """Replace patches by mixtures of normal tokens: they attend to M tokens of the normal state.

        z <- residual z + Wo Attention(Wq LN(z), Wk T, Wv T),    T = LN(centred W LN(centred tokens))

    The tokens of one prompt are nearly parallel, so they are centred over the M tokens.

    Args:
        tokens: U, size of a token.
    """

    def __init__(self, config: CNCConfig, *, tokens: int) -> None:
        super().__init__()
        width = config.width
        self.residual = config.guide.residual
        self.project = nn.Linear(tokens, width)
        self.after = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width=width, memory=width, heads=config.heads)

    def memory(self, tokens: Tensor) -> Tensor:
        """Return the projected and centred tokens that keys and values are computed from: (M, U) -> (1, M, d)."""
        centred = tokens - tokens.mean(dim=0)
        projected: Tensor = self.project(F.layer_norm(centred, centred.shape[-1:]))  # (M, d)
        memory: Tensor = self.after(projected - projected.mean(dim=0))
        return memory[None]

    def forward(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """Return guided patches (B, N, d) from patches (B, N, d) and tokens (M, U)."""
        guided: Tensor = self.attention(self.norm(patches), self.memory(tokens))
        return guided + self.residual * patches if self.residual else guided


class Decoder(nn.Module):
    """Fuse the levels, apply the bottleneck, reconstruct each level, deepest first.

    Without experts, bottleneck, dropout and guide this is plain reverse distillation (Deng and Li 2022, arXiv
    2201.10703) with transformer blocks.

    Args:
        dims: D_l of each level.
        cells: N = h w.
    """

    def __init__(self, config: CNCConfig, *, dims: Sequence[int], cells: int) -> None:
        super().__init__()
        width, bottleneck = config.width, config.bottleneck
        self.dims = list(dims)
        self.dropout = config.dropout
        self.read = nn.ModuleList(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, width)) for D in dims)
        self.experts = GatedExperts(config.gating, width=width) if config.moe else None
        self.narrow = nn.Sequential(nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)) if bottleneck else None
        self.guide = NormalityGuide(config, tokens=width) if config.guide.tokens != "off" else None
        self.position = nn.Parameter(torch.zeros(cells, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(width=width, heads=config.heads) for _ in range(config.blocks))) for _ in dims
        )
        self.write = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, D)) for D in dims)

    def start(self, generator: torch.Generator) -> None:
        """Draw initial weights; linear layers as torch's default: uniform within 1 / sqrt(inputs)."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    bound = module.weight.shape[1] ** -0.5
                    module.weight.uniform_(-bound, bound, generator=generator)
                    module.bias.uniform_(-bound, bound, generator=generator)
            self.position.normal_(0, 0.02, generator=generator)
        if self.experts is not None:
            self.experts.start(generator)

    def forward(self, tokens: Tensor, guidance: Tensor | None, *, generator: torch.Generator | None = None) -> Decoded:
        """Decode (B, N, D) concatenated tokens of all levels.

        Args:
            guidance: (M, U) tokens of the normal state, for the guide.
            generator: draws dropout and the noise of the gate in training; None = neither.
        """
        levels = torch.split(tokens, self.dims, dim=2)
        z = torch.stack([read(level) for read, level in zip(self.read, levels, strict=True)]).sum(dim=0)
        if generator is not None and self.dropout:
            kept = torch.rand(z.shape, generator=generator).to(z.device) >= self.dropout
            z = z * kept / (1 - self.dropout)
        balance = z.new_zeros(())
        if self.experts is not None:
            z, balance = self.experts(z, generator=generator)
        if self.narrow is not None:
            z = self.narrow(z)
        if self.guide is not None and guidance is not None:
            z = self.guide(z, guidance)
        z = z + self.position
        decoded: list[Tensor] = []
        for blocks, write in zip(self.blocks, list(self.write)[::-1], strict=True):
            z = blocks(z)
            decoded.append(write(z))
        return Decoded(tuple(decoded[::-1]), balance)
