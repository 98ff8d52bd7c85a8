"""How unlikely each patch is under normalising flows at several scales that hear each other (MSFlow)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.errors import ConfigError
from normweave.heads import state
from normweave.heads.base import Head, TrainingStage
from normweave.heads.grid import replace_border
from normweave.types import FitData, PatchScores

UNIT_SCALE = 2 * math.log(math.expm1(5))
"""0.1 softplus(g) with beta 0.5 is 1 here: a new flow changes no scale."""


class MSFlow(Head):
    """Asymmetrical parallel flows, a fusion flow, and likelihoods put together over the scales.

    Zhou et al. 2023 (arXiv 2308.15300). Level l of the features, at 1 / 2^l of the grid, passes `blocks + l *
    further_blocks` coupling blocks that are told the place (section 3.2); a fusion flow then lets the levels change
    each other (3.3). Trained for the likelihood under N(0, I):

        L = sum_l |z_l|^2 / 2 - log |det dz/dx|

    With log p_l = -mean_c z_l^2 / 2 and P(m) = exp(m - max m), the map is the sum of P over the scales, and the image's
    score the mean of the most anomalous share of their product (3.4):

        map = max(A) - A,  A = sum_l up(P(log p_l));     score = mean of the top of 1 - P(sum_l up(log p_l))

    Our levels come on one grid: the paper's strides and sizes are had back by averaging, at half the resolution as
    there. The loss is divided by how many numbers an image has, so that the learning rate does not depend on it.

    Args:
        shape: (D, h, w) of the features.
        dims: D_l of each level, finest first; they add up to D.
        blocks: of the finest level.
        further_blocks: that each coarser level has more.
        position: numbers that say the place, a multiple of 4.
        clamp: alpha; a coupling scales by at most exp(clamp).
        top: share of the places that the image's score is the mean of.
        epochs, batch_images, learning_rate, patience: of the stage.
        border: outermost cells that take the score of their inner neighbours (ours).

    Raises:
        ConfigError: the levels do not add up, or one is too narrow to be coupled.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        dims: Sequence[int],
        blocks: int,
        further_blocks: int,
        position: int,
        clamp: float,
        top: float,
        epochs: int,
        batch_images: int,
        learning_rate: float,
        patience: int,
        border: int,
    ) -> None:
        super().__init__()
        if sum(dims) != shape[0] or min(dims) < 2:
            raise ConfigError(
                f"The levels' widths {list(dims)} must add up to {shape[0]} channels, with 2 or more each."
            )
        self.subclass_names: tuple[str, ...] = ()
        self.dims = list(dims)
        self.grid = shape[1:]
        self.top = max(1, int(top * shape[1] * shape[2]))
        self.epochs = epochs
        self.batch_images = batch_images
        self.learning_rate = learning_rate
        self.patience = patience
        self.border = border
        self.flow = ScaleFlows(
            dims=dims,
            grids=[(max(1, shape[1] >> level), max(1, shape[2] >> level)) for level in range(len(dims))],
            blocks=[blocks + level * further_blocks for level in range(len(dims))],
            position=position,
            clamp=clamp,
        )
        self.eval()

    def begin(self, data: FitData) -> None:
        """Draw the initial weights."""
        self.flow.start(torch.Generator().manual_seed(data.seed))

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """One."""
        return (LikelihoodStage(self),)

    def finish(self, data: FitData) -> None:
        """Nothing is left to do."""

    def levels(self, features: Tensor) -> list[Tensor]:
        """(B, D, h, w) to the levels on their own grids, (B, D_l, h_l, w_l)."""
        pairs = zip(torch.split(features, self.dims, dim=1), self.flow.grids, strict=True)
        return [F.adaptive_avg_pool2d(level, grid) for level, grid in pairs]

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        latents = self.flow(self.levels(features)).latents
        likelihoods = [-0.5 * latent.square().mean(dim=1) for latent in latents]  # (B, h_l, w_l)
        added = torch.stack([self._up(relative(one)) for one in likelihoods]).sum(dim=0)  # (B, h, w)
        scores = replace_border(
            added.amax(dim=(1, 2), keepdim=True) - added, self.border, grid=self.grid
        )  # (B, h, w)
        product = relative(torch.stack([self._up(one) for one in likelihoods]).sum(dim=0))  # (B, h, w)
        worst = replace_border(1 - product, self.border, grid=self.grid).flatten(1).topk(self.top, dim=1)
        return PatchScores(scores=scores, image_scores=worst.values.mean(dim=1), routing=None)

    def _up(self, grid: Tensor) -> Tensor:
        """(B, h_l, w_l) to (B, h, w)."""
        return F.interpolate(grid[:, None], size=self.grid, mode="bilinear", align_corners=False)[:, 0]

    def state(self) -> dict[str, Tensor]:
        """Weights and permutations."""
        return state.state(self)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take them over."""
        state.load_state(self, tensors)


def relative(likelihoods: Tensor) -> Tensor:
    """Logarithms (B, h, w) to shares of the likeliest place of each image, in (0, 1]."""
    return (likelihoods - likelihoods.amax(dim=(1, 2), keepdim=True)).exp()


class Flowed(NamedTuple):
    """What flows make of a batch."""

    latents: list[Tensor]  # (B, D_l, h_l, w_l)
    log_determinant: Tensor  # (B,) of the Jacobian, over all levels


class ScaleFlows(nn.Module):
    """A flow for each level, then one over all.

    Args:
        dims, grids, blocks: of each level, finest first.
        position, clamp: as in `MSFlow`.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        grids: Sequence[tuple[int, int]],
        blocks: Sequence[int],
        position: int,
        clamp: float,
    ) -> None:
        super().__init__()
        self.grids = list(grids)
        self.parallel = nn.ModuleList(
            nn.ModuleList(Coupling(width=width, condition=position, clamp=clamp) for _ in range(count))
            for width, count in zip(dims, blocks, strict=True)
        )
        self.fusion = Fusion(dims=dims, clamp=clamp)
        for level, (height, width) in enumerate(grids):
            encoding = position_encoding(position, height, width)  # known from the size: not saved
            self.register_buffer(f"place{level}", encoding, persistent=False)

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
        """Levels (B, D_l, h_l, w_l) to latents of the same shapes."""
        latents = []
        total = levels[0].new_zeros(levels[0].shape[0])  # len() would fix the batch's size in the graph
        for number, (level, blocks) in enumerate(zip(levels, self.parallel, strict=True)):
            place = self.get_buffer(f"place{number}")[None].expand(level.shape[0], -1, -1, -1)
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                level, log_determinant = block(level, place)
                total = total + log_determinant
            latents.append(level)
        fused, log_determinant = self.fusion(latents)
        return Flowed(fused, total + log_determinant)


class Coupling(nn.Module):
    """Affine coupling, a scale and an offset for each channel, and a permutation of the channels.

    FrEIA's AllInOneBlock (Ardizzone et al. 2018-2022) with hard permutation, which the paper uses. With (s, t) = 0.1
    subnet([x_1, condition]):

        y = R [g [x_1, x_2 exp(alpha tanh s) + t] + b],   g = 0.1 softplus(.)

    Written anew: FrEIA's graphs do not pass through torch.export, and a bundle would need it to be loaded.
    """

    order: Tensor  # (D,) int64: channel i of the result is channel order[i]

    def __init__(self, *, width: int, condition: int, clamp: float) -> None:
        super().__init__()
        self.parts = [width - width // 2, width // 2]
        self.clamp = clamp
        self.subnet = Subnet(width=self.parts[0] + condition, out=2 * self.parts[1])
        self.scale = nn.Parameter(torch.full((width, 1, 1), UNIT_SCALE))
        self.offset = nn.Parameter(torch.zeros(width, 1, 1))
        self.register_buffer("order", torch.arange(width))

    def start(self, generator: torch.Generator) -> None:
        """Draw the permutation; scales and offsets change nothing yet."""
        nn.init.constant_(self.scale, UNIT_SCALE)
        nn.init.zeros_(self.offset)
        self.order = torch.randperm(len(self.order), generator=generator).to(self.order.device)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D, h, w) to the same shape, and the logarithm of the Jacobian's determinant, (B,)."""
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
        """(B, width, h, w) to (B, out, h, w)."""
        inner = self.norm(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        result: Tensor = self.second(inner.relu())
        return result


class Fusion(nn.Module):
    """Two couplings in which one half of every level decides, together, how the other halves change.

    With x_l permuted and cut into a_l, b_l:

        a'_l = a_l exp(s_l(b)) + t_l(b),   b'_l = b_l exp(s'_l(a')) + t'_l(a'),   s = 0.636 alpha atan(. / alpha)
    """

    def __init__(self, *, dims: Sequence[int], clamp: float) -> None:
        super().__init__()
        self.clamp = clamp
        self.first = [width // 2 for width in dims]
        self.second = [width - width // 2 for width in dims]
        self.of_second = CrossScale(given=self.second, wanted=self.first)
        self.of_first = CrossScale(given=self.first, wanted=self.second)
        for level, width in enumerate(dims):
            self.register_buffer(f"order{level}", torch.arange(width))

    def start(self, generator: torch.Generator) -> None:
        """Draw the permutations."""
        for level, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            order = torch.randperm(first + second, generator=generator)
            setattr(self, f"order{level}", order.to(self.get_buffer(f"order{level}").device))

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Levels (B, D_l, h_l, w_l) to the same shapes, and the logarithm of the Jacobian's determinant, (B,)."""
        mixed = [level[:, self.get_buffer(f"order{number}")] for number, level in enumerate(levels)]
        halves = [
            torch.split(level, [first, second], dim=1)
            for level, first, second in zip(mixed, self.first, self.second, strict=True)
        ]
        a, b = [half[0] for half in halves], [half[1] for half in halves]
        a, one = self._changed(a, self.of_second(b))
        b, other = self._changed(b, self.of_first(a))
        return [torch.cat(pair, dim=1) for pair in zip(a, b, strict=True)], one + other

    def _changed(
        self, halves: Sequence[Tensor], by: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[list[Tensor], Tensor]:
        logs = [self.clamp * 0.636 * (s / self.clamp).atan() for s, _ in by]
        changed = [half * s.exp() + t for half, s, (_, t) in zip(halves, logs, by, strict=True)]
        return changed, torch.stack([s.sum(dim=(1, 2, 3)) for s in logs]).sum(dim=0)


class CrossScale(nn.Module):
    """What all levels say to each: averaged to the coarsest grid, mixed there, and brought back.

    The last convolutions begin small, so that a new fusion changes little.
    """

    def __init__(self, *, given: Sequence[int], wanted: Sequence[int]) -> None:
        super().__init__()
        self.given = list(given)
        inner = max(4, sum(given) // 4)  # a layer norm over one number says nothing
        self.squeeze = nn.Conv2d(sum(given), inner, 3, padding=1)
        self.norm = nn.LayerNorm(inner)
        self.spread = nn.Conv2d(inner, sum(given), 3, padding=1)
        self.scale = nn.ModuleList(
            nn.Conv2d(width, out, 3, padding=1) for width, out in zip(given, wanted, strict=True)
        )
        self.shift = nn.ModuleList(
            nn.Conv2d(width, out, 3, padding=1) for width, out in zip(given, wanted, strict=True)
        )

    def forward(self, levels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Halves (B, given_l, h_l, w_l) to (s, t) for the others, (B, wanted_l, h_l, w_l) each."""
        small = (levels[-1].shape[2], levels[-1].shape[3])
        together = torch.cat([F.adaptive_avg_pool2d(level, small) for level in levels], dim=1)
        mixed = self.norm(self.squeeze(together).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).relu()
        said = torch.split(self.spread(mixed).relu(), self.given, dim=1)  # (B, given_l, small)
        heard = [
            level + F.interpolate(one, size=level.shape[2:], mode="bilinear", align_corners=False)
            for level, one in zip(levels, said, strict=True)
        ]
        return [
            (0.1 * scale(one), 0.1 * shift(one))
            for one, scale, shift in zip(heard, self.scale, self.shift, strict=True)
        ]


def position_encoding(channels: int, height: int, width: int) -> Tensor:
    """Sines and cosines of the column in the first half of the channels and of the row in the second, (channels, h, w).

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
    """Make the normal likely."""

    name: str = "msflow"
    gradient_clip: float = 2.0
    final_rate: float = 0.1

    def __init__(self, head: MSFlow) -> None:
        self.head = head
        self.module: nn.Module = head.flow
        self.epochs = head.epochs
        self.batch_images = head.batch_images
        self.learning_rate = head.learning_rate
        self.patience = head.patience

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam, as in the paper."""
        return torch.optim.Adam(self.module.parameters(), lr=self.learning_rate)

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Negative log-likelihood of a number, but for a constant: (sum |z|^2 / 2 - log |det|) / numbers."""
        flowed = self.head.flow(self.head.levels(features))
        energy = torch.stack([0.5 * latent.square().sum(dim=(1, 2, 3)) for latent in flowed.latents]).sum(
            dim=0
        )
        numbers = sum(latent[0].numel() for latent in flowed.latents)
        return {"loss": (energy - flowed.log_determinant).mean() / numbers}
