"""Compute the features of the training images on a Ray cluster, before a fit on this machine reads them from its cache.

The backbone takes most of the time of a training whose heads are fitted in closed form. A task computes the features of
some whole batches, as this machine would group them, so that every later step has the same input.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave import fitting
from normweave.bridges import ray_tasks
from normweave.config import Config
from normweave.data import rows
from normweave.data.prepare import Preparations
from normweave.detector import Data, samples_of
from normweave.errors import DataError, MissingError
from normweave.features import build as build_features
from normweave.features import cache as feature_cache
from normweave.features.frozen import FrozenFeatures
from normweave.network.torch import CACHE_GIB
from normweave.types import Progress, Sample

TASK_ROWS = 64
"""Rows of a task, rounded up to whole batches."""

_extractors: dict[str, FrozenFeatures] = {}  # of this worker process


class Slice(NamedTuple):
    """Some rows whose features are missing."""

    config: Config
    samples: tuple[Sample, ...]  # that the rows are of
    keys: tuple[str, ...]
    fingerprint: str  # of the extractor
    cache: Path  # on the machine of the command


def compute(
    data: Data,
    config: Config,
    *,
    address: str,
    cache: Path | None = None,
    cache_gib: float = CACHE_GIB,
    layout: str | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> int:
    """Fill the feature cache with all rows that a fit of these data will read, and return how many were missing.

    Features of synthetic defects are not among them: the fit makes the defects.

    Args:
        data, config, layout: as in `fitting.fit`. Every node must see the images.
        address: of the cluster; see `ray.run`.
        cache, cache_gib: folder of the cache on this machine, and its largest size.
        threads: processors of a task.

    Raises:
        DataError: the data cannot be used, or a task failed.
    """
    folder = cache or fitting.cache_folder()
    extractor = _extractor(config)
    known = partial(feature_cache.contains, folder, extractor.fingerprint)
    images, _ = fitting.divide(samples_of(data, config, layout), config, known=known, progress=progress)
    missing = feature_cache.missing(extractor, images.keys, folder=folder, max_gib=cache_gib)
    if not missing:
        return 0
    sample = {key: images.samples[owner] for key, owner in zip(images.keys, images.owner, strict=True)}
    size = -(-TASK_ROWS // extractor.batch_images) * extractor.batch_images
    slices = [
        Slice(config, tuple(dict.fromkeys(map(sample.__getitem__, keys))), keys, extractor.fingerprint, folder)
        for keys in (tuple(missing[start : start + size]) for start in range(0, len(missing), size))
    ]
    failed = ray_tasks.run(
        address, compute_slice, slices, save=store, processors=threads, reuse=True, name="features", progress=progress
    )
    if failed:
        raise DataError(
            f"The features of {len(failed)} of {len(slices)} parts of the images could not be computed on the cluster: "
            f"{failed[0].reason} Run the command again: the features of the others are kept."
        )
    return len(missing)


def compute_slice(one: Slice) -> NDArray[np.float16]:
    """Return the features of the rows, (n, D, h, w).

    Raises:
        MissingError: the backbone has other weights here.
        DataError: an image has changed, or cannot be read here.
    """
    extractor = _extractor(one.config)
    if extractor.fingerprint != one.fingerprint:
        raise MissingError("A node has other weights of the backbone. Install the same versions on every node.")
    images = rows.scan(one.samples, Preparations(one.config.prepare, regions=one.config.regions))
    number = {key: row for row, key in enumerate(images.keys)}
    if changed := [key for key in one.keys if key not in number]:
        why = images.refused[0].reason if images.refused else "it has changed."
        raise DataError(f"An image of {len(changed)} rows is not the one that the machine of the command reads: {why}")
    batches = feature_cache.computed(extractor, images.load, [number[key] for key in one.keys])
    return np.concatenate(list(batches))


def store(one: Slice, features: NDArray[np.float16]) -> None:
    """Write the features of a slice to the cache."""
    feature_cache.add(one.cache, one.fingerprint, one.keys, features)


def _extractor(config: Config) -> FrozenFeatures:
    key = repr((config.features, config.prepare.height, config.prepare.width))
    if key not in _extractors:
        _extractors[key] = build_features(config.features, height=config.prepare.height, width=config.prepare.width)
    return _extractors[key]
