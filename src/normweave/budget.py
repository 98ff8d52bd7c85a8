"""Choose settings within a time budget, from the good fit images only.

`balanced` is the default settings. `fast` has a coarser grid and a smaller memory bank. `best` compares input sizes and
tilings: for each candidate a head is fitted to some of the fit images, and scores the others as they are and with small
synthetic defects, which are drawn on the image at its own size and are the same for all candidates. The cheapest
candidate is chosen whose AUROC is within two standard errors of the highest. That is the rule of Breiman et al. 1984
(Classification and Regression Trees, section 3.4.3) with two in place of one. Calibration and test images are not used.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from normweave import fitting, settings
from normweave.config import AdaptedMoEConfig, Config, PrepareConfig, TimmConfig
from normweave.data import regions, rows, splits, synthetic
from normweave.data.prepare import Preparation, Preparations
from normweave.data.regions import TileRegion
from normweave.detector import Data, Detector, samples_of
from normweave.errors import unknown
from normweave.features import build as build_features
from normweave.features import cache as feature_cache
from normweave.features.frozen import FrozenFeatures
from normweave.heads.adapted_moe.fusion import HIGHEST_AUROC
from normweave.network.torch import CACHE_GIB, FittedRows, TorchNetwork, feature_source
from normweave.scoring import TileScores
from normweave.types import FeatureSource, Progress, Sample, Tile

Budget = Literal["fast", "balanced", "best"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)

FAST_EXPERTS = ("head.expert.memory.max_patches=500", "head.expert.memory.dimensions=64", "head.border=1")
"""A memory bank of a quarter of the size. A border of one cell of the coarser grid is as wide as the default of two."""
FAST_GRID = "features.grid_stride=16"
"""A quarter of the cells of the default grid."""
SIDES = (384, 512)
"""Input sizes that `best` compares with the default, in pixels."""
TILINGS = (2.0, 1.0)
"""Values of `prepare.tile_beyond` that `best` compares with the default."""
MOST_PASSES = 16
"""Largest cost of a candidate, in images of the default size."""
MOST_IMAGES = 48
"""Fit images that the search uses, at most."""
FEWEST_GROUPS = 4
"""Independent groups of fit images that the search needs."""
DEFECTS = 96
"""Synthetic defects in all, at least one and at most `MOST_DEFECTS` for each image."""
MOST_DEFECTS = 4
STANDARD_ERRORS = 2.0
"""A candidate must be better than a cheaper one by more than this many standard errors of the difference."""
TIMED = 8  # images


class Candidate(NamedTuple):
    """An input size and a tiling."""

    height: int
    width: int
    tile_beyond: float

    def apply(self, prepare: PrepareConfig) -> PrepareConfig:
        """Return the settings of the preparation with those of the candidate."""
        return replace(prepare, height=self.height, width=self.width, tile_beyond=self.tile_beyond)


class Trial(NamedTuple):
    """Scores of n held-out good images by the heads of one candidate."""

    normal: NDArray[np.float64]  # (n,)
    defective: NDArray[np.float64]  # (n, m) with m synthetic defects, one at a time
    folds: NDArray[np.int64]  # (n,) scores of different folds come from different heads
    groups: NDArray[np.int64]  # (n,) independent groups

    def auroc(self, left_out: int | None = None) -> float:
        """Return the share of pairs of one fold in which the defective image has the higher score, ties counted half.

        Args:
            left_out: a group without which it is computed.
        """
        kept = self.groups != left_out
        normal, defective, folds = self.normal[kept], self.defective[kept], self.folds[kept]
        higher = (defective[:, None] > normal[:, None]).mean(axis=2)  # (n, n)
        equal = (defective[:, None] == normal[:, None]).mean(axis=2)
        return float((higher + 0.5 * equal)[folds[:, None] == folds].mean())


def fit(
    data: Data,
    *,
    budget: Budget = "balanced",
    keep: Collection[str] = (),
    model: str | None = None,
    subclass_from: str | None = None,
    config: Config | None = None,
    layout: str | None = None,
    cache: Path | None = None,
    use_cache: bool = True,
    cache_gib: float = CACHE_GIB,
    device: str = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> Detector:
    """Choose settings within a budget, and fit a detector; the other options are those of `fitting.fit`.

    The choice is in `record["budget"]` of the detector: the name, height, width, tile_beyond, `candidates`, what `best`
    compared, and `settings`, what `fast` changed.

    Args:
        budget: fast, balanced or best.
        keep: dotted keys of settings that are not changed, although they have their default values. Those with other
            values never are.

    Raises:
        ConfigError: no such budget.
        Others: as `fitting.fit`.
    """
    if budget not in BUDGETS:
        raise unknown("budget", budget, BUDGETS, "See normweave train --help.")
    config = fitting.configured(config, model=model, subclass_from=subclass_from)
    compared: list[dict[str, Any]] = []
    changes: list[str] = []
    if budget == "fast":
        changes = faster(config, keep)
        config = settings.override(config, changes)
    elif budget == "best":
        folder = (cache or feature_cache.default_folder()) if use_cache else None
        config, compared = best(
            samples_of(data, config, layout),
            config,
            keep,
            cache=folder,
            cache_gib=cache_gib,
            device=fitting.torch_device(device),
            progress=progress,
        )
    detector = fitting.fit(
        data,
        config=config,
        layout=layout,
        cache=cache,
        use_cache=use_cache,
        cache_gib=cache_gib,
        device=device,
        progress=progress,
        **options,
    )
    prepare = config.prepare
    chosen = Candidate(prepare.height, prepare.width, prepare.tile_beyond)
    detector.record["budget"] = {"name": budget, **chosen._asdict(), "candidates": compared, "settings": changes}
    return detector


def faster(config: Config, keep: Collection[str]) -> list[str]:
    """Return the settings of a coarser grid and a smaller memory bank, as far as the user has not set these."""
    changes: list[str] = []
    features, head = config.features, config.head
    if isinstance(features, TimmConfig) and not features.blocks and not _named("features.grid_stride", keep):
        changes += [FAST_GRID] if features.grid_stride == TimmConfig().grid_stride else []
    if isinstance(head, AdaptedMoEConfig) and not _named("head.expert", keep) and not _named("head.border", keep):
        default = AdaptedMoEConfig()
        changes += FAST_EXPERTS if (head.expert, head.border) == (default.expert, default.border) else ()
    return changes


def best(
    samples: Sequence[Sample],
    config: Config,
    keep: Collection[str],
    *,
    cache: Path | None,
    cache_gib: float,
    device: str,
    progress: Progress | None,
) -> tuple[Config, list[dict[str, Any]]]:
    """Return the settings with the chosen input size and tiling, and a record of each candidate.

    A record holds height, width, tile_beyond, cost (in images of the size in `config`), auroc and image_ms (in torch,
    on this machine; both None if it was not compared), and whether it was chosen.
    """
    scanned, division = fitting.divide(samples, config, progress=progress)
    contents = dict(zip(scanned.samples, scanned.hashes, strict=True))
    sizes = {sample: _seen(scanned, number) for number, sample in enumerate(scanned.samples)}
    large = [each for each in division.fit if min(sizes[each]) >= synthetic.WINDOW_PIXELS[0]]
    found = candidates(config, keep, [sizes[each] for each in large])
    chosen = some_groups(large, contents, seed=config.seed)
    groups = np.array(splits.independent_groups(chosen, [contents[each] for each in chosen]), dtype=np.int64)
    costs = [cost(each, config, list(sizes.values())) for each in found]
    trials: list[Trial] = []
    times: list[float] = []
    if len(found) > 1 and len(set(groups.tolist())) >= FEWEST_GROUPS:
        for number, each in enumerate(found):
            if progress is not None:
                progress("comparing input sizes", number + 1, len(found))
            other = replace(config, prepare=each.apply(config.prepare))
            trial, image_ms = run_trial(chosen, groups, other, cache=cache, cache_gib=cache_gib, device=device)
            trials.append(trial)
            times.append(image_ms)
            if trial.auroc() >= HIGHEST_AUROC:  # the others cost more, and none counts as better
                break
    winner = cheapest_of_the_best(trials, costs)
    record = [
        each._asdict()
        | {
            "cost": costs[number],
            "auroc": trials[number].auroc() if number < len(trials) else None,
            "image_ms": times[number] if number < len(trials) else None,
            "chosen": number == winner,
        }
        for number, each in enumerate(found)
    ]
    return replace(config, prepare=found[winner].apply(config.prepare)), record


def _seen(scanned: rows.Rows, number: int) -> tuple[int, int]:
    """Return (height, width) of an image after it was cut to the bounding box of its region."""
    region = scanned.preparation.of(scanned.samples[number].category).region
    box = None if region is None else regions.bounding_box(region, *scanned.sizes[number])
    return scanned.sizes[number] if box is None else (box.height, box.width)


def candidates(config: Config, keep: Collection[str], sizes: Sequence[tuple[int, int]]) -> list[Candidate]:
    """Return the settings in `config`, and the input sizes and tilings to compare them with, cheapest first.

    Left out are inputs that are larger than the part of an image that they show (in most images), tilings that cut as
    another one, and candidates that cost more than `MOST_PASSES` times as much as those in `config`.

    Args:
        sizes: (height, width) of each image.
    """
    prepare, default = config.prepare, PrepareConfig()
    base = Candidate(prepare.height, prepare.width, prepare.tile_beyond)
    found: list[Candidate] = []
    grid_stride = getattr(config.features, "grid_stride", None)  # CLIP has none: its input size is fixed
    same_size = (prepare.height, prepare.width) == (default.height, default.width)
    if grid_stride and same_size and not _named("prepare.height", keep) and not _named("prepare.width", keep):
        found += [Candidate(side, side, base.tile_beyond) for side in SIDES if side % grid_stride == 0]
    if prepare.tile_beyond == default.tile_beyond and not _named("prepare.tile_beyond", keep):
        found += [base._replace(tile_beyond=tiling) for tiling in TILINGS]
    result = [base]
    cuts = [_cuts(base, config, sizes)]
    for each in found:
        own = _cuts(each, config, sizes)
        shown = np.median([max(tiles[0].height, tiles[0].width) for _, tiles in own]) if own else 0
        if shown >= max(each.height, each.width) and own not in cuts and cost(each, config, sizes) <= MOST_PASSES:
            result.append(each)
            cuts.append(own)
    return sorted(result, key=lambda each: cost(each, config, sizes)) if sizes else result


def _cuts(
    candidate: Candidate, config: Config, sizes: Sequence[tuple[int, int]]
) -> list[tuple[tuple[int, int], tuple[Tile, ...]]]:
    """Return the input size and the tiles of each image."""
    preparation = Preparation(candidate.apply(config.prepare))
    return [((candidate.height, candidate.width), preparation.tiles(*size)) for size in sizes]


def cost(candidate: Candidate, config: Config, sizes: Sequence[tuple[int, int]]) -> float:
    """Return how many pixels pass through the network for an image, in mean, relative to one input of `config`."""
    tiles = float(np.mean([len(tiles) for _, tiles in _cuts(candidate, config, sizes)]))
    return tiles * candidate.height * candidate.width / (config.prepare.height * config.prepare.width)


def _named(section: str, keep: Collection[str]) -> bool:
    """Return whether a setting, or one of its section, is to be kept."""
    return any(key == section or key.startswith(f"{section}.") for key in keep)


def some_groups(samples: Sequence[Sample], contents: dict[Sample, str], *, seed: int) -> list[Sample]:
    """Return at most `MOST_IMAGES` images of groups drawn at random, as many of each group as fit."""
    groups = splits.independent_groups(samples, [contents[each] for each in samples])
    order = np.random.default_rng(seed).permutation(max(groups, default=-1) + 1)
    place = np.argsort(order)  # of each group
    drawn = sorted(range(len(samples)), key=lambda row: (place[groups[row]], row))[:MOST_IMAGES]
    return [samples[row] for row in sorted(drawn)]


def run_trial(
    samples: Sequence[Sample],
    groups: NDArray[np.int64],
    config: Config,
    *,
    cache: Path | None,
    cache_gib: float,
    device: str,
) -> tuple[Trial, float]:
    """Fit the head of one candidate to each half of the groups (n,), and score the other half.

    Returns:
        The scores, and the time in ms to decode, prepare and score an image.
    """
    prepare = config.prepare
    extractor = build_features(config.features, height=prepare.height, width=prepare.width)
    extractor.to(device)
    known = None if cache is None else partial(feature_cache.contains, cache, extractor.fingerprint)
    scanned = rows.scan(samples, Preparations(prepare, regions=config.regions), known=known)
    source = feature_source(extractor, scanned, cache=cache, max_gib=cache_gib, progress=None)
    order = np.random.default_rng(config.seed).permutation(int(groups.max()) + 1)
    folds = order[groups] % 2
    count = len(samples)
    per_image = max(1, min(MOST_DEFECTS, round(DEFECTS / count)))
    normal, defective = np.empty(count), np.empty((count, per_image))
    times = []
    for fold in range(2):
        parts = (np.flatnonzero(folds[scanned.owner] != fold), np.flatnonzero(folds[scanned.owner] == fold))
        network = _fitted(FittedRows(scanned, *parts), extractor, source, config, cache, cache_gib, device)
        held_out = np.flatnonzero(folds == fold)
        cut: list[NDArray[np.uint8]] = []  # tiles with a part of a defect, scored together since passes are padded
        cut_parts: list[TileRegion | None] = []  # how each is scored under the region
        of: list[tuple[int, int]] = []  # image and variant of each
        for number in held_out.tolist():
            own = np.flatnonzero(scanned.owner == number)
            inside = [scanned.part_inside(int(row)) for row in own]
            scores = TileScores.of(network.score_features(source.read(own)), config, inside).scores
            normal[number] = scores.max()
            for variant in range(per_image):
                pixels, mask = _defective(scanned, number, held_out, variant, seed=config.seed)
                touched = np.array([_part(mask, scanned.tiles[row]).any() for row in own])
                defective[number, variant] = scores[~touched].max(initial=-np.inf)
                preparation = scanned.preparation.of(scanned.samples[number].category)
                cut += [preparation.apply(pixels, scanned.tiles[row]) for row in own[touched]]
                cut_parts += [inside[tile] for tile in np.flatnonzero(touched)]
                of += [(number, variant)] * int(touched.sum())
        scored = TileScores.compute(network, np.stack(cut), config, parts=cut_parts)
        np.maximum.at(defective, tuple(np.transpose(of)), scored.scores)
        times.append(_image_ms(network, scanned, held_out[:TIMED], config))
    return Trial(normal, defective, folds, groups), float(np.mean(times))


def _fitted(
    chosen: FittedRows,
    extractor: FrozenFeatures,
    source: FeatureSource,
    config: Config,
    cache: Path | None,
    cache_gib: float,
    device: str,
) -> TorchNetwork:
    standard, head = fitting.fit_head(
        chosen,
        extractor,
        source,
        config,
        reuse=None,
        cache=cache,
        cache_gib=cache_gib,
        work=None,
        resume=False,
        device=device,
        progress=None,
    )
    return TorchNetwork(extractor, standard, head, config=config, device=device)


def _image_ms(network: TorchNetwork, scanned: rows.Rows, numbers: NDArray[np.int64], config: Config) -> float:
    start = time.perf_counter()
    chosen = np.flatnonzero(np.isin(scanned.owner, numbers))
    TileScores.compute(network, np.stack([scanned.load(int(row)) for row in chosen]), config)
    return (time.perf_counter() - start) * 1000 / len(numbers)


def _defective(
    scanned: rows.Rows, number: int, others: NDArray[np.int64], variant: int, *, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return an image (H, W, 3) with a defect and its mask (H, W); parts are copied from one of the other images."""
    rng = synthetic.seeded(seed, variant, int(scanned.hashes[number][:12], 16))
    category = scanned.samples[number].category
    same = [int(each) for each in others if each != number and scanned.samples[each].category == category] or [number]
    pixels, other = (scanned.image(each).transpose(2, 0, 1) for each in (number, same[rng.integers(len(same))]))
    region = scanned.preparation.of(category).region
    if region is None:
        defective, mask = synthetic.add_small_defect(pixels, other, rng=rng)
    else:  # in the bounding box of the region, of both images
        box, theirs = (synthetic.bounding_box(regions.mask(region, *each.shape[1:])) for each in (pixels, other))
        defective, mask = pixels.copy(), np.zeros(pixels.shape[1:], dtype=np.bool_)
        defective[:, *box], mask[box] = synthetic.add_small_defect(pixels[:, *box], other[:, *theirs], rng=rng)
    return defective.transpose(1, 2, 0), mask


def _part(mask: NDArray[np.bool_], tile: Tile) -> NDArray[np.bool_]:
    return mask[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]


def cheapest_of_the_best(trials: Sequence[Trial], costs: Sequence[float]) -> int:
    """Return the number of the cheapest trial that is as good as the best, up to noise; 0 for no trial.

    That is: its AUROC is lower than the highest by at most `STANDARD_ERRORS` of the difference (jackknife over the
    groups; both trials score the same images), or at least `HIGHEST_AUROC`.
    """
    if not trials:
        return 0
    aurocs = [each.auroc() for each in trials]
    top = trials[int(np.argmax(aurocs))]
    names = np.unique(top.groups).tolist()

    def as_good(number: int) -> bool:
        own = trials[number]
        differences = np.array([top.auroc(name) - own.auroc(name) for name in names])  # each without a group
        error = np.sqrt((len(names) - 1) / len(names) * np.square(differences - differences.mean()).sum())
        return aurocs[number] >= min(HIGHEST_AUROC, max(aurocs) - STANDARD_ERRORS * float(error))

    good = [number for number in range(len(trials)) if as_good(number)]
    return min(good, key=lambda number: (costs[number], -aurocs[number]))


def image_ms(detector: Detector, samples: Sequence[Sample]) -> float | None:
    """Return the time in ms from image file to verdict on this machine, by the second pass over `TIMED` good images.

    None if there is no good image.
    """
    paths = [str(each.image_path) for each in splits.good_images(samples)[:TIMED]]
    for _ in range(2):
        start = time.perf_counter()
        for _ in detector.stream(paths):
            pass
    return (time.perf_counter() - start) * 1000 / len(paths) if paths else None
