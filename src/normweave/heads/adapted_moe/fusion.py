"""Fusion of experts: their scores on one scale, weighted by how well they find synthetic defects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.config import FusionExpertConfig
from normweave.heads.adapted_moe.border import BorderScale
from normweave.types import FitData

FOLDS = 4
FEWEST_HELD_OUT = 12
"""Held-out images of a category that are enough for its scales and weights; with fewer, all are held out in turn."""
FEWEST_OF_CATEGORY = 4
"""Held-out images that a category needs for scales and weights of its own; with fewer it has those of all."""
MOST_OF_CATEGORY = 200
"""Images of a category that are held out, about; more do not change scales and weights, but need memory and time."""
LEVEL = 0.1
"""The level of a map is the quantile at this share of its patch scores."""
LIMIT = 0.5
"""A map is lowered by at most this share of the range from the median to the highest level of held-out normals."""
COVERED = 0.5
"""A cell of the grid belongs to a defect that covers this share of it, or as much of it as of any other cell."""
HIGHEST_AUROC = 0.995
"""Higher values count as this one, since a small number of images cannot tell them apart."""


class HeldOut(NamedTuple):
    """Patch scores of m normal images that the experts were not fitted on."""

    patches: NDArray[np.float32]  # (m, E, 2, h, w) the map, and the scores whose maximum is the image score
    categories: NDArray[np.int64]  # (m,)

    @property
    def maps(self) -> NDArray[np.float32]:
        """(m, E, h, w)."""
        return self.patches[:, :, 0]

    @property
    def scores(self) -> NDArray[np.float64]:
        """(m, E, 2) maximum of the map, and image score."""
        return np.asarray(self.patches.max(axis=(3, 4)), dtype=np.float64)

    @property
    def levels(self) -> NDArray[np.float64]:
        """(m, E) of the patch scores whose maximum is the image score."""
        return level(torch.from_numpy(self.patches[:, :, 1])).numpy().astype(np.float64)


class Defective(NamedTuple):
    """Maps of m images with a synthetic defect that the experts were not fitted on."""

    maps: NDArray[np.float32]  # (m, E, h, w)
    coverage: NDArray[np.float32]  # (m, h, w) share of each cell that the defect covers
    categories: NDArray[np.int64]  # (m,)


Images = TypeVar("Images", HeldOut, Defective)


def of_category(images: Images, category: int) -> Images:
    """Return the images of a category."""
    chosen = images.categories == category
    return type(images)(*(each[chosen] for each in images))


class Fusion(nn.Module):
    """Weighted mean of the scores of E experts, each on the scale of held-out normal images.

    Not from a paper. Patch scores near the border are brought to the scale of the others first, by `BorderScale`. For
    the subclass k that an image is routed to,

        score = sum over e of w_ke (score_e - excess_e - median_ke) / (q90_ke - median_ke)
        map = sum over e of w_ke (map_e - median_ke) / (q90_ke - median_ke) * depth / depth_k - min(excess, limit_k)

    where median and q90, the quantile at 0.9, are those of the image scores of held-out normal images of the category
    of k; for the map, those of its maximum. depth_k is how far a typical normal patch is below 0, sum over e of
    w_ke (median_ke - low_ke) / (q90_ke - median_ke) with the median low of all patch scores, and depth the median over
    the subclasses k: maps of all categories have one scale, and that of one category is as if there were no others.
    In an image of an unseen subclass the normal patches have higher scores, too: `excess` is what the level of its
    patch scores, see `level`, is above the highest level of these held-out images, or 0. A defect changes it only if it
    covers nine tenths of the image. From the map, the excess of its own level is taken off. Since there are defects
    that cover most of an image, it is limited: limit_k is `LIMIT` times the highest level minus the median level.

    The weights are proportional to exp(sharpness * logit(AUROC_ke)), with the mean over synthetic defects in held-out
    normal images of the category of `patch_auroc`, by expert e. An expert whose weight is below `smallest_weight` is
    not used in the category.
    """

    weights: Tensor  # (K, E), rows sum to 1
    centre: Tensor  # (K, E, 2) median, of the map's maximum and of the image score
    spread: Tensor  # (K, E, 2) q90 - median; of the map, times depth_k / depth
    highest: Tensor  # (K, E) highest level of the scores whose maximum is the image score
    map_highest: Tensor  # (K,) highest level of the map
    limit: Tensor  # (K,) what is taken off a map at most

    by_subclass = ("weights", "centre", "spread", "highest", "map_highest", "limit")

    def __init__(self, config: FusionExpertConfig, *, border: int) -> None:
        super().__init__()
        self.config = config
        self.border = BorderScale([each.border for each in config.members], width=border)
        experts = len(config.members)
        self.register_buffer("weights", torch.full((1, experts), 1 / experts))
        self.register_buffer("centre", torch.zeros(1, experts, 2))
        self.register_buffer("spread", torch.ones(1, experts, 2))
        self.register_buffer("highest", torch.full((1, experts), torch.inf))
        self.register_buffer("map_highest", torch.full((1,), torch.inf))
        self.register_buffer("limit", torch.zeros(1))
        self.record: list[dict[str, Any]] = []
        self.names: tuple[str, ...] = ()  # category of each row of the buffers, known after fit

    def fit(
        self, normal: HeldOut, defective: Defective | None, *, categories: NDArray[np.int64], names: Sequence[str]
    ) -> None:
        """Fit scales and weights.

        Args:
            normal: held-out normal images.
            defective: held-out normal images with synthetic defects; none, or None, gives equal weights.
            categories: (K,) the category of each subclass.
            names: of the categories.
        """
        shape = (len(categories), normal.patches.shape[1])
        (weights, highest), (centre, spread) = np.empty((2, *shape)), np.empty((2, *shape, 2))
        depth, map_highest, limit = np.empty((3, len(categories)))
        self.record = []
        present, place = np.unique(categories, return_inverse=True)
        maps = [of_category(normal, category).maps for category in present]
        self.border.fit([own if len(own) >= FEWEST_OF_CATEGORY else normal.maps for own in maps], place)
        normal = normal._replace(patches=self._scaled(normal.patches, normal.categories, categories))
        if defective is not None:
            scaled = self._scaled(defective.maps[:, :, None], defective.categories, categories)
            defective = defective._replace(maps=scaled[:, :, 0])
        for category in present:
            own, bad = of_category(normal, category), defective and of_category(defective, category)
            if len(own.patches) < FEWEST_OF_CATEGORY:
                own, bad = normal, defective
            aurocs = _aurocs(own, bad)
            chosen = self._weights(aurocs)
            members = categories == category
            highest[members] = own.levels.max(axis=0)
            weights[members] = chosen
            centre[members], spread[members], depth[members] = scales = _scales(own, chosen)
            map_highest[members], limit[members] = _map_levels(own.maps, chosen, *scales[:2])
            found = dict(zip(self.config.use, aurocs.tolist(), strict=True))
            self.record.append(self._note(names[category], own, bad, found, chosen, float(depth[members][0])))
        relative = depth / np.median(depth)
        spread[:, :, 0] *= relative[:, None]
        self._set(weights, centre, spread, highest, map_highest / relative, limit / relative)
        self.names = tuple(names[category] for category in categories)

    def copy(self, fitted: Fusion, categories: Sequence[str]) -> None:
        """Take scales and weights of a fusion that was fitted to these categories, one for each subclass, or more."""
        rows = [fitted.names.index(name) for name in categories]
        for name in self.by_subclass:
            setattr(self, name, getattr(fitted, name)[rows].clone())
        self.border.copy(fitted.border, rows)
        self.names = tuple(categories)

    def _set(self, *rows: NDArray[np.float64], appended: bool = False) -> None:
        """Set the buffers in `by_subclass` to these rows, or append them."""
        for name, values in zip(self.by_subclass, rows, strict=True):
            new = torch.from_numpy(values).float()
            setattr(self, name, torch.cat([getattr(self, name), new]) if appended else new)

    def _scaled(
        self, patches: NDArray[np.float32], owners: NDArray[np.int64], categories: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return the patch scores (m, E, V, h, w) of images of the categories (m,) on the scale of the inner cells.

        Args:
            categories: (K,) of the subclasses. The scores of an image of another category do not count.
        """
        return self.border.scaled(patches, (owners[:, None] == categories).argmax(axis=1))

    def append_like(self, subclass: int) -> None:
        """Append scales and weights of an added subclass: those of its category, which this other one has."""
        self.border.append_like(subclass)
        for name in self.by_subclass:
            rows = getattr(self, name)
            setattr(self, name, torch.cat([rows, rows[subclass, None]]))

    def append(self, normal: HeldOut, defective: Defective | None, *, category: str, depth: float | None) -> None:
        """Append scales and weights of an added subclass of a new category; those of the others do not change.

        Args:
            normal, defective: held-out images of the subclass, by the experts in use.
            category: of the subclass.
            depth: of the maps of the first training; None: not known, or one category.
        """
        used = np.flatnonzero(self.used)
        E = len(self.config.use)
        weights, highest, centre, spread = np.zeros(E), np.zeros(E), np.zeros((E, 2)), np.ones((E, 2))
        self.border.append(normal.maps, used)

        def scaled(patches: NDArray[np.float32]) -> NDArray[np.float32]:
            return self.border.scaled(patches, np.full(len(patches), len(self.border.gain) - 1), used)

        normal = normal._replace(patches=scaled(normal.patches))
        if defective is not None:
            defective = defective._replace(maps=scaled(defective.maps[:, :, None])[:, :, 0])
        aurocs = _aurocs(normal, defective)
        weights[used] = self._weights(aurocs)
        highest[used] = normal.levels.max(axis=0)
        centre[used], spread[used], own_depth = _scales(normal, weights[used])
        spread[:, 0] *= 1 if depth is None else own_depth / depth
        map_levels = _map_levels(normal.maps, weights[used], centre[used], spread[used])
        rows = (weights, centre, spread, highest, *map(np.asarray, map_levels))
        self._set(*(row[None] for row in rows), appended=True)
        found = dict(zip((self.config.use[e] for e in used), aurocs.tolist(), strict=True))
        self.record.append(self._note(category, normal, defective, found, weights, own_depth))

    def _note(
        self,
        category: str,
        normal: HeldOut,
        defective: Defective | None,
        aurocs: Mapping[str, float],
        weights: NDArray[np.float64],
        depth: float | None,
    ) -> dict[str, Any]:
        """Return what was measured in a category, as JSON values; an expert that is not in use has AUROC 0.5."""
        return {
            "category": category,
            "held_out_images": len(normal.maps),
            "synthetic_defects": 0 if defective is None else len(defective.maps),
            "depth": depth,
            "experts": [
                {"name": name, "synthetic_auroc": aurocs.get(name, 0.5), "weight": float(weight)}
                for name, weight in zip(self.config.use, weights, strict=True)
            ],
        }

    def _weights(self, aurocs: NDArray[np.float64]) -> NDArray[np.float64]:
        limited = np.clip(aurocs, 0.5, HIGHEST_AUROC)
        raw = np.exp(self.config.sharpness * np.log(limited / (1 - limited)))
        weights = raw / raw.sum()
        weights[weights < min(self.config.smallest_weight, weights.max())] = 0
        return np.asarray(weights / weights.sum())

    @property
    def used(self) -> list[bool]:
        """Whether each expert has a weight in any category."""
        return [bool(each) for each in (self.weights > 0).any(dim=0)]

    def forward(self, scores: Mapping[int, Tensor], subclass: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse the patch scores of the experts in use.

        Args:
            scores: by the number of the expert (B, 2, h, w): the map, and the scores whose maximum is the image score.
            subclass: (B,) the subclass that each image is routed to.

        Returns:
            The map (B, h, w) and the image score (B,).
        """
        used = list(scores)
        weights, highest = self.weights[:, used][subclass], self.highest[:, used][subclass]  # (B, E') each
        centre, spread = self.centre[:, used][subclass], self.spread[:, used][subclass]  # (B, E', 2) each
        each = torch.stack([self.border(scores[e], subclass, e) for e in used], dim=1)  # (B, E', 2, h, w)
        excess = (level(each[:, :, 1]) - highest).clamp(min=0)
        peaks = each[:, :, 1].amax(dim=(2, 3)) - excess
        factor = weights[..., None] / spread
        maps = (each[:, :, 0] - centre[..., 0, None, None]) * factor[..., 0, None, None]
        images = (peaks - centre[..., 1]) * factor[..., 1]
        fused = maps.sum(dim=1)
        excess = (level(fused) - self.map_highest[subclass]).clamp(min=0)
        return fused - torch.minimum(excess, self.limit[subclass])[:, None, None], images.sum(dim=1)


def _aurocs(normal: HeldOut, defective: Defective | None) -> NDArray[np.float64]:
    """Return `patch_auroc` of each expert, (E,); 0.5 without defects."""
    if defective is None:
        return np.full(normal.patches.shape[1], 0.5)
    pairs = zip(normal.maps.swapaxes(0, 1), defective.maps.swapaxes(0, 1), strict=True)
    return np.array([patch_auroc(own, bad, defective.coverage) for own, bad in pairs])


def _scales(normal: HeldOut, weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Return the median (E, 2) of the scores, q90 - median (E, 2), and depth_k for these weights (E,)."""
    median, high = np.quantile(normal.scores, [0.5, 0.9], axis=0)  # (E, 2) each
    wide = np.maximum(high - median, 1e-6)
    low = np.median(normal.maps, axis=(0, 2, 3))  # (E,)
    return median, wide, max(float(weights @ ((median[:, 0] - low) / wide[:, 0])), 1e-6)


def _map_levels(
    maps: NDArray[np.float32], weights: NDArray[np.float64], centre: NDArray[np.float64], spread: NDArray[np.float64]
) -> tuple[float, float]:
    """Return the highest level of the fused maps of normal images, and what is taken off a map at most.

    Args:
        maps: (m, E, h, w).
        weights: (E,).
        centre, spread: (E, 2).
    """
    scaled = (maps - centre[:, 0, None, None]) * (weights / spread[:, 0])[:, None, None]
    levels = level(torch.from_numpy(scaled.sum(axis=1))).numpy()  # (m,)
    return float(levels.max()), LIMIT * float(levels.max() - np.median(levels))


def level(maps: Tensor) -> Tensor:
    """Return the quantile at `LEVEL` of the patch scores of each map (..., h, w), (...)."""
    scores = maps.flatten(-2)
    lowest = scores.topk(math.ceil(LEVEL * scores.shape[-1]), dim=-1, largest=False).values
    return lowest.amax(dim=-1)


def patch_auroc(normal: NDArray[np.float32], defective: NDArray[np.float32], coverage: NDArray[np.float32]) -> float:
    """Return the mean over defects of the AUROC of their patches against all patches of normal images.

    That is the share of pairs in which the patch of the defect has the higher score, ties counted half. Each defect
    counts the same, whatever its size.

    Args:
        normal: (n, h, w) maps of normal images.
        defective: (m, h, w) maps of images with a defect.
        coverage: (m, h, w) share of each cell that the defect covers; a defect that covers nothing does not count.

    Returns:
        0..1; 0.5 for no defect.
    """
    most = coverage.max(axis=(1, 2), keepdims=True, initial=0)
    belongs = (coverage >= np.minimum(COVERED, most)) & (most > 0)
    defect = np.nonzero(belongs)[0]  # of each patch
    if len(defect) == 0:
        return 0.5
    ascending = np.sort(normal, axis=None)
    lower, equal_or_lower = (np.searchsorted(ascending, defective[belongs], side=side) for side in ("left", "right"))
    shares = (lower + equal_or_lower) / (2 * len(ascending))
    counts = np.bincount(defect)
    return float((np.bincount(defect, weights=shares)[counts > 0] / counts[counts > 0]).mean())


def folds(data: FitData, experts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the fold (n,) in which each fit image is held out; -1: in none.

    The held-out images of `data` are one fold if each category has at least `FEWEST_HELD_OUT`. Otherwise the groups are
    divided into `FOLDS` folds. Of a category with more than `MOST_OF_CATEGORY` such images only some groups, drawn at
    random, are held out, with about this number of images. The last images of an expert are never held out.
    """
    held_out = np.bincount(data.categories[data.holdout], minlength=len(data.category_names))
    if held_out.min() >= FEWEST_HELD_OUT:
        fold = np.where(data.holdout, 0, -1)
    else:
        names, members = np.unique(data.groups, return_inverse=True)
        order = np.random.default_rng(data.seed).permutation(len(names))
        fold = order[members] % min(FOLDS, len(names))
        if len(names) == 1:
            fold = np.full(len(data), -1)
    for category in range(len(data.category_names)):
        members = (data.categories == category) & (fold >= 0)
        groups = np.unique(data.groups[members])
        most = math.ceil(len(groups) * MOST_OF_CATEGORY / max(members.sum(), MOST_OF_CATEGORY))
        kept = np.random.default_rng(data.seed).permutation(groups)[:most]
        fold[members & ~np.isin(data.groups, kept)] = -1
    for number in range(int(fold.max(initial=-1)) + 1):
        fold[last_of_expert(fold == number, experts)] = -1
    return np.asarray(fold, dtype=np.int64)


def last_of_expert(held_out: NDArray[np.bool_], experts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which images (n,) are of an expert whose images are all held out, so that they are needed for the fit."""
    return ~np.isin(experts, experts[~held_out])


def defects_per_image(held_out: int, *, wanted: int = 128, most: int = 8) -> int:
    """Return how many defective versions are made of each held-out image."""
    return 0 if held_out == 0 else min(most, math.ceil(wanted / held_out))
