"""Adapted-MoE: route an image, adapt it, score it by the experts, and combine their scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.config import AdaptedMoEConfig, FusionExpertConfig, NetworkRoutingConfig
from normweave.errors import DataError
from normweave.heads.adapted_moe.adaption import Adaption, statistics
from normweave.heads.adapted_moe.branch import ExpertBranch, adapt
from normweave.heads.adapted_moe.discovery import (
    Agreement,
    Discovery,
    agreement,
    discover,
)
from normweave.heads.adapted_moe.experts.base import Normals
from normweave.heads.adapted_moe.fusion import (
    Defective,
    Fusion,
    HeldOut,
    defects_per_image,
    folds,
    last_of_expert,
)
from normweave.heads.adapted_moe.router import Choice, Router, RouterStage, select_experts
from normweave.heads.base import Head, TrainingStage
from normweave.heads.grid import replace_border
from normweave.heads.novelty import SubclassNovelty, block_statistics
from normweave.heads.state import drop_row, growing
from normweave.passes import Batches, Merge, Statistics, Tensors, over, per_image
from normweave.types import FeatureSource, FitData, PatchScores, Routing, SyntheticDefects
from normweave.validation import DISCRIMINATOR

T = TypeVar("T")


class AdaptedMoE(Head):
    """Mixture of experts with test-time adaption, for seen and unseen subclasses.

    arXiv 2409.05611. An image is routed (Eq. 1-2), adapted (Eq. 5-6 and others) and scored by the top k experts. Eq. 4
    combines their patch scores, each standardised to mean 0 and std 1 on held-out normals (not in the paper).

    Routing `network` is the paper's. `statistics` uses the distance of image statistics to those of each subclass.
    `likelihood` scores the image by all experts; those with the lowest mean scores are chosen.
    """

    numbers: Tensor  # (K,) 0..K-1, only with added experts

    grows = ("numbers",)

    def __init__(self, config: AdaptedMoEConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.config = config
        self.grid = shape[1:]
        self.agreement: Agreement | None = None
        """Agreement of the discovered with the given subclasses; None unless both are known."""
        self.router = (
            Router(config.routing, width=shape[0])
            if config.moe and isinstance(config.routing, NetworkRoutingConfig)
            else None
        )
        self.branches = nn.ModuleList(
            [ExpertBranch(each, config.adaption, shape=shape) for each in config.expert.members]
        )
        self.fusion = (
            Fusion(config.expert, border=config.border) if isinstance(config.expert, FusionExpertConfig) else None
        )
        self.novelty = SubclassNovelty(statistics=2 * shape[0])
        self._found: Discovery | None = None
        self._experts = np.empty(0, dtype=np.int64)  # of each image of the fit data
        self._fitted_fusion: Fusion | None = None  # of a head that was fitted to all images
        self._first: int | None = None  # subclasses of the first training; None: all

    @property
    def _branches(self) -> list[ExpertBranch]:
        return [each for each in self.branches if isinstance(each, ExpertBranch)]

    @property
    def used(self) -> dict[int, ExpertBranch]:
        """The branches in use by their number; fusion removes those without any weight."""
        return {number: each for number, each in enumerate(self._branches) if each.number > 0}

    @property
    def branch(self) -> ExpertBranch:
        """The first branch in use."""
        return next(iter(self.used.values()))

    @property
    def can_exclude(self) -> bool:  # type: ignore[override]
        """Whether there is more than one expert."""
        return len(self.subclass_names) > 1

    @property
    def distributed(self) -> bool:  # type: ignore[override]
        """Whether nothing is trained by gradient, and no expert of a plug-in reads images one by one."""
        return self.router is None and all(branch.experts.distributed for branch in self._branches)

    def reuse(self, fitted: Head) -> None:
        """Take the scales and weights of the fusion."""
        assert isinstance(fitted, AdaptedMoE)
        self._fitted_fusion = fitted.fusion

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
        generator = torch.Generator().manual_seed(data.seed)
        if self.router is not None:
            self.router.start(subclasses=len(self.subclass_names), generator=generator)
        for branch in self._branches:
            branch.unit_scale(1)  # the fusion of an earlier fit may have removed it
            branch.adaption.fit(samples, subclasses, self._experts)
            branch.experts.start(experts=len(self.subclass_names), generator=generator)

    def _statistics(self, source: FeatureSource) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the statistics of every image, and the block statistics, (n, 2D) each."""
        samples, robust = per_image(source, _image_statistics)
        return samples.numpy(), robust.numpy()

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
        return (*routing, *self.branch.experts.stages(assign=self._assign, adapt=self.branch.adapt))

    @torch.no_grad()
    def finish(self, data: FitData) -> None:
        """Fit the experts in closed form, and measure the scale of each on held-out normals."""
        if self.fusion is None:
            self._fit_single(data)
        else:
            self._fit_fusion(data, self.fusion)
        origins = [branch.experts.origins for branch in self.used.values()]
        self.origins = next((each for each in origins if each is not None), None)

    def _fit_single(self, data: FitData) -> None:
        experts = self.branch.experts
        rows = np.arange(len(data))
        held_out = data.holdout.copy()
        held_out[last_of_expert(held_out, self._experts)] = False
        if experts.standardised:
            held_out[:] = False
        self._fit_branch(self.branch, data, rows[~held_out])
        measured = rows[held_out] if held_out.any() else rows
        self.branch.measure(
            _Adapted(data.features, self.branch, self._experts),
            measured[:0] if experts.standardised else measured,
            self._experts,
            number=len(self.subclass_names),
        )

    def _fit_branch(self, branch: ExpertBranch, data: FitData, rows: NDArray[np.int64]) -> None:
        """Fit the experts of a branch in closed form to these images."""
        branch.experts.fit(
            Normals(_Adapted(data.features, branch, self._experts), rows, self._experts[rows], data.groups[rows]),
            generator=torch.Generator().manual_seed(data.seed),
        )

    def _fit_fusion(self, data: FitData, fusion: Fusion) -> None:
        """Fit scales and weights of the fusion, if there are none to reuse, and the experts to all images."""
        number = len(self.subclass_names)
        categories = np.array([np.bincount(data.categories[self._experts == each]).argmax() for each in range(number)])
        for branch in self.used.values():
            branch.unit_scale(number)
        if self._fitted_fusion is None:
            self._measure(data, fusion, categories)
        else:
            fusion.copy(self._fitted_fusion, [data.category_names[category] for category in categories])
        for branch, used in zip(self._branches, fusion.used, strict=True):
            if not used:
                branch.remove()
        for branch in self.used.values():
            self._fit_branch(branch, data, np.arange(len(data)))

    def _measure(self, data: FitData, fusion: Fusion, categories: NDArray[np.int64]) -> None:
        """Fit scales and weights of the fusion on images that the experts were not fitted on."""
        fold = folds(data, self._experts)
        normal, defective = [], []
        for part in range(int(fold.max()) + 1):
            for branch in self.used.values():
                self._fit_branch(branch, data, np.flatnonzero(fold != part))
            normal.append(self.held_out(data, np.flatnonzero(fold == part))[0])
            if data.defects is not None:
                own = np.flatnonzero(fold[data.defects.images] == part)
                defective.append(self.held_out_defects(data, data.defects, own)[0])
        if not normal:  # one group only: nothing can be held out, and the scores come out too small
            for branch in self.used.values():
                self._fit_branch(branch, data, np.arange(len(data)))
            normal.append(self.held_out(data, np.arange(len(data)))[0])
        fusion.fit(
            HeldOut(*map(np.concatenate, zip(*normal, strict=True))),
            Defective(*map(np.concatenate, zip(*defective, strict=True))) if defective else None,
            categories=categories,
            names=data.category_names,
        )

    @torch.no_grad()
    def held_out(self, data: FitData, rows: NDArray[np.int64]) -> tuple[HeldOut, NDArray[np.int64]]:
        """Return the patch scores of these images by each branch in use, and the subclass that each is routed to."""
        patches, routed = self._scores(data.features, rows)
        return HeldOut(patches, data.categories[rows]), routed

    @torch.no_grad()
    def held_out_defects(
        self, data: FitData, defects: SyntheticDefects, rows: NDArray[np.int64]
    ) -> tuple[Defective, NDArray[np.int64]]:
        """Return the maps of these images with defects by each branch in use, and the subclass of each."""
        patches, routed = self._scores(defects.features, rows)
        coverage, categories = defects.coverage(rows).numpy(), data.categories[defects.images[rows]]
        return Defective(patches[:, :, 0], coverage, categories), routed

    def _scores(self, source: FeatureSource, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the patch scores (n, E, 2, h, w) of images by each branch, and the subclass (n,) of each."""
        if len(rows) == 0:
            return np.empty((0, len(self.used), 2, *self.grid), dtype=np.float32), np.empty(0, dtype=np.int64)
        patches, routed = per_image(source, self._scores_by_branch, rows=rows)
        return patches.numpy(), routed.numpy()

    def _scores_by_branch(self, features: Tensor) -> Tensors:
        """Return the patch scores (B, E, 2, h, w) of a few images by each branch, and the subclass (B,) of each."""
        _, choice, scored = self._route_and_score(features, self.novelty(block_statistics(features)), allowed=None)
        return torch.stack([patch_scores for patch_scores, _ in scored.values()], dim=1), choice.experts[:, 0]

    def defect_images(self, data: FitData) -> NDArray[np.int64]:
        """Return the fit images that are wanted with synthetic defects, each as often as wanted, ascending."""
        if self.fusion is None or self._fitted_fusion is not None:
            return np.empty(0, dtype=np.int64)
        held_out = np.flatnonzero(folds(data, np.zeros(len(data), dtype=np.int64)) >= 0)
        return np.repeat(held_out, defects_per_image(len(held_out)))

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
        others = self._numbers(features) != subclasses[:, None]  # (B, K)
        distances = self.novelty(block_statistics(features)).masked_fill(~others, torch.inf)
        return self._score(features, distances, allowed=others)

    @torch.no_grad()
    def embed(self, features: Tensor) -> Tensor:
        """Return x of the routing network (Eq. 1), (B, C), or the whitened statistics if there is no network."""
        if self.router is not None:
            embedding: Tensor = self.router(features)
            return embedding
        return self.novelty.whitened(block_statistics(features))

    # ---------------------------------------------------------------- subclasses after the training

    @property
    def first(self) -> int:
        """The number of subclasses of the first training; those after them were added."""
        return self.branch.number if self._first is None else self._first

    @torch.no_grad()
    def add(self, data: FitData) -> None:
        """Append a subclass that is fitted to these images of it; nothing of the others changes.

        An image uses only experts of the first training and of subclasses that were added before that to which it is
        nearest, so that the scores of images that are nearer to other subclasses keep every bit. The fusion is not
        fitted: `fusion.append` follows.

        Args:
            data: standardised features of images of one subclass, its name in `names`.
        """
        first, expert = self.first, self.branch.number
        _, robust = self._statistics(data.features)
        rows = np.arange(len(data))
        for branch in self.used.values():
            adapted = _Adapted(data.features, branch, np.full(len(data), expert))
            branch.experts.add(
                Normals(adapted, rows, np.zeros(len(data), dtype=np.int64), data.groups),
                first=first,
                generator=torch.Generator().manual_seed(data.seed),
            )
            branch.unit_scale(expert + 1)
        self.novelty.add(robust)
        self.subclass_names += data.names
        self._set_first(first)
        self.origins = next(
            (each for branch in self.used.values() if (each := branch.experts.origins) is not None), None
        )

    @property
    def growing(self) -> tuple[str, ...]:
        """As in `Head`; none of them as long as no subclass was added."""
        return () if self._first is None else growing(self)

    @torch.no_grad()
    def remove(self, subclass: int) -> None:
        """Remove an added subclass."""
        first = self.first
        for branch in self.used.values():
            branch.experts.remove(subclass, first=first)
        drop_row(self, subclass)
        self.subclass_names = tuple(name for k, name in enumerate(self.subclass_names) if k != subclass)
        self._set_first(first)

    def stored_by(self) -> NDArray[np.int64] | None:
        """Return the expert of each stored patch that `PatchScores.nearest` refers to; None if there are none."""
        owners = (getattr(branch.experts, "owner", None) for branch in self.used.values())
        return next((owner.numpy() for owner in owners if owner is not None), None)

    def _set_first(self, first: int) -> None:
        """Keep the number of subclasses of the first training, as a buffer too if there are others."""
        number = self.branch.number
        self._first = first if number > first else None
        self._buffers.pop("first_subclasses", None)
        self._buffers.pop("numbers", None)
        if self._first is not None:
            self.register_buffer("first_subclasses", torch.tensor([first]))
            self.register_buffer("numbers", torch.arange(number), persistent=False)
        for branch in self.used.values():
            branch.experts.set_number(number, first=first)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state` returned; raise BundleError if it does not fit."""
        first = tensors.get("first_subclasses")
        if first is None:
            super().load_state(tensors)
            return
        self.register_buffer("first_subclasses", torch.zeros(1, dtype=torch.int64))
        for branch in self._branches:  # make room, except in those that are not used
            name = f"branches.{self._branches.index(branch)}.scale_mean"
            if len(tensors.get(name, ())):
                branch.experts.set_number(2, first=1)
        super().load_state(tensors)
        self._set_first(int(first))

    def usable(self, distances: Tensor, allowed: Tensor | None) -> Tensor | None:
        """Return which of the allowed experts (B, K) may score each image; see `add`. None = all."""
        if self._first is None:
            return allowed
        latest = distances.argmin(dim=1, keepdim=True).clamp(min=self._first - 1)  # (B, 1)
        usable = self._numbers(distances) <= latest
        return usable if allowed is None else usable & allowed

    # ---------------------------------------------------------------- scores

    def _score(self, features: Tensor, distances: Tensor, *, allowed: Tensor | None) -> PatchScores:
        """Score with distances (B, K) to the known subclasses, by the experts (B, K) allowed; None = all."""
        samples, choice, scored = self._route_and_score(features, distances, allowed=allowed)
        if self.fusion is None:
            ((both, _),) = scored.values()
            scores = both[:, 0]
            own_scores = both[:, 1].amax(dim=(1, 2)) if self.branch.experts.maps > 1 else None
        else:
            scores, own_scores = self.fusion(
                {number: both for number, (both, _) in scored.items()}, choice.experts[:, 0]
            )
        adapted = torch.stack([branch.adaption.changes(samples) for branch in self.used.values()])
        weights = torch.zeros_like(self._by_expert(distances))
        return PatchScores(
            scores=scores,
            image_scores=own_scores,
            routing=Routing(
                weights=weights.scatter(1, choice.experts, choice.weights),
                subclass=choice.experts[:, 0],
                distance=distances.amin(dim=1),
                adapted=adapted.any(dim=0),
            ),
            nearest=next((nearest for _, nearest in scored.values() if nearest is not None), None),
        )

    def _route_and_score(
        self, features: Tensor, distances: Tensor, *, allowed: Tensor | None
    ) -> tuple[Tensor, Choice, dict[int, tuple[Tensor, Tensor | None]]]:
        """Return the statistics of each image, its experts, and the scores by each branch in use."""
        samples = statistics(features)
        allowed = self.usable(distances, allowed)
        choice = self._route(features, distances, samples=samples, allowed=allowed)
        scored = {
            number: self._branch_scores(branch, features, samples, choice, allowed)
            for number, branch in self.used.items()
        }
        return samples, choice, scored

    def _route(self, features: Tensor, distances: Tensor, *, samples: Tensor, allowed: Tensor | None) -> Choice:
        """Select the experts of each image."""
        if self.config.routing.method == "likelihood":
            every = self._numbers(features).expand(features.shape[0], -1)
            similarity = -self.branch(features, samples, every)[:, :, 0].mean(dim=(2, 3))
        elif self.router is not None:
            similarity = self.router.similarity(features)
        else:
            similarity = -distances
        similarity = self._by_expert(similarity)
        if allowed is not None:
            similarity = similarity.masked_fill(~allowed, -torch.inf)  # weight 0
        top_k = self.config.top_k if self._first is None else min(self.config.top_k, self._first)
        return select_experts(similarity, temperature=self.config.temperature, top_k=top_k)

    def _numbers(self, like: Tensor) -> Tensor:
        """Return the indices (K,) of the experts; with added ones a buffer, so that the graph does not depend on K."""
        if self._first is not None:
            return self.numbers
        return torch.arange(self.branch.number, device=like.device)

    def _by_expert(self, values: Tensor) -> Tensor:
        """Return values (B, subclasses) of the experts, (B, K): one may be that of all subclasses."""
        number = self.branch.number
        return values[:, :number] if values.shape[1] > number else values

    def _branch_scores(
        self, branch: ExpertBranch, features: Tensor, samples: Tensor, choice: Choice, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the patch scores (B, 2, h, w) and the nearest stored patches by one branch.

        The scores are the map, and the scores whose maximum is the image score.
        """
        nearest = None
        if branch.experts.united:
            adapted = branch.adaption(features, samples, choice.experts[:, :1])[:, 0]
            fused, nearest = branch.experts.score_united(adapted, allowed)  # (B, V, h, w)
        else:
            counts = None if allowed is None else allowed.gather(1, choice.experts)  # (B, T)
            fused = aggregate(
                branch(features, samples, choice.experts), choice.weights, how=self.config.aggregation, counts=counts
            )
        border = self.config.border if branch.config.border else 0
        if self.fusion is not None:  # which brings the cells next to the outermost ones to the scale of the others
            border = min(border, 1)
        scores = replace_border(fused[:, 0], border, grid=self.grid)
        return torch.stack([scores, fused[:, 1] if fused.shape[1] > 1 else scores], dim=1), nearest

    def _assign(self, features: Tensor, subclasses: Tensor) -> Tensor:
        """Return the expert of each training image, (B,)."""
        if not self.config.moe:
            return torch.zeros_like(subclasses)
        if self._found is None:
            return subclasses
        return torch.from_numpy(self._found.predict(statistics(features).cpu().numpy())).to(features.device)

    def notes(self) -> dict[str, Any]:
        """Return the type of the experts, the choice of the fusion, and the agreement of subclasses."""
        return {
            "experts": getattr(self.config.expert, DISCRIMINATOR),
            "fusion": None if self.fusion is None else self.fusion.record,
            "agreement": None if self.agreement is None else self.agreement._asdict(),
        }


class _Adapted:
    """The fit data, each image adapted for its own expert."""

    def __init__(self, source: FeatureSource, branch: ExpertBranch, experts: NDArray[np.int64]) -> None:
        self.source = source
        self.branch = branch
        self.experts = experts  # of each image of the source

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.source.shape

    def __len__(self) -> int:
        return len(self.source)

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        own = torch.from_numpy(self.experts[np.asarray(rows)])
        return adapt(self.branch.adaption, self.source.read(rows), own)

    def over(self, statistics: Statistics[T], merge: Merge[T], rows: NDArray[np.int64], aligned: Tensors) -> T:
        """Return the merged statistics of these images; see `passes.over`."""
        own = torch.from_numpy(self.experts[rows])
        adapted = partial(_adapted, statistics, self.branch.adaption)
        return over(self.source, adapted, merge=merge, rows=rows, aligned=(own, *aligned))


def _adapted(statistics: Statistics[T], adaption: Adaption, batches: Batches) -> T:
    return statistics((adapt(adaption, features, experts), *own) for features, experts, *own in batches)


def _image_statistics(features: Tensor) -> Tensors:
    return statistics(features), block_statistics(features)


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
