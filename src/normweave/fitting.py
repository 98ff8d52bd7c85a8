"""Fit a detector: good images and settings to a `Detector` whose network runs in torch.

The fit images pass through the stages (images, features, head). The calibration images, which the fit does not use, are
scored, and the operating points are computed from their scores. Test images are dropped before any file is opened.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave import bundle, checks, cross_validation, references, settings
from normweave.by_region import check_routing
from normweave.checks import Checks
from normweave.config import AdaptedMoEConfig, Config
from normweave.data import regions, rows, splits, synthetic
from normweave.data.degenerate import refuse_degenerate, refuse_repeated_subclass
from normweave.data.prepare import Preparations
from normweave.detector import Data, Detector, samples_of
from normweave.errors import BundleError, ConfigError, DataError, MissingError
from normweave.features import build as build_features
from normweave.features import cache as feature_cache
from normweave.features import pair as feature_pair
from normweave.features.frozen import FrozenFeatures
from normweave.features.standardize import ChannelStandardizer, StandardizedFeatures
from normweave.heads import build as build_head
from normweave.heads.base import Head
from normweave.network import OPENVINO, open_graph
from normweave.network.quantize import quantize_backbone
from normweave.network.torch import CACHE_GIB, FittedRows, Sources, TorchNetwork, feature_source
from normweave.outcome.operating_point import groups_needed
from normweave.passes import Subset
from normweave.record import parse_record, trained_record
from normweave.references import References
from normweave.scoring import ImageScore
from normweave.types import FeatureSource, FitData, Progress, Sample, SyntheticAnomalies, SyntheticDefects

INT8_IMAGES = 64
"""Fit images from which the ranges of int8 are measured."""


def fit(
    data: Data,
    *,
    model: str | None = None,
    subclass_from: str | None = None,
    config: Config | None = None,
    layout: str | None = None,
    cache: Path | None = None,
    use_cache: bool = True,
    cache_gib: float = CACHE_GIB,
    work: Path | None = None,
    resume: bool = False,
    device: str = "auto",
    sources: Sources | None = None,
    progress: Progress | None = None,
) -> Detector:
    """Fit a detector to good images.

    Args:
        data: a manifest, a folder in a known layout, or samples or paths of good images.
        model: the name of a model, which overrides the head of the config; see `settings.model_names`.
        subclass_from: overrides `config.data.subclass_from`.
        cache: folder of the feature cache; default: the user's cache folder.
        use_cache: if False, features are computed again at each pass over the images, about fourteen: for a small disk.
        cache_gib: largest size of the feature cache in GiB.
        work: folder for the checkpoints of the training, from which `resume` continues.
        device: auto, cpu, cuda or cuda:N.
        sources: where the features are, such as `bridges.ray_fit.ClusterSources`; None: on this machine. They need the
            cache.

    Raises:
        DataError: there are no usable good images, or too few.
        ConfigError, MissingError: a setting is not possible, or a backbone is not available.
    """
    config = configured(config, model=model, subclass_from=subclass_from)
    config = replace(config, maps=replace(config.maps, smoothing=config.smoothing))
    device = torch_device(device)
    samples = samples_of(data, config, layout)
    extractor = build_features(config.features, height=config.prepare.height, width=config.prepare.width)
    extractor.to(device)
    folder = (cache or feature_cache.default_folder()) if use_cache else None
    known = None if folder is None else partial(feature_cache.contains, folder, extractor.fingerprint)
    images, division = divide(samples, config, known=known, progress=progress)
    elsewhere = None
    if sources is None:
        source = feature_source(extractor, images, cache=folder, max_gib=cache_gib, progress=progress)
    else:
        here = _why_here(config, division, extractor)
        source = sources(extractor, images, config, cache=cache, max_gib=cache_gib, here=here, progress=progress)
        elsewhere = source if here is None else None

    def fit_rows(fit: NDArray[np.int64], calibration: NDArray[np.int64], *, reuse: Head | None = None) -> Detector:
        chosen = FittedRows(images, fit, calibration)
        standard, head = fit_head(
            chosen,
            extractor,
            source,
            config,
            reuse=reuse,
            cache=folder,
            cache_gib=cache_gib,
            work=work,
            resume=resume,
            device=device,
            sources=None if division.folds else sources,
            progress=progress,
        )
        network = TorchNetwork(
            extractor,
            standard,
            head,
            config=config,
            device=device,
            cache_gib=cache_gib,
            rows=chosen,
            source=elsewhere,
        )
        if config.outcome.references and head.origins is not None and reuse is None:
            network.references = References.collect(head.origins, grid=source.shape[1:], images=images, fit=fit)
        detector = Detector(
            network,
            config=config,
            subclass_names=head.subclass_names,
            subclasses={each.subclass_name: (each.category, each.subclass) for each in images.samples},
            record=trained_record(config, network, division),
            refused=images.refused,
        )
        _name_discovered(detector, chosen, cache=folder)
        return detector

    calibration = rows_of(images, division.calibration)
    detector = fit_rows(rows_of(images, division.fit), calibration)
    assert isinstance(detector.network, TorchNetwork)
    detector.record |= bundle.subclass_record(detector.subclasses, detector.subclass_names)
    if sources is not None and sources.machines > 1:
        detector.record["trained_on_machines"] = sources.machines
    if division.folds:
        folds = [rows_of(images, fold) for fold in division.folds]
        fit_part = partial(fit_rows, reuse=detector.network.head)
        held_out = cross_validation.held_out_scores(detector, images, folds, fit_part, cache=folder, progress=progress)
        detector.record |= cross_validation.record(held_out, images)
    else:
        held_out = detector.held_out_scores(images, calibration, cache=folder)
    detector.draw_operating_points(held_out, config.outcome, cross_validated=bool(division.folds), attainable=True)
    detector.network.source = None
    return detector


def _why_here(config: Config, division: splits.Division, extractor: FrozenFeatures) -> str | None:
    """Return why the features must be on the machine that fits; None: they need not."""
    if division.folds:
        return "a cross-validation fits a head for each fold of its few images"
    if config.data.subclass_from == "auto" or getattr(config.head, "discover", "missing") == "always":
        return "subclasses are discovered in all images together"
    if config.regions:
        return "regions of interest prepare an image for several categories"
    if not build_head(config.head, shape=extractor.shape, dims=extractor.dims).distributed:
        return f"{config.head.model} is trained by gradient, or reads images one by one"
    return None


def fit_head(
    chosen: FittedRows,
    extractor: FrozenFeatures,
    source: FeatureSource,
    config: Config,
    *,
    reuse: Head | None,
    cache: Path | None,
    cache_gib: float,
    work: Path | None,
    resume: bool,
    device: str,
    sources: Sources | None = None,
    progress: Progress | None,
) -> tuple[ChannelStandardizer, Head]:
    """Fit the standardisation of the channels and the head on the fit rows; the backbone is frozen.

    Args:
        sources: may train the head on other machines; None: it is trained on this one.
        source: features of all rows of `chosen.images`.
        reuse: a head fitted to all images, whose weights are taken; see `Head.reuse`.
        cache, cache_gib, work, resume, device: as in `fit`.
    """
    standard = ChannelStandardizer(channels=source.shape[0])
    standard.fit(Subset(source, chosen.fit))
    head = build_head(config.head, shape=source.shape, dims=extractor.dims)
    if reuse is not None:
        head.reuse(reuse)
    fit_data = _fit_data(chosen, StandardizedFeatures(Subset(source, chosen.fit), standard), config)
    parts = chosen, extractor, standard
    fit_data = replace(
        fit_data,
        mean=standard.mean,
        std=standard.std,
        pair=feature_pair(config.features) if head.uses_text else None,
        synthetic=synthetic_anomalies(
            *parts, fit_data, variants=head.synthetic_variants, cache=cache, max_gib=cache_gib, progress=progress
        ),
    )
    fit_data = replace(
        fit_data,
        defects=synthetic_defects(
            *parts, fit_data, wanted=head.defect_images(fit_data), cache=cache, max_gib=cache_gib, progress=progress
        ),
    )
    if work is not None:  # a checkpoint is valid only for the same features of the same images
        keys = [extractor.fingerprint, *(chosen.images.keys[row] for row in chosen.fit)]
        work = work / rows.fingerprint(keys)[: rows.HASH_LETTERS]
    head.begin(fit_data)
    check_routing(chosen.images, routes=bool(head.subclass_names))
    stages = head.stages(fit_data)
    given = head, stages, chosen, fit_data, standard
    if stages and (sources is None or not sources.train(*given, device=device, progress=progress)):
        from normweave import training  # Lightning takes longer to import than everything else here

        for stage in stages:
            training.train(stage, fit_data, folder=work, resume=resume, progress=progress, device=device)
    head.to("cpu")
    head.finish(fit_data)
    return standard, head


def load(folder: str | os.PathLike[str], *, device: str = "auto") -> Detector:
    """Read a bundle into torch, for what needs the modules themselves; `Detector.load` runs its graph without torch.

    Raises:
        BundleError: damaged, not a bundle, of another format version, or quantized.
    """
    path = Path(folder)
    record = bundle.read(path)
    parts = parse_record(record, where=path)
    config: Config = parts["config"]
    if record.get("precision") == "int8":
        raise BundleError(f"{path} is quantized, and its int8 backbone runs without torch only. Use Detector.load.")
    tensors = {name: torch.from_numpy(array) for name, array in bundle.read_tensors(path).items()}
    try:
        shape: tuple[int, int, int] = tuple(record["feature_shape"])
        fingerprint = record["feature_fingerprint"]
    except (KeyError, TypeError) as error:
        raise BundleError(
            f"{path}/bundle.json lacks or misplaces {error}. Copy the bundle again or retrain."
        ) from error
    random = replace(config.features, weights="random")
    extractor = build_features(random, height=config.prepare.height, width=config.prepare.width)
    _load_strictly(extractor, _with_prefix(tensors, "features."), path)
    extractor.fingerprint = fingerprint  # that of the weights before batch norms were folded into them
    standard = ChannelStandardizer(channels=shape[0])
    _load_strictly(standard, _with_prefix(tensors, "standard."), path)
    head = build_head(config.head, shape=shape, dims=extractor.dims)
    head.load_state(_with_prefix(tensors, "head."))
    head.subclass_names = parts["subclass_names"]
    network = TorchNetwork(
        extractor,
        standard,
        head,
        config=config,
        device=torch_device(device),
        graph=bundle.read_file(path, bundle.GRAPH),
    )
    network.references, network.checks = references.read(path), checks.read(path)
    return Detector(network, bundle_hash=bundle.bundle_hash(path), **parts)


def quantize(detector: Detector, *, progress: Progress | None = None) -> Detector:
    """Return the detector with its backbone in int8: smaller and faster, with slightly different scores.

    The operating points are computed again, from the int8 scores of the same held-out images. The ranges are measured
    on fit images, so that the held-out ones stay unused.

    Raises:
        ConfigError: the detector was not just fitted, has cross-validated operating points, or its backbone has no
            convolution.
        CheckError: as in `Detector.save`.
    """
    network = detector.network
    if not isinstance(network, TorchNetwork) or network.rows is None:
        raise ConfigError(
            "Only a detector that was just fitted can be quantized, because the images of the fit are needed. Train it "
            "again with --int8."
        )
    images = network.rows
    if detector.calibration is not None and detector.calibration.cross_validated:
        raise ConfigError(
            "int8 computes its operating points from images that the network was not fitted on, and cross-validation "
            "fits it to all images. Give more good images, or train with --set data.calibration=split."
        )
    graph = quantize_backbone(network.exported(detector.calibration), images.tiles(images.fit, at_most=INT8_IMAGES))
    config = detector.config
    size = (config.prepare.height, config.prepare.width)
    int8 = open_graph(graph, where="The quantized graph", size=size, device="cpu")
    int8.weights = network.tensors()
    int8.references = network.references
    int8.checks = network.checks and Checks.compute(int8, network.checks.pixels)
    result = Detector(
        int8,
        config=config,
        subclass_names=detector.subclass_names,
        subclasses=detector.subclasses,
        record=detector.record | {"precision": "int8"},
        refused=detector.refused,
    )
    held_out = result.held_out_scores(images.images, images.calibration, progress=progress)
    result.draw_operating_points(held_out, config.outcome, attainable=True)
    return result


def divide(
    samples: Sequence[Sample], config: Config, *, known: Any = None, progress: Progress | None = None
) -> tuple[rows.Rows, splits.Division]:
    """Read the training images and divide them into fit and calibration; test images are dropped unopened.

    Args:
        known: see `rows.scan`.

    Raises:
        DataError: there are too few images, or nothing can be learned from them.
    """
    complete = splits.complete(samples, seed=config.seed)
    train = [sample for sample in complete if sample.split != "test"]
    if not any(sample.split == "train" for sample in complete):
        marked = Counter(sample.split for sample in complete if sample.label == "normal")
        got = ", ".join(f"{count} marked {split}" for split, count in sorted(marked.items()))
        raise DataError(
            f"No image to fit on. Good images: {got or 'none'}. Mark some train, or leave their split empty."
        )
    regions.check(config.regions, categories={sample.category for sample in train})
    images = rows.scan(train, Preparations(config.prepare, regions=config.regions), known=known, progress=progress)
    hashes = {sample.image_path: content for sample, content in zip(images.samples, images.hashes, strict=True)}
    try:
        division = splits.divide(
            images.samples,
            method=config.data.calibration,
            calibration_share=config.data.calibration_share,
            at_least=groups_needed(config.outcome.false_alarm_rate),
            folds=config.data.folds,
            seed=config.seed,
            content=lambda sample: hashes[sample.image_path],
        )
    except DataError as error:
        if not images.refused:
            if len(images.samples) > 1:
                refuse_degenerate(images.samples)  # names the reason where all images are copies of few
            raise
        first = images.refused[0]
        raise DataError(f"{error} {len(images.refused)} images were left out. The first, {first}") from error
    refuse_degenerate(images.samples)
    if isinstance(config.head, AdaptedMoEConfig) and config.data.subclass_from != "auto":
        refuse_repeated_subclass(images.samples, images.hashes)  # other heads do not choose one of them
    return images, division


def rows_of(images: rows.Rows, samples: Sequence[Sample]) -> NDArray[np.int64]:
    """Return the rows of these samples."""
    wanted = set(samples)
    chosen = np.array([sample in wanted for sample in images.samples], dtype=bool)
    return np.flatnonzero(chosen[images.owner])


def torch_device(name: str) -> str:
    """Return the torch device of this name; `auto` is cuda if there is one.

    Raises:
        ConfigError, MissingError: torch cannot use it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] in (OPENVINO, "tensorrt"):
        raise ConfigError(
            f"Device {name!r} runs finished bundles (predict, calibrate, evaluate), and this needs torch. Use --device "
            "auto, cpu or cuda."
        )
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise MissingError(
            f"Device {name!r} was requested, but this machine has no CUDA device. Use --device cpu or auto."
        )
    return name


def configured(config: Config | None, *, model: str | None, subclass_from: str | None) -> Config:
    """Return the settings, or the default ones, with the head of a model and another source of subclasses."""
    config = config or Config()
    if model is not None:
        config = settings.with_model(config, model)
    if subclass_from is not None:
        config = settings.override(config, [f"data.subclass_from={subclass_from}"])
    return config


def _fit_data(chosen: FittedRows, features: FeatureSource, config: Config) -> FitData:
    samples = [chosen.images.samples[owner] for owner in chosen.images.owner[chosen.fit]]
    labelled = config.data.subclass_from != "auto"
    names = tuple(sorted({sample.subclass_name for sample in samples})) if labelled else ()
    number = {name: index for index, name in enumerate(names)}
    subclasses = np.array([number.get(sample.subclass_name, -1) for sample in samples], dtype=np.int64)
    group_of: dict[str, int] = {}
    groups = np.array(
        [
            group_of.setdefault(f"group {sample.group}" if sample.group else f"file {sample.image_path}", len(group_of))
            for sample in samples
        ],
        dtype=np.int64,
    )
    categories = tuple(sorted({sample.category for sample in samples}))
    return FitData(
        features=features,
        given_categories=np.array([categories.index(sample.category) for sample in samples], dtype=np.int64),
        category_names=categories,
        subclasses=subclasses,
        names=names,
        groups=groups,
        holdout=splits.holdout(groups, subclasses, share=config.data.holdout_share, seed=config.seed),
        seed=config.seed,
    )


def synthetic_anomalies(
    chosen: FittedRows,
    extractor: FrozenFeatures,
    standard: ChannelStandardizer,
    data: FitData,
    *,
    variants: int,
    cache: Path | None,
    max_gib: float = CACHE_GIB,
    progress: Progress | None = None,
) -> SyntheticAnomalies | None:
    """Add synthetic defects to the fit images, `variants` times to each; None for 0.

    The defects of held-out images are filled with parts of held-out images, and those of the others with the others.
    """
    if variants == 0:
        return None
    images, fit_rows, seed = chosen.images, chosen.fit, data.seed
    n = len(fit_rows)
    sides = {side: np.flatnonzero(data.holdout == side) for side in (False, True)}

    def source_of(row: int) -> tuple[int, np.random.Generator]:
        rng = synthetic.seeded(seed, row // n, row % n)
        return int(rng.choice(sides[bool(data.holdout[row % n])])), rng

    def add_defect(row: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        other, rng = source_of(row)
        return _with_defect(images, fit_rows[row % n], fit_rows[other], rng=rng)

    def key(row: int) -> str:
        own, other = images.keys[fit_rows[row % n]], images.keys[fit_rows[source_of(row)[0]]]
        parts = ["pseudo", synthetic.FORMAT, seed, row // n, row % n, own, other]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    features, coverage = _with_coverage(
        extractor,
        [key(row) for row in range(n * variants)],
        add_defect,
        cache=cache,
        max_gib=max_gib,
        progress=progress,
    )
    return SyntheticAnomalies(StandardizedFeatures(features, standard), coverage)


def _with_defect(
    images: rows.Rows, row: int, other: int, *, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Add a synthetic defect to a row, inside its region."""
    part = images.part_inside(row)
    if part is None:
        return synthetic.add_defect(images.load(row), images.load(other), rng=rng)
    defective, mask = synthetic.add_defect(images.load(row), images.load(other), rng=rng, inside=part.kept)
    return part.fill(defective), mask


def _with_coverage(
    extractor: FrozenFeatures,
    keys: Sequence[str],
    add_defect: Callable[[int], tuple[NDArray[np.uint8], NDArray[np.bool_]]],
    *,
    cache: Path | None,
    max_gib: float,
    progress: Progress | None,
) -> tuple[FeatureSource, Callable[[NDArray[np.int64]], Tensor]]:
    """Return the features of images with defects, and the share of each cell of the grid that is defective.

    Args:
        keys: of the features in the cache.
        add_defect: row to the image with its defect (3, H, W), and the mask (H, W).
    """
    # One byte a cell, read again and again, while the image behind it takes milliseconds to make.
    shares = np.empty((len(keys), *extractor.grid), dtype=np.uint8)
    known = np.zeros(len(keys), dtype=np.bool_)

    def load(row: int) -> NDArray[np.uint8]:
        pixels, mask = add_defect(row)
        shares[row] = np.rint(255 * synthetic.coverage(mask, extractor.grid))
        known[row] = True
        return pixels

    make = partial(feature_cache.source, extractor, keys, load, folder=cache, max_gib=max_gib, progress=progress)
    source = feature_cache.WhenRead(make, shape=extractor.shape, count=len(keys))

    def coverage(batch: NDArray[np.int64]) -> Tensor:
        for row in batch[~known[batch]]:  # their features were in the cache
            load(int(row))
        return torch.from_numpy(shares[batch]).float() / 255

    return source, coverage


def synthetic_defects(
    chosen: FittedRows,
    extractor: FrozenFeatures,
    standard: ChannelStandardizer,
    data: FitData,
    *,
    wanted: NDArray[np.int64],
    cache: Path | None,
    max_gib: float = CACHE_GIB,
    progress: Progress | None = None,
) -> SyntheticDefects | None:
    """Add one synthetic defect to each of the wanted fit images (m,), which may repeat; None for no image.

    Parts of another image are taken from the same category.
    """
    if len(wanted) == 0:
        return None
    images, fit_rows, seed = chosen.images, chosen.fit, data.seed
    variant = np.arange(len(wanted)) - np.searchsorted(wanted, wanted)  # how often the image came before
    numbers = np.array([int(images.keys[row][:12], 16) for row in fit_rows])  # of the content

    def source_of(row: int) -> tuple[int, np.random.Generator]:
        rng = synthetic.seeded(seed, int(variant[row]), int(numbers[wanted[row]]))
        # By content, so that the defects of an image are the same, and cached, for most sets of fit images.
        same = np.flatnonzero(data.categories == data.categories[wanted[row]])
        return int(same[np.argmin(numbers[same] ^ rng.integers(2**48))]), rng

    def add_defect(row: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        other, rng = source_of(row)
        return _with_defect(images, fit_rows[wanted[row]], fit_rows[other], rng=rng)

    def key(row: int) -> str:
        own, other = images.keys[fit_rows[wanted[row]]], images.keys[fit_rows[source_of(row)[0]]]
        parts = ["defects", synthetic.FORMAT, seed, int(variant[row]), own, other]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    features, coverage = _with_coverage(
        extractor, [key(row) for row in range(len(wanted))], add_defect, cache=cache, max_gib=max_gib, progress=progress
    )
    return SyntheticDefects(StandardizedFeatures(features, standard), wanted, coverage)


def _name_discovered(detector: Detector, chosen: FittedRows, *, cache: Path | None) -> None:
    """Give each discovered subclass the category that most of its fit images have."""
    discovered = [name for name in detector.subclass_names if name not in detector.subclasses]
    if not discovered:
        return
    images = chosen.images
    votes: dict[int, Counter[str]] = {}
    for each in detector.score_rows(images, chosen.fit, cache=cache):
        subclass = ImageScore.of(each.own).subclass
        if subclass is not None:
            votes.setdefault(subclass, Counter())[images.samples[each.number].category] += 1
    for index, name in enumerate(detector.subclass_names):
        category = votes[index].most_common(1)[0][0] if index in votes else images.samples[0].category
        detector.subclasses[name] = (category, name)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load_strictly(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise BundleError(
            f"{path}: the weights do not fit the model: {error}. Copy the bundle again or retrain."
        ) from error
