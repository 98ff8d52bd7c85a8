"""Adapted-MoE: route an image, adapt it, score it by the experts, and combine their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.config import AdaptedMoEConfig, AutoExpertConfig, NetworkRoutingConfig
from normweave.errors import DataError
from normweave.heads.adapted_moe.adaption import statistics
from normweave.heads.adapted_moe.branch import ExpertBranch
from normweave.heads.adapted_moe.discovery import (
    Agreement,
    Discovery,
    agreement,
    discover,
    position_variance,
)
from normweave.heads.adapted_moe.experts.base import Normals, fine_channels
from normweave.heads.adapted_moe.router import Router, RouterStage, select_experts
from normweave.heads.base import Head, TrainingStage, batches
from normweave.heads.grid import replace_border
from normweave.heads.novelty import SubclassNovelty, block_statistics
from normweave.types import FeatureSource, FitData, PatchScores, Routing
from normweave.validation import DISCRIMINATOR


class AdaptedMoE(Head):
    """Mixture of experts with test-time adaption, for seen and unseen subclasses.

    arXiv 2409.05611. An image is routed (Eq. 1-2), adapted (Eq. 5-6 and others) and scored by the top k experts. Eq. 4
    combines their patch scores, each standardised to mean 0 and std 1 on held-out normals (not in the paper).

    Routing `network` is the paper's. `statistics` uses the distance of image statistics to those of each subclass.
    `likelihood` scores the image by all experts; those with the lowest mean scores are chosen.
    """

    def __init__(self, config: AdaptedMoEConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.config = config
        self.grid = shape[1:]
        self.agreement: Agreement | None = None
        """Agreement of the discovered with the given subclasses; None unless both are known."""
        self.position_variance: float | None = None
        """Share of the variance that position explains; None unless the type of the experts was selected by it."""
        self.router = (
            Router(config.routing, width=shape[0])
            if config.moe and isinstance(config.routing, NetworkRoutingConfig)
            else None
        )
        self.branches = nn.ModuleList(
            [ExpertBranch(each, config.adaption, shape=shape) for each in config.expert.candidates]
        )
        self.novelty = SubclassNovelty(statistics=2 * shape[0])
        self._found: Discovery | None = None
        self._experts = np.empty(0, dtype=np.int64)  # of each image of the fit data

    @property
    def branch(self) -> ExpertBranch:
        """The branch that is used."""
        return next(each for each in self.branches if isinstance(each, ExpertBranch) and each.number > 0)

    @property
    def can_exclude(self) -> bool:  # type: ignore[override]
        """Whether there is more than one expert."""
        return len(self.subclass_names) > 1

    @torch.no_grad()
    def begin(self, data: FitData) -> None:
        """Find the subclasses if they are not given, fit their statistics, and select the experts.

        Raises:
            DataError: no image, or a named subclass without one.
        """
        if len(data) == 0:
            raise DataError("Adapted-MoE has no normal image to learn from. Give it at least one.")
        samples, robust = self._statistics(data.features)
        subclasses, names = self._subclasses(data, samples)
        self._experts = subclasses if self.config.moe else np.zeros_like(subclasses)
        self.subclass_names = names if self.config.moe or len(names) == 1 else ("all",)
        self.novelty.fit(robust, subclasses)
        expert = self.config.expert
        if isinstance(expert, AutoExpertConfig):
            channels = fine_channels(expert.fine, data.features.shape[0])
            self.position_variance = position_variance(data, channels=channels)
            positional = self.position_variance > expert.position_variance
            with_positions, without = cast(tuple[ExpertBranch, ExpertBranch], tuple(self.branches))
            with_positions.select(positional)
            without.select(not positional)
        self.branch.adaption.fit(samples, subclasses, self._experts)
        generator = torch.Generator().manual_seed(data.seed)
        if self.router is not None:
            self.router.start(subclasses=len(self.subclass_names), generator=generator)
        self.branch.experts.start(experts=len(self.subclass_names), generator=generator)

    def _statistics(self, source: FeatureSource) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the statistics of every image, and the block statistics, (n, 2D) each."""
        both = [(statistics(features).numpy(), block_statistics(features).numpy()) for _, features in batches(source)]
        samples, robust = zip(*both, strict=True)
        return np.concatenate(samples), np.concatenate(robust)

    def _subclasses(self, data: FitData, samples: NDArray[np.float32]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Return the subclass of each image and the names of the subclasses."""
        config = self.config
        given = bool((data.subclasses >= 0).all())
        self._found, self.agreement = None, None
        if given and config.discover == "missing":
            counts = np.bincount(data.subclasses, minlength=len(data.names))
            if empty := [name for name, count in zip(data.names, counts, strict=True) if count == 0]:
                raise DataError(
                    f"No normal image is left to learn {', '.join(empty)} from. "
                    "Give these subclasses more images, or hold out fewer (data.calibration_share)."
                )
            return data.subclasses, data.names
        self._found = discover(samples, method=config.discovery, most=config.max_subclasses, seed=data.seed)
        found = self._found.predict(samples)
        if given:
            self.agreement = agreement(found, data.subclasses)
        return found, tuple(f"found-{number + 1}" for number in range(len(self._found.centres)))

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """Return the stage of the router, if there is more than one expert, and those of the experts."""
        routing: tuple[TrainingStage, ...] = ()
        if self.router is not None and len(self.subclass_names) > 1:
            routing = (RouterStage(self.router, assign=self._assign),)
        return (*routing, *self.branch.experts.stages(assign=self._assign, adapt=self._adapt))

    @torch.no_grad()
    def finish(self, data: FitData) -> None:
        """Fit the experts in closed form, and measure the scale of each on held-out normals."""
        experts = self.branch.experts
        rows = np.arange(len(data))
        held_out = data.holdout.copy()
        for expert in range(len(self.subclass_names)):
            own = self._experts == expert
            if held_out[own].all():  # all images of the subclass are needed for the fit
                held_out[own] = False
        if experts.standardised:
            held_out[:] = False
        source = _Adapted(data.features, self)
        fit = rows[~held_out]
        experts.fit(
            Normals(source, fit, self._experts[fit], data.groups[fit]),
            generator=torch.Generator().manual_seed(data.seed),
        )
        measured = rows[held_out] if held_out.any() else rows
        self.branch.measure(
            source,
            measured[:0] if experts.standardised else measured,
            self._experts,
            number=len(self.subclass_names),
        )

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        return self._score(features, self.novelty(block_statistics(features)), allowed=None)

    @torch.no_grad()
    def score_excluding(self, features: Tensor, subclasses: Tensor) -> PatchScores:
        """Score each image without the expert of its own subclass; with one expert as `forward`.

        The threshold for images of unseen subclasses follows from these scores.

        Args:
            features: (B, D, h, w).
            subclasses: (B,) indices into `subclass_names`; -1: no expert is left out.
        """
        K = self.branch.number
        if K == 1:
            return self.forward(features)
        others = torch.arange(K, device=features.device) != subclasses[:, None]  # (B, K)
        distances = self.novelty(block_statistics(features)).masked_fill(~others, torch.inf)
        return self._score(features, distances, allowed=others)

    @torch.no_grad()
    def embed(self, features: Tensor) -> Tensor:
        """Return x of the routing network (Eq. 1), (B, C), or the whitened statistics if there is no network."""
        if self.router is not None:
            embedding: Tensor = self.router(features)
            return embedding
        return self.novelty.whitened(block_statistics(features))

    def _score(self, features: Tensor, distances: Tensor, *, allowed: Tensor | None) -> PatchScores:
        """Score with distances (B, K) to the known subclasses, by the experts (B, K) allowed; None = all."""
        branch, config = self.branch, self.config
        samples = statistics(features)
        every = torch.arange(branch.number, device=features.device).expand(features.shape[0], -1)
        by_all = config.routing.method == "likelihood"
        scores = branch(features, samples, every) if by_all else None  # (B, K, V, h, w)
        if scores is not None:
            similarity = -scores[:, :, 0].mean(dim=(2, 3))
        elif self.router is not None:
            similarity = self.router.similarity(features)
        else:
            similarity = -distances
        similarity = similarity[:, : branch.number]  # there may be one expert for several subclasses
        if allowed is not None:
            similarity = similarity.masked_fill(~allowed, -torch.inf)  # weight 0
        choice = select_experts(similarity, temperature=config.temperature, top_k=config.top_k)
        if scores is None:
            scores = branch(features, samples, choice.experts)  # (B, T, V, h, w)
        else:
            chosen = choice.experts[..., None, None, None].expand(-1, -1, *scores.shape[2:])
            scores = scores.gather(1, chosen)  # (B, T, V, h, w)
        counts = None if allowed is None else allowed.gather(1, choice.experts)  # (B, T)
        fused = aggregate(scores, choice.weights, how=config.aggregation, counts=counts)  # (B, V, h, w)
        weights = features.new_zeros(features.shape[0], branch.number)
        return PatchScores(
            scores=replace_border(fused[:, 0], config.border if branch.config.border else 0, grid=self.grid),
            image_scores=fused[:, 1].amax(dim=(1, 2)) if fused.shape[1] > 1 else None,
            routing=Routing(
                weights=weights.scatter(1, choice.experts, choice.weights),
                subclass=choice.experts[:, 0],
                distance=distances.amin(dim=1),
                adapted=branch.adaption.changes(samples),
            ),
        )

    def _assign(self, features: Tensor, subclasses: Tensor) -> Tensor:
        """Return the expert of each training image, (B,)."""
        if not self.config.moe:
            return torch.zeros_like(subclasses)
        if self._found is None:
            return subclasses
        return torch.from_numpy(self._found.predict(statistics(features).cpu().numpy())).to(features.device)

    def _adapt(self, features: Tensor, experts: Tensor) -> Tensor:
        """Return training images adapted for their own experts (B,), (B, D, h, w)."""
        adapted: Tensor = self.branch.adaption(features, statistics(features), experts[:, None])
        return adapted[:, 0]

    def notes(self) -> dict[str, Any]:
        """Return the type of the experts, the variance that position explains, and the agreement of subclasses."""
        return {
            "experts": getattr(self.branch.config, DISCRIMINATOR),
            "position_variance": self.position_variance,
            "agreement": None if self.agreement is None else self.agreement._asdict(),
        }


class _Adapted:
    """The fit data, each image adapted for its own expert."""

    def __init__(self, source: FeatureSource, head: AdaptedMoE) -> None:
        self.source = source
        self.head = head

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.source.shape

    def __len__(self) -> int:
        return len(self.source)

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        own = torch.from_numpy(self.head._experts[np.asarray(rows)])
        return self.head._adapt(self.source.read(rows), own)


def aggregate(
    scores: Tensor,
    weights: Tensor,
    *,
    how: Literal["paper", "min", "mean"],
    counts: Tensor | None = None,
) -> Tensor:
    """Combine the scores (B, T, ...) of the experts with weights (B, T) to (B, ...).

    `paper` is Eq. 4, sum_k w_k Expert_k(x) / sum_k w_k over the experts that count.

    Args:
        counts: (B, T) bool, at least one True in each row; an expert that does not count has weight 0. None = all
            count.
    """
    inner = (..., *[None] * (scores.ndim - 2))
    match how:
        case "paper":
            shares = weights / weights.sum(dim=1, keepdim=True)  # (B, T)
            return (scores * shares[inner]).sum(dim=1)
        case "min":
            if counts is not None:
                scores = scores.masked_fill(~counts[inner], torch.inf)
            return scores.amin(dim=1)
        case "mean":
            if counts is None:
                return scores.mean(dim=1)
            return (scores * counts[inner]).sum(dim=1) / counts.sum(dim=1, keepdim=True)[inner][:, 0]
