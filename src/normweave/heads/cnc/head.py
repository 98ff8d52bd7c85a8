"""CNC: one decoder reconstructs the normal patches of all categories; the score is the reconstruction distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.config import CNCConfig
from normweave.errors import ConfigError, DataError, MissingError
from normweave.heads.base import Head, TrainingStage, batches
from normweave.heads.cnc.constraint import JointSpace, distances, distillation, margin, promotion
from normweave.heads.cnc.decoder import Decoder
from normweave.heads.cnc.prompts import Guidance, Prompts, PromptStage
from normweave.heads.cnc.synthetic import SyntheticSampler
from normweave.heads.grid import replace_border
from normweave.heads.novelty import SubclassNovelty, block_statistics
from normweave.types import FitData, Pair, PatchScores, Routing, Text

MAX_CHANNELS = 512
"""Channels used for routing, at most: the covariance of their statistics has 4 x 512^2 numbers."""
MIN_HELD_OUT = 3
"""Held-out images that a subclass needs for a score scale of its own."""

_NO_TEXT = (
    "{} needs a text encoder, and these features have none here. Install one with: pip install 'normweave[clip]', "
    "choose other features (open_clip or offline_pair), or set {}."
)


class CNC(Head):
    """Cross-modal normality constraint (arXiv 2501.00346), one model for many categories.

    The levels' tokens E_l (frozen, standardised) are fused, pass a gated mixture of experts and optionally attend to
    tokens of the normal state; a decoder reconstructs each level, D_l. It is trained on normal images and on synthetic
    anomalies, whose target is the image without the anomaly, and constrained by prompts of the normal state
    in the space that images share with text.

        a = mean_l (1 - cos(E_l, D_l) - mu_lk) / sd_lk + beta (margin(E) - mu_k) / sd_k

    with mu and sd of the held-out images of the nearest subclass k, or of all subclasses if `per_subclass` is off. This
    formula is our own.

    Args:
        shape: (D, h, w) of the features.
        dims: D_l of each level; they add up to D. Empty = one level.
    """

    scale_mean: Tensor  # (K, L + 1) of each subclass' distances by level and, last, of its margin
    scale_std: Tensor  # (K, L + 1)

    def __init__(self, config: CNCConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()) -> None:
        super().__init__()
        dims = list(dims or shape[:1])
        chosen = config.prompts.joint_levels
        if sum(dims) != shape[0]:
            raise ConfigError(f"The levels' widths {dims} must add up to {shape[0]} channels.")
        if absent := [level for level in chosen if not -len(dims) <= level < len(dims)]:
            raise ConfigError(f"head.prompts.joint_levels must be in {-len(dims)}..{len(dims) - 1}, got {absent}.")
        self.config = config
        self.uses_text = config.prompts.text != "off" or config.guide.tokens == "text"
        self.synthetic_variants = config.synthetic.variants
        self.prompt_type = "off"
        """Prompts of this fit: learned, free, random or off."""
        self.grid = shape[1:]
        self.dims = dims
        self.joint_levels = [level % len(dims) for level in chosen] or list(range(len(dims)))
        self.joint = JointSpace(dims=dims)
        self.prompts = Prompts(config.prompts)
        self.guidance = Guidance(words=config.guide.words, state=config.prompts.normal_states[0])
        self.decoder = Decoder(config, dims=dims, cells=shape[1] * shape[2])
        count = min(shape[0], MAX_CHANNELS)
        self.channels = np.unique(np.linspace(0, shape[0] - 1, count).round().astype(int)).tolist()
        self.novelty = SubclassNovelty(statistics=2 * len(self.channels))
        self.register_buffer("scale_mean", torch.zeros(1, len(dims) + 1))
        self.register_buffer("scale_std", torch.ones(1, len(dims) + 1))
        self.eval()

    @property
    def has_prompts(self) -> bool:
        """Whether there are prompts. Read from the width of the joint space, so that it is saved with the weights."""
        return self.prompts.embeddings.shape[1] > 0

    @torch.no_grad()
    def begin(self, data: FitData) -> None:
        """Fit the routing and the maps into the joint space, and draw the initial weights.

        Raises:
            MissingError: head.prompts.text=learned or head.guide.tokens=text, and the features have no text side.
            ConfigError: head.prompts.text=free or random, and the features have no joint space with text.
            DataError: no image.
        """
        if len(data) == 0:
            raise DataError("CNC has no normal image to learn from. Give it at least one.")
        generator = torch.Generator().manual_seed(data.seed)
        pair = data.pair
        text = self._prompt_text(pair)
        if pair is None or self.config.prompts.text == "off":
            self.prompt_type = "off"
        elif text is not None:
            self.prompt_type = "learned"
        else:
            self.prompt_type = "random" if self.config.prompts.text == "random" else "free"
        self.subclass_names = data.names or ("all",)
        statistics = torch.cat([self._statistics(features) for _, features in batches(data.features)])
        self.novelty.fit(statistics.numpy(), _subclasses(data))
        if pair is not None and self.prompt_type != "off":
            mean = torch.zeros(data.features.shape[0]) if data.mean is None else data.mean
            std = torch.ones_like(mean) if data.std is None else data.std
            raw = (features * std[:, None, None] + mean[:, None, None] for _, features in batches(data.features))
            self.joint.fit(pair.joint_maps(raw), mean=mean, std=std)
        joint_dim = 0 if self.prompt_type == "off" else self.joint.weight.shape[1]
        self.prompts.start(text, joint_dim=joint_dim, random=self.prompt_type == "random", generator=generator)
        if self.decoder.guide is not None:
            tokens = self.guidance.start(self._guide_text(pair), width=self.config.width, generator=generator)
            self.decoder.guide.project = nn.Linear(tokens, self.config.width)
        self.decoder.start(generator)

    def _prompt_text(self, pair: Pair | None) -> Text | None:
        """Return the text encoder of the prompts; None if they are vectors without a text."""
        setting = self.config.prompts.text
        text = None if pair is None else pair.text
        if setting == "learned" and text is None:
            raise MissingError(_NO_TEXT.format("head.prompts.text=learned", "head.prompts.text=auto"))
        if setting in ("free", "random") and pair is None:
            raise ConfigError(
                f"head.prompts.text={setting} needs features that share a space with text, and these do not. "
                "Choose other features (open_clip or offline_pair), or set head.prompts.text=off."
            )
        return text if setting in ("auto", "learned") else None

    def _guide_text(self, pair: Pair | None) -> Text | None:
        """Return the text encoder of the guide; None if its tokens are free."""
        if self.config.guide.tokens != "text":
            return None
        if pair is None or pair.text is None:
            raise MissingError(_NO_TEXT.format("head.guide.tokens=text", "head.guide.tokens=free"))
        return pair.text

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """Return the stage of the prompts, if they are learnt, and that of the decoder, which uses them."""
        text = self._prompt_text(data.pair)
        synthetic = None
        if data.synthetic is not None:
            synthetic = SyntheticSampler(data, data.synthetic, covered=self.config.synthetic.covered)
        decoder = DecoderStage(self, text=text, guide_text=self._guide_text(data.pair), synthetic=synthetic)
        if self.prompt_type not in ("learned", "free"):
            return (decoder,)
        prompts = PromptStage(
            self.prompts,
            self.joint,
            self.config.prompts,
            text=text,
            similarity=lambda features, prompts: self.similarity(self.levels(features), prompts),
            synthetic=synthetic,
        )
        return prompts, decoder

    @torch.no_grad()
    def finish(self, data: FitData) -> None:
        """Store the prompts and the guide's tokens, and fit each subclass' score scale on the held-out images."""
        self.prompts.store(self._prompt_text(data.pair))
        if self.decoder.guide is not None:
            self.guidance.store(self._guide_text(data.pair))
        subclasses = _subclasses(data)
        K, T = len(self.subclass_names), len(self.dims) + 1
        images = np.zeros(K)
        sums = np.zeros((K, T, 2))  # of the maps and of their squares, averaged over the cells
        held_out = np.flatnonzero(data.holdout) if data.holdout.any() else np.arange(len(data))
        for rows, features in batches(data.features, held_out):
            maps = self._maps(features).double().flatten(2).numpy()  # (B, T, N)
            np.add.at(images, subclasses[rows], 1)
            np.add.at(sums, subclasses[rows], np.stack([maps.mean(axis=2), (maps**2).mean(axis=2)], axis=2))
        shared = images < (MIN_HELD_OUT if self.config.per_subclass else np.inf)
        sums[shared], images[shared] = sums.sum(axis=0), len(held_out)
        mean, square = np.moveaxis(sums / images[:, None, None], 2, 0)  # (K, T) each
        self.scale_mean = torch.from_numpy(mean).float()
        self.scale_std = torch.from_numpy(np.sqrt(np.maximum(square - mean**2, 1e-12))).float()

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        distance, nearest = self.novelty(self._statistics(features)).min(dim=1)  # (B,) each
        maps = self._maps(features)  # (B, L + 1, h, w)
        mean, std = self.scale_mean[nearest], self.scale_std[nearest]  # (B, L + 1)
        standard = (maps - mean[..., None, None]) / std[..., None, None]
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
        """Return the whitened image statistics by which images are routed, (B, C)."""
        return self.novelty.whitened(self._statistics(features))

    def notes(self) -> dict[str, Any]:
        """Return the type of the prompts."""
        return {"text": self.prompt_type}

    def levels(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return the tokens of each level, (B, N, D_l), from (B, D, h, w)."""
        return torch.split(_tokens(features), self.dims, dim=2)

    def similarity(self, levels: Sequence[Tensor], prompts: Tensor) -> Tensor:
        """Return the cosines of the tokens of `joint_levels` to (P, J) prompts, (B, L, N, P)."""
        joint: Tensor = self.joint(levels, self.joint_levels)  # (B, L, N, J)
        return joint @ prompts.T

    def _statistics(self, features: Tensor) -> Tensor:
        return block_statistics(features[:, self.channels])

    def _maps(self, features: Tensor) -> Tensor:
        """Return 1 - cos of each level and, last, the margin of the prompts (0 without), (B, L + 1, h, w)."""
        levels = self.levels(features)
        decoded = self.decoder(_tokens(features), self.guidance.tokens).levels
        maps = distances(levels, decoded)  # (B, L, N)
        margins = torch.zeros_like(maps[:, :1])
        if self.has_prompts:
            similarity = self.similarity(levels, self.prompts.embeddings)  # (B, L, N, P)
            temperature = self.config.prompts.temperature
            margins = margin(similarity, normal=self.prompts.normal, temperature=temperature)
            margins = margins.mean(dim=1, keepdim=True)
        both = torch.cat([maps, margins], dim=1)  # (B, L + 1, N)
        cells = both.view(-1, *self.grid)  # (B (L + 1), h, w)
        return replace_border(cells, self.config.border, grid=self.grid).view(-1, both.shape[1], *self.grid)


class DecoderStage(TrainingStage):
    """Train the decoder to reconstruct the normal image, also from an image with a synthetic anomaly.

    L = L_rec + L_balance + L_distillation + L_promotion, each with its weight
    """

    name = "decoder"
    gradient_clip = 1.0
    final_rate = 0.01

    def __init__(
        self, head: CNC, *, text: Text | None, guide_text: Text | None, synthetic: SyntheticSampler | None
    ) -> None:
        # The joint space is not trained, but must be on the same device.
        super().__init__(nn.ModuleList([head.decoder, head.guidance, head.joint]), head.config.training)
        self.head = head
        self.config = head.config
        self.text = text
        self.guide_text = guide_text
        self.synthetic = synthetic
        if synthetic is not None:  # images with and without an anomaly on each worker
            shares = (self.config.synthetic.share, 1 - self.config.synthetic.share)
            self.worker_images = math.ceil(1 / min(share for share in shares if share > 0))
        prompts = head.config.prompts
        self.constrained = head.has_prompts and (prompts.distillation > 0 or prompts.promotion > 0)
        self.prompts: Tensor | None = None

    def optimiser(self) -> torch.optim.Optimizer:
        """Return Adam over the decoder with its experts and gate, and the words of its guide."""
        return torch.optim.Adam(self.module.parameters(), lr=self.learning_rate, fused=True)

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Return the loss and its terms; on held-out images without dropout, noise and synthetic anomalies."""
        config, head = self.config, self.head
        inputs, targets = features, features
        if training and self.synthetic is not None:
            count = round(config.synthetic.share * len(features))
            batch = self.synthetic.draw(count, held_out=False, generator=generator)
            inputs = torch.cat([features[count:], batch.features.to(features.device)])
            targets = torch.cat([features[count:], batch.clean.to(features.device)])
        levels = head.levels(targets)
        guidance = None if head.decoder.guide is None else head.guidance(self.guide_text)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            decoded, balance = head.decoder(_tokens(inputs), guidance, generator=generator if training else None)
        decoded = tuple(level.float() for level in decoded)
        losses = {"reconstruction": distances(levels, decoded).mean(), "balance": balance.float()}
        loss = losses["reconstruction"] + config.gating.balance * losses["balance"]
        if self.constrained:
            if self.prompts is None:
                head.prompts.store(self.text)
                self.prompts = head.prompts.embeddings
            prompts, weights = self.prompts.to(features.device), config.prompts
            similarity = head.similarity(decoded, prompts)
            with torch.no_grad():
                target = head.similarity(levels, prompts)
            losses["distillation"] = distillation(target, similarity)
            losses["promotion"] = promotion(similarity, normal=head.prompts.normal, temperature=weights.temperature)
            loss = loss + weights.distillation * losses["distillation"] + weights.promotion * losses["promotion"]
        return losses | {"loss": loss}


def _tokens(features: Tensor) -> Tensor:
    """Flatten (B, D, h, w) to (B, N, D)."""
    return features.flatten(2).transpose(1, 2).contiguous()


def _subclasses(data: FitData) -> NDArray[np.int64]:
    """Return the subclass index of each image; 0 for all if no subclasses are named."""
    return data.subclasses if data.names else np.zeros(len(data), dtype=np.int64)
