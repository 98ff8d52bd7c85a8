"""Adapted-MoE: route an image, adapt it, ask the experts, put their answers together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.config import (
    AdaptedMoEConfig,
    AdaptionConfig,
    AutoExpertConfig,
    DiscriminatorExpertConfig,
    ExpertConfig,
    GaussianExpertConfig,
    GuardedAdaptionConfig,
    LayoutExpertConfig,
    MemoryExpertConfig,
    NetworkRoutingConfig,
    PlainAdaptionConfig,
    SubspaceExpertConfig,
)
from normweave.errors import DataError
from normweave.heads import state
from normweave.heads.adapted_moe.adaption import (
    Adaption,
    FullAdaption,
    GuardedAdaption,
    NoAdaption,
    PaperAdaption,
    statistics,
)
from normweave.heads.adapted_moe.discovery import (
    BATCH_IMAGES,
    Agreement,
    Discovery,
    agreement,
    discover,
    place_explains,
)
from normweave.heads.adapted_moe.experts import (
    Discriminators,
    DiscriminatorStage,
    Experts,
    Gaussians,
    Layouts,
    Memories,
    Normals,
    Subspaces,
)
from normweave.heads.adapted_moe.router import Router, RouterStage, choose
from normweave.heads.base import Head, TrainingStage
from normweave.heads.grid import replace_border
from normweave.heads.novelty import SubclassNovelty, block_statistics
from normweave.types import FeatureSource, FitData, PatchScores, Routing

FEWEST_HELD_OUT = 3
"""An expert's scale needs so many held-out normals of its own; with fewer it takes that of all together."""

Kind = Literal["layout", "gaussian", "subspace", "memory", "discriminator"]


class Way(nn.Module):
    """A kind of experts, and the adaption under which they work."""

    scale_mean: Tensor  # (K,) of each expert's patch scores on held-out normals of its own subclass
    scale_deviation: Tensor  # (K,)

    def __init__(self, *, adaption: Adaption, experts: Experts) -> None:
        super().__init__()
        self.adaption = adaption
        self.experts = experts
        self.register_buffer("scale_mean", torch.zeros(1))
        self.register_buffer("scale_deviation", torch.ones(1))

    @property
    def number(self) -> int:
        """K experts; 0 when this way is not taken."""
        return len(self.scale_mean)

    def take(self, taken: bool) -> None:
        """Open this way, or forget its experts. The sizes say which, so that it survives saving."""
        self.scale_mean, self.scale_deviation = torch.zeros(int(taken)), torch.ones(int(taken))
        if not taken:
            for name, tensor in list(self.experts.state_dict().items()):
                place, _, leaf = name.rpartition(".")
                setattr(self.experts.get_submodule(place), leaf, tensor[:0].clone())

    def forward(self, features: Tensor, samples: Tensor, asked: Tensor) -> Tensor:
        """Scores of (B, D, h, w) with `statistics` (B, 2D) by the experts asked (B, T), all on one scale.

        Returns:
            (B, T, V, h, w); see `experts`.
        """
        scores: Tensor = self.experts(self.adaption(features, samples, asked), asked)
        mean, deviation = self.scale_mean[asked], self.scale_deviation[asked]  # (B, T) each
        return (scores - mean[..., None, None, None]) / deviation[..., None, None, None]


class AdaptedMoE(Head):
    """Mixture of experts with test-time adaption, for subclasses of normal seen and unseen.

    arXiv 2409.05611. An image is routed (Eq. 1-2), adapted (Eq. 5-6 and others) and scored by the top k experts; Eq. 4
    puts their patch scores together, each brought to mean 0 and deviation 1 on held-out normals (ours).

    Args:
        shape: (D, h, w) of the features.
        routing: `network` is the paper's; `statistics` takes the distance of image statistics to those of each
            subclass; `likelihood` asks all experts, and those that find the image most usual on the whole count.
        router: the routing network; for `network` only.
        ways: one; or two, of which the first is taken where the place in the image explains something
            (`place_explains` > placed), and the second elsewhere.
        fine: channels in which that is looked for, finest stages first.
        moe: one expert a subclass; off = one for all, which needs no routing.
        top_k: experts that count, at most.
        temperature: of the routing softmax.
        aggregation: `paper` is Eq. 4; `min` the least anomalous of the experts; `mean` gives all the same weight.
        border: outermost cells that take the score of their inner neighbours.
        discover_always: find subclasses even where they are given, and say how well they agree.
        discovery, max_subclasses: how subclasses are found, and how many at most.
        router_schedule, expert_schedule: of the stages.
    """

    def __init__(
        self, config: AdaptedMoEConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.config = config
        self.subclass_names: tuple[str, ...] = ()
        self.agreement: Agreement | None = None
        """How discovered subclasses compare to the given ones, where both are known."""
        self.place: float | None = None
        """Share of the variance that the position in the image explains, where that decided on the experts."""
        self.router = (
            Router(config.routing, width=shape[0])
            if config.moe and isinstance(config.routing, NetworkRoutingConfig)
            else None
        )
        self.ways = nn.ModuleList([_way(expert, config, shape) for expert in config.expert.candidates])
        self.kinds = SubclassNovelty(statistics=2 * shape[0])
        self.fine = max(1, round(getattr(config.expert, "fine", 1.0) * shape[0]))
        self.grid = shape[1:]
        self._found: Discovery | None = None
        self._experts = np.empty(0, dtype=np.int64)  # of each image of the fit data

    @property
    def way(self) -> Way:
        """The way that is taken."""
        return next(way for way in self.ways if isinstance(way, Way) and way.number > 0)

    @property
    def can_exclude(self) -> bool:  # type: ignore[override]
        """Whether there is more than one expert to leave out."""
        return len(self.subclass_names) > 1

    @torch.no_grad()
    def begin(self, data: FitData) -> None:
        """Find the subclasses where they are not given, learn their statistics, and decide on the experts.

        Raises:
            DataError: no image, or a named subclass without one.
        """
        if len(data) == 0:
            raise DataError("Adapted-MoE has no normal image to learn from. Give it at least one.")
        samples, robust = self._statistics(data.features)
        kinds, names = self._subclasses(data, samples)
        self._experts = kinds if self.config.moe else np.zeros_like(kinds)
        self.subclass_names = names if self.config.moe or len(names) == 1 else ("all",)
        self.kinds.fit(robust, kinds)
        if isinstance(self.config.expert, AutoExpertConfig):
            layout, texture = cast(tuple[Way, Way], tuple(self.ways))
            self.place = place_explains(data, channels=self.fine)
            layout.take(self.place > self.config.expert.position_variance)
            texture.take(self.place <= self.config.expert.position_variance)
        self.way.adaption.fit(samples, kinds, self._experts)
        generator = torch.Generator().manual_seed(data.seed)
        if self.router is not None:
            self.router.start(subclasses=len(self.subclass_names), generator=generator)
        if isinstance(self.way.experts, Discriminators):
            self.way.experts.start(experts=len(self.subclass_names), generator=generator)

    def _statistics(self, source: FeatureSource) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """s of every image, and without local defects, (n, 2D) each."""
        shape = (len(source), 2 * source.shape[0])
        samples, robust = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
        for start in range(0, len(source), BATCH_IMAGES):
            few = np.arange(start, min(start + BATCH_IMAGES, len(source)))
            features = source.read(few)
            samples[few] = statistics(features).numpy()
            robust[few] = block_statistics(features).numpy()
        return samples, robust

    def _subclasses(
        self, data: FitData, samples: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Number of each image's subclass, and the names."""
        given = bool((data.subclasses >= 0).all())
        self._found, self.agreement = None, None
        if given and self.config.discover != "always":
            counts = np.bincount(data.subclasses, minlength=len(data.names))
            if empty := [name for name, count in zip(data.names, counts, strict=True) if count == 0]:
                raise DataError(
                    f"No normal image is left to learn {', '.join(empty)} from. "
                    "Give these subclasses more images, or hold out fewer (data.calibration_share)."
                )
            return data.subclasses, data.names
        self._found = discover(
            samples, method=self.config.discovery, most=self.config.max_subclasses, seed=data.seed
        )
        kinds = self._found.kinds(samples)
        if given:
            self.agreement = agreement(kinds, data.subclasses)
        return kinds, tuple(f"found-{number + 1}" for number in range(len(self._found.centres)))

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """The router, where there is something to route between, and the experts that gradients train."""
        stages: list[TrainingStage] = []
        if self.router is not None and len(self.subclass_names) > 1:
            stages.append(RouterStage(self.router, subclass_of=self._experts_of))
        if isinstance(self.way.experts, Discriminators):
            stages.append(
                DiscriminatorStage(
                    self.way.experts,
                    expert_of=self._experts_of,
                    adapt=self._adapt_to,
                )
            )
        return stages

    @torch.no_grad()
    def finish(self, data: FitData) -> None:
        """Fit the experts that are in closed form, and measure the scale of each on held-out normals."""
        way = self.way
        rows = np.arange(len(data))
        held_out = data.holdout.copy()
        for expert in range(len(self.subclass_names)):
            own = self._experts == expert
            if held_out[own].all():  # too few to hold any out
                held_out[own] = False
        if way.experts.standardised:
            held_out[:] = False
        source = _Adapted(data.features, self)
        fit = rows[~held_out]
        way.experts.fit(
            Normals(source, fit, self._experts[fit], data.groups[fit]),
            generator=torch.Generator().manual_seed(data.seed),
        )
        way.scale_mean = torch.zeros(len(self.subclass_names))
        way.scale_deviation = torch.ones(len(self.subclass_names))
        if not way.experts.standardised:
            self._measure(source, rows[held_out] if held_out.any() else rows)

    def _measure(self, source: FeatureSource, rows: NDArray[np.int64]) -> None:
        """Mean and deviation of each expert's patch scores on these images of its own."""
        K = len(self.subclass_names)
        images = np.zeros(K)
        sums = np.zeros((K, 2))  # of scores and of their squares, a patch
        for start in range(0, len(rows), BATCH_IMAGES):
            few = rows[start : start + BATCH_IMAGES]
            own = self._experts[few]
            scores = self.way.experts(source.read(few)[:, None], torch.from_numpy(own)[:, None])
            flat = scores.flatten(1).double().numpy()  # (B, P)
            np.add.at(images, own, 1)
            np.add.at(sums, own, np.stack([flat.mean(axis=1), (flat**2).mean(axis=1)], axis=1))
        few_images = images < FEWEST_HELD_OUT
        sums[few_images] = sums.sum(axis=0)
        images[few_images] = len(rows)
        mean, square = (sums / images[:, None]).T  # (K,) each
        self.way.scale_mean = torch.from_numpy(mean).float()
        self.way.scale_deviation = torch.from_numpy(np.sqrt(np.maximum(square - mean**2, 1e-12))).float()

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        return self._score(features, self.kinds(block_statistics(features)), allowed=None)

    @torch.no_grad()
    def score_excluding(self, features: Tensor, subclasses: Tensor) -> PatchScores:
        """How images would score if the head did not have the expert of their own subclass.

        The line for images of unseen subclasses can be drawn from this. With one expert it is `forward`.

        Args:
            features: (B, D, h, w).
            subclasses: (B,) indices into `subclass_names`; -1 leaves an image all experts.
        """
        K = self.way.number
        if K == 1:
            return self.forward(features)
        others = torch.arange(K, device=features.device) != subclasses[:, None]  # (B, K)
        distances = self.kinds(block_statistics(features)).masked_fill(~others, torch.inf)
        return self._score(features, distances, allowed=others)

    @torch.no_grad()
    def embed(self, features: Tensor) -> Tensor:
        """The routing network's x (Eq. 1), (B, C); without a network the statistics that distances are taken of."""
        if self.router is not None:
            placed: Tensor = self.router(features)
            return placed
        return self.kinds.whitened(block_statistics(features))

    def _score(self, features: Tensor, distances: Tensor, *, allowed: Tensor | None) -> PatchScores:
        """Score with distances (B, K) to the known kinds, by the experts (B, K) allowed; None = all."""
        way = self.way
        samples = statistics(features)
        everyone = torch.arange(way.number, device=features.device).expand(features.shape[0], -1)
        scores = (
            way(features, samples, everyone) if self.config.routing.method == "likelihood" else None
        )  # (B, K, V, h, w)
        if scores is not None:
            similarity = -scores[:, :, 0].mean(dim=(2, 3))
        elif self.router is not None:
            similarity = self.router.similarity(features)
        else:
            similarity = -distances
        similarity = similarity[
            :, : way.number
        ]  # with one expert for all, the kinds of normal may still be many
        if allowed is not None:
            similarity = similarity.masked_fill(~allowed, -torch.inf)  # weighs 0
        choice = choose(similarity, temperature=self.config.temperature, top_k=self.config.top_k)
        if scores is None:
            scores = way(features, samples, choice.experts)  # (B, T, V, h, w)
        else:
            chosen = choice.experts[..., None, None, None].expand(-1, -1, *scores.shape[2:])
            scores = scores.gather(1, chosen)  # (B, T, V, h, w)
        counts = None if allowed is None else allowed.gather(1, choice.experts)  # (B, T)
        fused = aggregate(scores, choice.weights, how=self.config.aggregation, counts=counts)  # (B, V, h, w)
        # Layout experts have measured what is usual at the border as everywhere else.
        border = 0 if isinstance(way.experts, Layouts) else self.config.border
        weights = features.new_zeros(features.shape[0], way.number)
        return PatchScores(
            scores=replace_border(fused[:, 0], border, grid=self.grid),
            image_scores=fused[:, 1].amax(dim=(1, 2)) if fused.shape[1] > 1 else None,
            routing=Routing(
                weights=weights.scatter(1, choice.experts, choice.weights),
                subclass=choice.experts[:, 0],
                distance=distances.amin(dim=1),
                adapted=way.adaption.changes(samples),
            ),
        )

    def _experts_of(self, features: Tensor, subclasses: Tensor) -> Tensor:
        """The expert that each training image belongs to, (B,)."""
        if not self.config.moe:
            return torch.zeros_like(subclasses)
        if self._found is None:
            return subclasses
        return torch.from_numpy(self._found.kinds(statistics(features).cpu().numpy())).to(features.device)

    def _adapt_to(self, features: Tensor, experts: Tensor) -> Tensor:
        """Training images as their own (B,) experts see them, (B, D, h, w)."""
        adapted: Tensor = self.way.adaption(features, statistics(features), experts[:, None])
        return adapted[:, 0]

    def notes(self) -> dict[str, Any]:
        """What was decided while fitting: kind of experts, share explained by place, agreement of found subclasses."""
        return {
            "experts": type(self.way.experts).__name__.lower(),
            "place": self.place,
            "agreement": None if self.agreement is None else self.agreement._asdict(),
        }

    def state(self) -> dict[str, Tensor]:
        """Everything fitted."""
        return state.state(self)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave, for any number of subclasses."""
        state.load_state(self, tensors)


class _Adapted:
    """The fit data as the experts see them: each image adapted to its own."""

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
        return self.head._adapt_to(self.source.read(rows), own)


def aggregate(
    scores: Tensor,
    weights: Tensor,
    *,
    how: Literal["paper", "min", "mean"],
    counts: Tensor | None = None,
) -> Tensor:
    """Put the experts' scores together: (B, T, ...) and weights (B, T) to (B, ...).

    `paper` is Eq. 4, sum_k w_k Expert_k(x) / sum_k w_k over the experts that count.

    Args:
        counts: (B, T) bool, at least one of each row; an expert that does not count weighs 0. None = all count.
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


def _way(expert: ExpertConfig, config: AdaptedMoEConfig, shape: tuple[int, int, int]) -> Way:
    adaption = config.adaption
    if adaption.method == "auto":
        match expert:
            case LayoutExpertConfig() | SubspaceExpertConfig():
                adaption = PlainAdaptionConfig(method="off")
            case GaussianExpertConfig():
                adaption = PlainAdaptionConfig(method="full")
            case _:
                adaption = GuardedAdaptionConfig()
    # Patches of length one have channels that deviate by about 1 / sqrt(D).
    unit = shape[0] ** -0.5 if adaption.method == "paper" else 1.0
    return Way(adaption=_adaption(adaption, shape[0]), experts=_experts(expert, shape, unit=unit))


def _adaption(config: AdaptionConfig, width: int) -> Adaption:
    if isinstance(config, GuardedAdaptionConfig):
        return GuardedAdaption(
            width=width, directions=config.directions, prior=config.prior, shrinkage=config.shrinkage
        )
    match config.method:
        case "full":
            return FullAdaption()
        case "paper":
            return PaperAdaption(width=width)
        case _:
            return NoAdaption()


def _experts(config: ExpertConfig, shape: tuple[int, int, int], *, unit: float) -> Experts:
    width = shape[0]
    match config:
        case LayoutExpertConfig():
            return Layouts(
                shape=shape,
                coarse=max(1, width - max(1, round(config.fine * width))),
                cells=config.cells,
                variance=config.variance,
                most=config.components,
                own=config.own,
                max_images=config.max_images,
            )
        case GaussianExpertConfig():
            return Gaussians(
                channels=max(1, round(config.fine * width)), pooled=config.pooled, shrinkage=config.shrinkage
            )
        case SubspaceExpertConfig():
            return Subspaces(
                shape=shape, cells=config.cells, variance=config.variance, max_images=config.max_images
            )
        case MemoryExpertConfig():
            return Memories(
                width=width,
                max_patches=config.max_patches,
                max_pool=config.max_pool,
                projection=config.projection,
                calibrated=config.calibrated,
            )
        case DiscriminatorExpertConfig():
            return Discriminators(config, width=width, unit=unit)
        case AutoExpertConfig():
            raise AssertionError("auto is resolved to its candidates")
