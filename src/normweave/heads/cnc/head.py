"""CNC: reconstruct the normal of every category with one decoder; what is not reconstructed is anomalous."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.config import CNCConfig
from normweave.errors import ConfigError, DataError, MissingError
from normweave.heads import state
from normweave.heads.base import Head, TrainingStage
from normweave.heads.cnc.constraint import (
    JointSpace,
    distances,
    distillation,
    margin,
    promotion,
)
from normweave.heads.cnc.decoder import Decoder, NormalityGuide
from normweave.heads.cnc.gating import GatedExperts
from normweave.heads.cnc.prompts import Guidance, Prompts, PromptStage
from normweave.heads.cnc.synthetic import Damaged
from normweave.heads.grid import replace_border
from normweave.heads.novelty import SubclassNovelty, block_statistics
from normweave.types import FitData, Pair, PatchScores, Routing, Text

BATCH_IMAGES = 16
WATCHED = 512
"""Channels by which kinds are told apart, at most: the covariance of their statistics has 4 x 512^2 numbers."""
FEWEST_HELD_OUT = 3
"""Images of a kind, for a scale of its own."""


_NO_TEXT = (
    "{} needs a text encoder, and these features have none here. Install one with: pip install 'normweave[clip]', "
    "choose features.kind=open_clip or offline_pair, or set {}."
)


class CNC(Head):
    """Cross-modal normality constraint (arXiv 2501.00346), for many categories at once.

    The levels' tokens E_l (frozen, standardised) are fused, pass a gated mixture of experts and, if asked for, attend
    to what text says of the normal; a decoder reconstructs each level, D_l. It is trained on normal images, of which
    some have been damaged and are to be decoded as if they had not, and held to prompts of the normal in the space that
    images share with text.

        a = mean_l (1 - cos(E_l, D_l) - mu_lk) / sd_lk + beta (margin(E) - mu_k) / sd_k

    with mu and sd of the held-out normals of the nearest known kind k (ours; `per_subclass` off: of all of them).

    Args:
        config: all settings.
        shape: (D, h, w) of the features.
        dims: D_l of each level; they add up to D.
    """

    scale_mean: Tensor  # (K, L + 1) of each kind's distances by level and, last, of its margin
    scale_deviation: Tensor  # (K, L + 1)

    def __init__(self, config: CNCConfig, *, shape: tuple[int, int, int], dims: Sequence[int]) -> None:
        super().__init__()
        if sum(dims) != shape[0]:
            raise ConfigError(f"The levels' widths {list(dims)} must add up to {shape[0]} channels.")
        if absent := [level for level in config.prompts.joint_levels if not -len(dims) <= level < len(dims)]:
            raise ConfigError(
                f"head.prompts.joint_levels must lie in {-len(dims)}..{len(dims) - 1}, got {absent}."
            )
        self.config = config
        self.subclass_names: tuple[str, ...] = ()
        self.text_kind = "off"
        """What the prompts of this fit are: learned, free, random or off."""
        self.synthetic_variants = config.synthetic.variants
        self.uses_text = config.prompts.text != "off" or config.guide.tokens == "text"
        self.grid = shape[1:]
        self.dims = list(dims)
        self.joint_levels = [level % len(dims) for level in config.prompts.joint_levels] or list(
            range(len(dims))
        )
        self.joint = JointSpace(dims=dims)
        self.prompts = Prompts(
            words=config.prompts.context_words,
            normal_states=config.prompts.normal_states,
            abnormal_states=config.prompts.abnormal_states,
        )
        self.guidance = Guidance(words=config.guide.words, state=config.prompts.normal_states[0])
        width, heads = config.width, config.heads
        self.decoder = Decoder(
            dims=dims,
            places=shape[1] * shape[2],
            width=width,
            blocks=config.blocks,
            heads=heads,
            dropout=config.dropout,
            bottleneck=config.bottleneck,
            experts=GatedExperts(width=width, experts=config.gating.experts, top_k=config.gating.top_k)
            if config.moe
            else None,
            guide=NormalityGuide(width=width, tokens=width, heads=heads, residual=config.guide.residual)
            if config.guide.tokens != "off"
            else None,
        )
        self.watched = np.unique(
            np.linspace(0, shape[0] - 1, min(shape[0], WATCHED)).round().astype(int)
        ).tolist()
        self.kinds = SubclassNovelty(statistics=2 * len(self.watched))
        self.register_buffer("scale_mean", torch.zeros(1, len(self.dims) + 1))
        self.register_buffer("scale_deviation", torch.ones(1, len(self.dims) + 1))
        self.eval()

    def train(self, mode: bool = True) -> CNC:
        """Stay in eval mode; a stage's random draws come from its generator, not from a mode."""
        return super().train(False)

    @property
    def has_text(self) -> bool:
        """Whether there are prompts; a width of the joint space of 0 says no, so that it survives saving."""
        return self.prompts.anchors.shape[1] > 0

    @torch.no_grad()
    def begin(self, data: FitData) -> None:
        """Learn the kinds and the ways into the joint space, and draw the initial weights.

        Raises:
            MissingError: head.prompts.text=learned or head.guide.tokens=text where the features have no text side.
            ConfigError: head.prompts.text=free or random where the features have no space to put vectors into.
            DataError: no image.
        """
        if len(data) == 0:
            raise DataError("CNC has no normal image to learn from. Give it at least one.")
        generator = torch.Generator().manual_seed(data.seed)
        pair = data.pair
        text = self._text(pair)
        if pair is None or self.config.prompts.text == "off":
            self.text_kind = "off"
        elif text is not None:
            self.text_kind = "learned"
        else:
            self.text_kind = "random" if self.config.prompts.text == "random" else "free"
        self.subclass_names = data.names or ("all",)
        self.kinds.fit(self._statistics(data), _kinds(data))
        if pair is not None and self.text_kind != "off":
            mean = torch.zeros(data.features.shape[0]) if data.mean is None else data.mean
            deviation = torch.ones_like(mean) if data.std is None else data.std
            raw = (few * deviation[:, None, None] + mean[:, None, None] for _, few in _batches(data))
            self.joint.take(pair.joint_maps(raw), mean=mean, deviation=deviation)
        joint_dim = 0 if self.text_kind == "off" else self.joint.weight.shape[1]
        self.prompts.start(text, joint_dim=joint_dim, random=self.text_kind == "random", generator=generator)
        if self.decoder.guide is not None:
            tokens = self.guidance.start(self._guide_text(pair), width=self.config.width, generator=generator)
            self.decoder.guide.project = nn.Linear(tokens, self.config.width)
        self.decoder.start(generator)

    def _text(self, pair: Pair | None) -> Text | None:
        """The text encoder that the prompts are learnt through; None = without."""
        text = None if pair is None else pair.text
        if self.config.prompts.text == "learned" and text is None:
            raise MissingError(_NO_TEXT.format("head.prompts.text=learned", "head.prompts.text=auto"))
        if self.config.prompts.text in ("free", "random") and pair is None:
            raise ConfigError(
                f"head.prompts.text={self.config.prompts.text} puts vectors into a space that images share with "
                "text, and these features have none. Choose features.kind=open_clip or offline_pair, or set "
                "head.prompts.text=off."
            )
        return text if self.config.prompts.text in ("auto", "learned") else None

    def _guide_text(self, pair: Pair | None) -> Text | None:
        """The text encoder that the guide's words go through; None = free tokens."""
        if self.config.guide.tokens != "text":
            return None
        if pair is None or pair.text is None:
            raise MissingError(_NO_TEXT.format("head.guide.tokens=text", "head.guide.tokens=free"))
        return pair.text

    def _statistics(self, data: FitData) -> NDArray[np.float32]:
        """Of every image, without local defects, (n, 2 watched)."""
        samples = np.empty((len(data), 2 * len(self.watched)), dtype=np.float32)
        for rows, features in _batches(data):
            samples[rows] = block_statistics(features[:, self.watched]).numpy()
        return samples

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """The prompts first, which do not depend on the decoder, then the decoder, which is held to them."""
        config = self.config
        text = self._text(data.pair)
        damaged = None
        if data.synthetic is not None:
            damaged = Damaged(data, data.synthetic, covered=config.synthetic.covered)
        stages: list[TrainingStage] = []
        if self.text_kind in ("learned", "free"):
            stages.append(
                PromptStage(
                    self.prompts,
                    self.joint,
                    text=text,
                    similarity=self._similarity,
                    damaged=damaged,
                    temperature=config.prompts.temperature,
                    epochs=config.prompts.training.epochs,
                    batch_images=config.prompts.training.batch_images,
                    learning_rate=config.prompts.training.learning_rate,
                )
            )
        stages.append(DecoderStage(self, text=text, guide_text=self._guide_text(data.pair), damaged=damaged))
        return stages

    @torch.no_grad()
    def finish(self, data: FitData) -> None:
        """Fold the text into constants, and measure each kind's scale on the held-out normals."""
        text = self._text(data.pair)
        self.prompts.settle(text)
        if self.decoder.guide is not None:
            self.guidance.settle(self._guide_text(data.pair))
        kinds = _kinds(data)
        K, T = len(self.subclass_names), len(self.dims) + 1
        images = np.zeros(K)
        sums = np.zeros((K, T, 2))  # of the maps and of their squares, a place
        rows = np.flatnonzero(data.holdout) if data.holdout.any() else np.arange(len(data))
        for start in range(0, len(rows), BATCH_IMAGES):
            few = rows[start : start + BATCH_IMAGES]
            found = self._maps(data.features.read(few)).double().flatten(2).numpy()  # (B, T, N)
            np.add.at(images, kinds[few], 1)
            np.add.at(sums, kinds[few], np.stack([found.mean(axis=2), (found**2).mean(axis=2)], axis=2))
        few_images = images < (FEWEST_HELD_OUT if self.config.per_subclass else np.inf)
        sums[few_images], images[few_images] = sums.sum(axis=0), len(rows)
        mean, square = np.moveaxis(sums / images[:, None, None], 2, 0)  # (K, T) each
        self.scale_mean = torch.from_numpy(mean).float()
        self.scale_deviation = torch.from_numpy(np.sqrt(np.maximum(square - mean**2, 1e-12))).float()

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        distance, nearest = self.kinds(block_statistics(features[:, self.watched])).min(dim=1)  # (B,) each
        maps = self._maps(features)  # (B, L + 1, h, w)
        mean, deviation = self.scale_mean[nearest], self.scale_deviation[nearest]  # (B, L + 1)
        standard = (maps - mean[..., None, None]) / deviation[..., None, None]
        scores = standard[:, :-1].mean(dim=1) + self.config.prompts.weight * standard[:, -1]
        weights = F.one_hot(nearest, len(self.scale_mean)).float()
        return PatchScores(
            scores=scores,
            image_scores=None,
            routing=Routing(weights, nearest, distance, torch.zeros_like(nearest, dtype=torch.bool)),
            reconstruction=maps[:, :-1].mean(dim=1),
        )

    @torch.no_grad()
    def embed(self, features: Tensor) -> Tensor:
        """The statistics that an image's kind is told by, whitened, (B, C)."""
        return self.kinds.whitened(block_statistics(features[:, self.watched]))

    def _maps(self, features: Tensor) -> Tensor:
        """1 - cos of each level and, last, the margin by which text calls a place abnormal, (B, L + 1, h, w)."""
        levels = self._levels(features)
        decoded = self.decoder(_tokens(features), self.guidance.tokens).levels
        maps = distances(levels, decoded)  # (B, L, N)
        said = torch.zeros_like(maps[:, :1])
        if self.has_text:
            similarity = self._similarity_of(levels, self.prompts.anchors)  # (B, L, N, P)
            said = margin(
                similarity, normal=self.prompts.normal, temperature=self.config.prompts.temperature
            ).mean(dim=1, keepdim=True)
        both = torch.cat([maps, said], dim=1)  # (B, L + 1, N)
        cells = both.view(-1, *self.grid)  # (B (L + 1), h, w)
        return replace_border(cells, self.config.border, grid=self.grid).view(-1, both.shape[1], *self.grid)

    def _similarity(self, features: Tensor, prompts: Tensor) -> Tensor:
        """Cosines of (B, D, h, w) features to (P, J) prompts, (B, L, N, P)."""
        return self._similarity_of(self._levels(features), prompts)

    def _levels(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, D, h, w) to the tokens of each level, (B, N, D_l)."""
        return torch.split(_tokens(features), self.dims, dim=2)

    def _similarity_of(self, levels: Sequence[Tensor], prompts: Tensor) -> Tensor:
        joint: Tensor = self.joint(levels, self.joint_levels)  # (B, L, N, J)
        return joint @ prompts.T

    def state(self) -> dict[str, Tensor]:
        """The decoder, the prompts and the guide's tokens, the way to the joint space, kinds and scales."""
        return state.state(self)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take them over."""
        state.load_state(self, tensors)

    def notes(self) -> dict[str, Any]:
        """How the text was had."""
        return {"text": self.text_kind}


class DecoderStage(TrainingStage):
    """Teach the decoder to reconstruct the normal, whatever it is shown.

        L = L_rec + L_balance + L_distillation + L_promotion, each with its weight

    A share of the images is damaged, and is to be decoded as the same image without.
    """

    name = "decoder"
    gradient_clip = 1.0
    final_rate = 0.01

    def __init__(
        self, head: CNC, *, text: Text | None, guide_text: Text | None, damaged: Damaged | None
    ) -> None:
        config = head.config
        self.head = head
        self.config = config
        self.text = text
        self.guide_text = guide_text
        self.damaged = damaged
        self.module: nn.Module = nn.ModuleList([head.decoder, head.guidance, head.joint])  # joint: goes along
        self.epochs = config.training.epochs
        self.batch_images = config.training.batch_images
        self.patience = config.training.patience
        self.constrained = head.has_text and (config.prompts.distillation > 0 or config.prompts.promotion > 0)
        self.anchors: Tensor | None = None

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam over the decoder, its experts and gate, and the words of its guide."""
        return torch.optim.Adam(self.module.parameters(), lr=self.config.training.learning_rate)

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """The loss on a batch and its parts; on held-out normals without dropout, noise and damage."""
        config, head = self.config, self.head
        shown, clean = features, features
        if training and self.damaged is not None:
            count = round(config.synthetic.share * len(features))
            drawn = self.damaged.draw(count, held_out=False, generator=generator)
            shown = torch.cat([features[count:], drawn.features.to(features.device)])
            clean = torch.cat([features[count:], drawn.clean.to(features.device)])
        levels = head._levels(clean)
        guidance = None
        if head.decoder.guide is not None:
            guidance = head.guidance(self.guide_text)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            decoded, balance = head.decoder(
                _tokens(shown), guidance, generator=generator if training else None
            )
        decoded = tuple(level.float() for level in decoded)
        losses = {"reconstruction": distances(levels, decoded).mean(), "balance": balance.float()}
        loss = losses["reconstruction"] + config.gating.balance * losses["balance"]
        if self.constrained:
            if self.anchors is None:
                head.prompts.settle(self.text)
                self.anchors = head.prompts.anchors
            anchors = self.anchors.to(features.device)
            similarity = head._similarity_of(decoded, anchors)
            with torch.no_grad():
                target = head._similarity_of(levels, anchors)
            losses["distillation"] = distillation(target, similarity)
            losses["promotion"] = promotion(
                similarity, normal=head.prompts.normal, temperature=config.prompts.temperature
            )
            loss = (
                loss
                + config.prompts.distillation * losses["distillation"]
                + config.prompts.promotion * losses["promotion"]
            )
        return losses | {"loss": loss}


def _tokens(features: Tensor) -> Tensor:
    """(B, D, h, w) to (B, N, D)."""
    return features.flatten(2).transpose(1, 2)


def _kinds(data: FitData) -> NDArray[np.int64]:
    """Number of each image's kind; one for all where none are named."""
    return data.subclasses if data.names else np.zeros(len(data), dtype=np.int64)


def _batches(data: FitData) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """All fit normals, a few at a time: their rows and features."""
    for start in range(0, len(data), BATCH_IMAGES):
        rows = np.arange(start, min(start + BATCH_IMAGES, len(data)))
        yield rows, data.features.read(rows)
