"""MSFlow: likelihood of each patch under coupled normalising flows at several scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.config import MSFlowConfig
from normweave.errors import ConfigError
from normweave.heads.base import Head, TrainingStage
from normweave.heads.grid import replace_border
from normweave.types import FitData, PatchScores

UNIT_SCALE = 2 * math.log(math.expm1(5))
"""0.1 softplus(g) with beta 0.5 is 1 for this g: initially a flow does not scale."""


class MSFlow(Head):
    """Asymmetrical parallel flows, a fusion flow, and aggregation of the likelihoods over the scales.

    Zhou et al. 2023 (arXiv 2308.15300). Level l of the features, at 1 / 2^l of the grid, passes `blocks + l *
    further_blocks` coupling blocks conditioned on the position (section 3.2). A fusion flow then exchanges information
    between the levels (3.3). Trained for the likelihood under N(0, I):

        L = sum_l |z_l|^2 / 2 - log |det dz/dx|

    With log p_l = -mean_c z_l^2 / 2 and P(m) = exp(m - max m), the map is the sum of P over the scales, and the image's
    score the mean of the most anomalous share of their product (3.4):

        map = max(A) - A,  A = sum_l up(P(log p_l));     score = mean of the top of 1 - P(sum_l up(log p_l))

    Our levels come on one grid: average pooling restores the paper's strides and sizes, at half the resolution. The
    loss is divided by the number of features of an image, so that the learning rate does not depend on it. The paper
    does not replace the scores of the border cells.

    Args:
        shape: (D, h, w) of the features.
        dims: D_l of each level, finest first; they add up to D. Empty = one level.

    Raises:
        ConfigError: the levels do not add up, or one has fewer than 2 channels.
    """

    def __init__(self, config: MSFlowConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()) -> None:
        super().__init__()
        dims = list(dims or shape[:1])
        if sum(dims) != shape[0] or min(dims) < 2:
            raise ConfigError(f"The levels' widths {dims} must add up to {shape[0]} channels, with 2 or more each.")
        self.config = config
        self.dims = dims
        self.grid = shape[1:]
        self.top = max(1, int(config.top * shape[1] * shape[2]))
        self.flow = ScaleFlows(config, dims=dims, grid=self.grid)
        self.eval()

    def begin(self, data: FitData) -> None:
        """Draw the initial weights."""
        self.flow.start(torch.Generator().manual_seed(data.seed))

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """Return one stage, which trains all flows."""
        return (LikelihoodStage(self),)

    def levels(self, features: Tensor) -> list[Tensor]:
        """Split (B, D, h, w) into levels on their own grids, (B, D_l, h_l, w_l)."""
        pairs = zip(torch.split(features, self.dims, dim=1), self.flow.grids, strict=True)
        return [F.adaptive_avg_pool2d(level, grid) for level, grid in pairs]

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        latents = self.flow(self.levels(features)).latents
        likelihoods = [-0.5 * latent.square().mean(dim=1) for latent in latents]  # (B, h_l, w_l)
        added = torch.stack([self._up(relative(one)) for one in likelihoods]).sum(dim=0)  # (B, h, w)
        border = self.config.border
        scores = replace_border(added.amax(dim=(1, 2), keepdim=True) - added, border, grid=self.grid)
        product = relative(torch.stack([self._up(one) for one in likelihoods]).sum(dim=0))  # (B, h, w)
        worst = replace_border(1 - product, border, grid=self.grid).flatten(1).topk(self.top, dim=1)
        return PatchScores(scores=scores, image_scores=worst.values.mean(dim=1), routing=None)

    def _up(self, grid: Tensor) -> Tensor:
        """Upsample (B, h_l, w_l) to (B, h, w)."""
        return F.interpolate(grid[:, None], size=self.grid, mode="bilinear", align_corners=False)[:, 0]


def relative(likelihoods: Tensor) -> Tensor:
    """Return likelihoods relative to the largest of each image, in (0, 1], from log-likelihoods (B, h, w)."""
    return (likelihoods - likelihoods.amax(dim=(1, 2), keepdim=True)).exp()


class Flowed(NamedTuple):
    """Output of the flows for a batch."""

    latents: list[Tensor]  # (B, D_l, h_l, w_l)
    log_determinant: Tensor  # (B,) of the Jacobian, over all levels


class ScaleFlows(nn.Module):
    """One flow for each level, then the fusion flow over all levels.

    Args:
        dims: D_l of each level, finest first.
        grid: (h, w) of the finest level.
    """

    def __init__(self, config: MSFlowConfig, *, dims: Sequence[int], grid: tuple[int, int]) -> None:
        super().__init__()
        levels = range(len(dims))
        self.grids = [(max(1, grid[0] >> level), max(1, grid[1] >> level)) for level in levels]
        self.parallel = nn.ModuleList(
            nn.ModuleList(
                Coupling(width=dims[level], condition=config.position, clamp=config.clamp)
                for _ in range(config.blocks + level * config.further_blocks)
            )
            for level in levels
        )
        self.fusion = Fusion(dims=dims, clamp=config.clamp)
        for level, (height, width) in enumerate(self.grids):
            encoding = position_encoding(config.position, height, width)  # follows from the size: not saved
            self.register_buffer(f"position{level}", encoding, persistent=False)

    def start(self, generator: torch.Generator) -> None:
        """Draw new weights and permutations."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, Coupling | Fusion):
                module.start(generator)

    def forward(self, levels: Sequence[Tensor]) -> Flowed:
        """Transform levels (B, D_l, h_l, w_l) to latents of the same shapes."""
        latents = []
        total = levels[0].new_zeros(levels[0].shape[0])  # len() would fix the batch size in the ONNX graph
        for number, (level, blocks) in enumerate(zip(levels, self.parallel, strict=True)):
            position = self.get_buffer(f"position{number}")[None].expand(level.shape[0], -1, -1, -1)
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                level, log_determinant = block(level, position)
                total = total + log_determinant
            latents.append(level)
        fused, log_determinant = self.fusion(latents)
        return Flowed(fused, total + log_determinant)


class Coupling(nn.Module):
    """Affine coupling, followed by a scale and an offset for each channel and a permutation of the channels.

    FrEIA's AllInOneBlock (Ardizzone et al. 2018-2022) with hard permutation, which the paper uses. With (s, t) = 0.1
    subnet([x_1, condition]):

        y = R [g [x_1, x_2 exp(alpha tanh s) + t] + b],   g = 0.1 softplus(.)

    Reimplemented: FrEIA's modules cannot be exported by torch.export, and loading a bundle would need FrEIA.
    """

    order: Tensor  # (D,) int64: channel i of the output is channel order[i]

    def __init__(self, *, width: int, condition: int, clamp: float) -> None:
        super().__init__()
        self.parts = [width - width // 2, width // 2]
        self.clamp = clamp
        self.subnet = Subnet(width=self.parts[0] + condition, out=2 * self.parts[1])
        self.scale = nn.Parameter(torch.full((width, 1, 1), UNIT_SCALE))
        self.offset = nn.Parameter(torch.zeros(width, 1, 1))
        self.register_buffer("order", torch.arange(width))

    def start(self, generator: torch.Generator) -> None:
        """Draw the permutation; initial scales and offsets are the identity."""
        nn.init.constant_(self.scale, UNIT_SCALE)
        nn.init.zeros_(self.offset)
        self.order = torch.randperm(len(self.order), generator=generator).to(self.order.device)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return the transformed (B, D, h, w) and the log-determinant of the Jacobian, (B,)."""
        fixed, free = torch.split(x, self.parts, dim=1)
        s, t = (0.1 * self.subnet(torch.cat([fixed, condition], dim=1))).chunk(2, dim=1)
        s = self.clamp * s.tanh()
        g = 0.1 * F.softplus(self.scale, beta=0.5)  # (D, 1, 1)
        y = torch.cat([fixed, free * s.exp() + t], dim=1) * g + self.offset
        log_determinant = s.sum(dim=(1, 2, 3)) + g.log().sum() * x.shape[2] * x.shape[3]
        return y[:, self.order], log_determinant


class Subnet(nn.Module):
    """3 x 3 convolution, layer norm over the channels, ReLU, 3 x 3 convolution."""

    def __init__(self, *, width: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, h, w) to (B, out, h, w)."""
        inner = self.norm(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        result: Tensor = self.second(inner.relu())
        return result


class Fusion(nn.Module):
    """Two couplings, in each of which one half of all levels together transforms the other halves.

    With x_l permuted and split into a_l, b_l:

        a'_l = a_l exp(s_l(b)) + t_l(b),   b'_l = b_l exp(s'_l(a')) + t'_l(a'),   s = 0.636 alpha atan(. / alpha)
    """

    def __init__(self, *, dims: Sequence[int], clamp: float) -> None:
        super().__init__()
        self.clamp = clamp
        self.first = [width // 2 for width in dims]
        self.second = [width - width // 2 for width in dims]
        self.of_second = CrossScale(inputs=self.second, outputs=self.first)
        self.of_first = CrossScale(inputs=self.first, outputs=self.second)
        for level, width in enumerate(dims):
            self.register_buffer(f"order{level}", torch.arange(width))

    def start(self, generator: torch.Generator) -> None:
        """Draw the permutations."""
        for level, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            order = torch.randperm(first + second, generator=generator)
            setattr(self, f"order{level}", order.to(self.get_buffer(f"order{level}").device))

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return the transformed levels (B, D_l, h_l, w_l) and the log-determinant of the Jacobian, (B,)."""
        mixed = [level[:, self.get_buffer(f"order{number}")] for number, level in enumerate(levels)]
        halves = [
            torch.split(level, [first, second], dim=1)
            for level, first, second in zip(mixed, self.first, self.second, strict=True)
        ]
        a, b = [half[0] for half in halves], [half[1] for half in halves]
        a, first_log_determinant = self._transform(a, self.of_second(b))
        b, second_log_determinant = self._transform(b, self.of_first(a))
        fused = [torch.cat(pair, dim=1) for pair in zip(a, b, strict=True)]
        return fused, first_log_determinant + second_log_determinant

    def _transform(
        self, halves: Sequence[Tensor], parameters: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[list[Tensor], Tensor]:
        logs = [self.clamp * 0.636 * (s / self.clamp).atan() for s, _ in parameters]
        outputs = [half * s.exp() + t for half, s, (_, t) in zip(halves, logs, parameters, strict=True)]
        return outputs, torch.stack([s.sum(dim=(1, 2, 3)) for s in logs]).sum(dim=0)


class CrossScale(nn.Module):
    """Coupling parameters of each level from all levels: pooled to the coarsest grid, mixed and upsampled.

    Outputs are multiplied by 0.1, so that the fusion is initially close to the identity.

    Args:
        inputs, outputs: number of channels of each level.
    """

    def __init__(self, *, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        super().__init__()
        self.inputs = list(inputs)
        inner = max(4, sum(inputs) // 4)  # a layer norm over one number would be constant
        self.squeeze = nn.Conv2d(sum(inputs), inner, 3, padding=1)
        self.norm = nn.LayerNorm(inner)
        self.spread = nn.Conv2d(inner, sum(inputs), 3, padding=1)
        self.scale, self.shift = (
            nn.ModuleList(nn.Conv2d(width, out, 3, padding=1) for width, out in zip(inputs, outputs, strict=True))
            for _ in range(2)
        )

    def forward(self, levels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return (s, t), (B, outputs_l, h_l, w_l) each, from halves (B, inputs_l, h_l, w_l)."""
        small = (levels[-1].shape[2], levels[-1].shape[3])
        together = torch.cat([F.adaptive_avg_pool2d(level, small) for level in levels], dim=1)
        mixed = self.norm(self.squeeze(together).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).relu()
        shared = torch.split(self.spread(mixed).relu(), self.inputs, dim=1)  # (B, inputs_l, small)
        parameters = []
        for level, coarse, scale, shift in zip(levels, shared, self.scale, self.shift, strict=True):
            context = level + F.interpolate(coarse, size=level.shape[2:], mode="bilinear", align_corners=False)
            parameters.append((0.1 * scale(context), 0.1 * shift(context)))
        return parameters


def position_encoding(channels: int, height: int, width: int) -> Tensor:
    """Return sines and cosines of the column (first half of the channels) and of the row, (channels, h, w).

    Wang and Liu 2019, arXiv 1908.11415, Eq. 4-7: frequencies 10000^(-2k / (channels / 2)).
    """
    half = channels // 2
    frequency = torch.exp(torch.arange(0, half, 2) * (-math.log(10_000) / half))  # (half / 2,)
    column = torch.arange(width)[None] * frequency[:, None]  # (half / 2, w)
    row = torch.arange(height)[None] * frequency[:, None]  # (half / 2, h)
    encoding = torch.empty(channels, height, width)
    encoding[0:half:2] = column.sin()[:, None]
    encoding[1:half:2] = column.cos()[:, None]
    encoding[half::2] = row.sin()[:, :, None]
    encoding[half + 1 :: 2] = row.cos()[:, :, None]
    return encoding


class LikelihoodStage(TrainingStage):
    """Train the flows for the likelihood of normal images."""

    name = "msflow"
    gradient_clip = 2.0
    final_rate = 0.1

    def __init__(self, head: MSFlow) -> None:
        super().__init__(head.flow, head.config.training)
        self.head = head

    def optimiser(self) -> torch.optim.Optimizer:
        """Return Adam, as in the paper."""
        return torch.optim.Adam(self.module.parameters(), lr=self.learning_rate)

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Return the negative log-likelihood per feature up to a constant: (sum |z|^2 / 2 - log |det|) / count."""
        flowed = self.head.flow(self.head.levels(features))
        energies = [0.5 * latent.square().sum(dim=(1, 2, 3)) for latent in flowed.latents]
        energy = torch.stack(energies).sum(dim=0)
        count = sum(latent[0].numel() for latent in flowed.latents)
        return {"loss": (energy - flowed.log_determinant).mean() / count}
