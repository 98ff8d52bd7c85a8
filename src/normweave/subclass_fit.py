"""Fit a new subclass of a detector: held-out scores of its images first, then the expert of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normweave import fitting
from normweave.data import rows, splits
from normweave.detector import Detector
from normweave.drift import reference
from normweave.drift.reference import Described
from normweave.errors import DataError
from normweave.features.standardize import StandardizedFeatures
from normweave.heads.adapted_moe.fusion import FEWEST_OF_CATEGORY, Defective, HeldOut, defects_per_image
from normweave.heads.adapted_moe.head import AdaptedMoE
from normweave.network.torch import FittedRows, TorchNetwork, feature_source, named_outputs
from normweave.scoring import ImageScore, TileScores
from normweave.types import FitData, Progress, RawOutput


class SubclassFit:
    """Fits a new subclass: held-out scores first, then the expert of all images.

    Args:
        head: is not changed.
        images: good images of the subclass.
        name: of the subclass.
    """

    def __init__(
        self,
        detector: Detector,
        network: TorchNetwork,
        head: AdaptedMoE,
        images: rows.Rows,
        *,
        name: str,
        progress: Progress | None,
    ) -> None:
        self.detector = detector
        self.network = network
        self.head = head
        self.images = images
        self.progress = progress
        category = images.samples[0].category
        same = [k for k, each in enumerate(detector.subclass_names) if detector.subclasses[each][0] == category]
        self.like = same[0] if same else None
        """A subclass of the same category; None: the category is new."""
        config = detector.config
        everything = np.arange(len(images))
        self.chosen = FittedRows(images, everything, everything)
        source = feature_source(network.extractor, images, cache=None, max_gib=0, progress=progress)
        standard = StandardizedFeatures(source, network.standard)
        features = torch.cat([standard.read(everything[start : start + 8]) for start in range(0, len(images), 8)])
        groups = np.array(splits.independent_groups(images.samples, images.hashes), dtype=np.int64)[images.owner]
        self.data = FitData(
            features=_Stored(features),
            given_categories=np.zeros(len(images), dtype=np.int64),
            category_names=(category,),
            subclasses=np.zeros(len(images), dtype=np.int64),
            names=(name,),
            groups=groups,
            holdout=np.zeros(len(images), dtype=np.bool_),
            seed=config.seed,
            mean=network.standard.mean,
            std=network.standard.std,
        )
        order = np.random.default_rng(config.seed).permutation(len(np.unique(groups)))
        members = np.unique(groups, return_inverse=True)[1]
        self.fold = order[members] % min(config.data.folds, len(order))  # (n,)

    def fit(self) -> tuple[AdaptedMoE, list[ImageScore], list[bool], list[Described]]:
        """Return the head with the new subclass, and of each image when it is held out.

        That is its score, whether it was routed to the new subclass, and its statistics for `normweave drift`.

        Raises:
            DataError: too few of the images are nearest to the new subclass.
        """
        new = len(self.detector.subclass_names)
        data = self.data
        parts = [np.flatnonzero(self.fold == part) for part in range(int(self.fold.max()) + 1)]
        heads = []
        for number, part in enumerate(parts):
            head = deepcopy(self.head)
            head.add(_subset(data, np.setdiff1d(np.arange(len(data)), part)))
            heads.append(head)
            if self.progress is not None:
                self.progress("scoring held-out images", number, len(parts))
        normal, found = zip(*(head.held_out(data, part) for head, part in zip(heads, parts, strict=True)), strict=True)
        routed = np.concatenate(found) == new  # in the order of `parts`
        if routed.sum() < FEWEST_OF_CATEGORY:
            counts = np.bincount(np.concatenate(found), minlength=new)
            raise DataError(
                f"Only {int(routed.sum())} of {len(data)} images of {data.names[0]} are nearest to it when they are "
                f"held out, and at least {FEWEST_OF_CATEGORY} must be; of the others most are nearest to "
                f"{self.detector.subclass_names[int(counts[:new].argmax())]}. The detector knows such images already, "
                "or give more images that resemble each other."
            )
        final = deepcopy(self.head)
        final.add(data)
        fusions = [head.fusion for head in (*heads, final) if head.fusion is not None]
        if self.like is not None:
            for fusion in fusions:
                fusion.append_like(self.like)
        else:
            held_out = HeldOut(*(np.concatenate(each)[routed] for each in zip(*normal, strict=True)))
            defective, depth = self._defective(heads, new), self._depth()
            for fusion in fusions:
                fusion.append(held_out, defective, category=data.category_names[0], depth=depth)
        scored: dict[int, RawOutput] = {}
        with torch.inference_mode():
            for head, part in zip(heads, parts, strict=True):
                for row in part:
                    output = named_outputs(head(data.features.read([int(row)])))
                    scored[int(row)] = RawOutput(**{name: value.numpy() for name, value in output.items()})
        config = self.detector.config
        tiles = TileScores.concatenate(
            [TileScores.of(scored[row], config, [self.images.part_inside(row)]) for row in range(len(data))]
        )
        bounds = np.searchsorted(self.images.owner, np.arange(len(self.images.samples) + 1))
        images = [ImageScore.of(tiles.part(int(start), int(end))) for start, end in pairwise(bounds)]
        own = [each.subclass == new for each in images]
        if not any(own):
            raise DataError(
                f"No image of {data.names[0]} is nearest to it when it is held out. Give more images that resemble "
                "each other."
            )
        described = [
            reference.describe(self.images, number, tiles.raw.scores[start:end], vary=number < reference.VARIED_IMAGES)
            for number, (start, end) in enumerate(pairwise(bounds.tolist()))
        ]
        return final, images, own, described

    def _defective(self, heads: Sequence[AdaptedMoE], new: int) -> Defective | None:
        """Return the maps of held-out images with synthetic defects that are routed to the new subclass."""
        data = self.data
        wanted = np.repeat(np.arange(len(data)), defects_per_image(len(data)))
        network = self.network
        defects = fitting.synthetic_defects(
            self.chosen, network.extractor, network.standard, data, wanted=wanted, cache=None, progress=self.progress
        )
        if defects is None:
            return None
        found = []
        for number, head in enumerate(heads):
            part = np.flatnonzero(self.fold[defects.images] == number)
            defective, routed = head.held_out_defects(data, defects, part)
            found.append(Defective(*(each[routed == new] for each in defective)))
        return Defective(*(np.concatenate(each) for each in zip(*found, strict=True)))

    def _depth(self) -> float | None:
        """Return the common depth of the maps, as `Fusion` has it; None if the bundle does not hold it."""
        depths = {each["category"]: each.get("depth") for each in self.detector.record["notes"].get("fusion") or []}
        first = self.detector.subclass_names[: self.head.first]
        found = [depths.get(self.detector.subclasses[name][0]) for name in first]
        known = [each for each in found if each is not None]
        return float(np.median(known)) if len(known) == len(found) else None


class _Stored:
    """Features (n, D, h, w) in memory."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        D, h, w = features.shape[1:]
        self.shape = (D, h, w)

    def __len__(self) -> int:
        return len(self.features)

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return self.features[torch.as_tensor(np.asarray(rows))]


def _subset(data: FitData, chosen: NDArray[np.int64]) -> FitData:
    assert data.given_categories is not None
    return replace(
        data,
        features=_Stored(data.features.read(chosen)),
        given_categories=data.given_categories[chosen],
        subclasses=data.subclasses[chosen],
        groups=data.groups[chosen],
        holdout=data.holdout[chosen],
    )
