"""Compute the features of the training images on a Ray cluster, for a fit on this machine that has them in its cache.

The backbone takes most of the time of most trainings. A task computes the features of some whole batches, as this
machine would group them, so that every later step has the same input.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave.bridges import ray_tasks
from normweave.bridges.ray import Cluster
from normweave.config import Config
from normweave.data import rows
from normweave.data.prepare import Preparations
from normweave.errors import DataError, MissingError
from normweave.features import build as build_features
from normweave.features import cache as feature_cache
from normweave.features.frozen import FrozenFeatures
from normweave.types import FeatureSource, Progress, Sample

TASK_ROWS = 64
"""Rows of a task, rounded up to whole batches."""

_extractors: dict[str, FrozenFeatures] = {}  # of this worker process


class Slice(NamedTuple):
    """Some rows whose features are missing."""

    config: Config
    samples: tuple[Sample, ...]  # that the rows are of
    keys: tuple[str, ...]
    fingerprint: str  # of the extractor
    cache: Path | None = None  # on the machine of the command, where its features are sent to


def compute(
    cluster: Cluster,
    extractor: FrozenFeatures,
    images: rows.Rows,
    config: Config,
    *,
    cache: Path,
    cache_gib: float,
    threads: int = 1,
    progress: Progress | None = None,
) -> int:
    """Fill the feature cache with all rows of these images, and return how many were missing.

    Args:
        images: every node must see them.
        config: of the extractor and the images.
        cache, cache_gib: folder of the cache on this machine, and its largest size.
        threads: processors of a task.

    Raises:
        DataError: a task failed.
    """
    missing = feature_cache.missing(extractor, images.keys, folder=cache, max_gib=cache_gib)
    if not missing:
        return 0
    sample = {key: images.samples[owner] for key, owner in zip(images.keys, images.owner, strict=True)}
    size = rows_of_task(extractor)
    slices = [
        Slice(config, tuple(dict.fromkeys(map(sample.__getitem__, keys))), keys, extractor.fingerprint, cache)
        for keys in (tuple(missing[start : start + size]) for start in range(0, len(missing), size))
    ]
    failed = ray_tasks.run(
        cluster, compute_slice, slices, save=store, processors=threads, reuse=True, name="features", progress=progress
    )
    if failed:
        raise DataError(
            f"The features of {len(failed)} of {len(slices)} parts of the images could not be computed on the cluster: "
            f"{failed[0].reason} Run the command again: the features of the others are kept."
        )
    return len(missing)


def rows_of_task(extractor: FrozenFeatures) -> int:
    """Return the number of rows of a task, which are whole batches."""
    return ray_tasks.whole_batches(TASK_ROWS, extractor.batch_images)


def compute_slice(one: Slice) -> NDArray[np.float16]:
    """Return the features of the rows, (n, D, h, w).

    Raises:
        MissingError: the backbone has other weights here.
        DataError: an image has changed, or cannot be read here.
    """
    images, numbers = scanned(one)
    return np.concatenate(list(feature_cache.computed(extractor_of(one), images.load, numbers)))


def source(one: Slice, *, cache: Path, cache_gib: float) -> FeatureSource:
    """Return the features of the rows, which are computed unless the cache has them.

    Images are read only if some are missing.

    Raises:
        MissingError: the backbone has other weights here.
        DataError: an image has changed, or cannot be read here.
    """
    lock, found = threading.Lock(), list[tuple[rows.Rows, list[int]]]()

    def load(row: int) -> NDArray[np.uint8]:
        with lock:
            if not found:
                found.append(scanned(one))
        images, numbers = found[0]
        return images.load(numbers[row])

    return feature_cache.cached(extractor_of(one), one.keys, load, folder=cache, max_gib=cache_gib)


def scanned(one: Slice) -> tuple[rows.Rows, list[int]]:
    """Return the images of a slice, and the row of each of its keys among them.

    Raises:
        DataError: an image has changed, or cannot be read here.
    """
    images = rows.scan(one.samples, Preparations(one.config.prepare, regions=one.config.regions))
    number = {key: row for row, key in enumerate(images.keys)}
    if changed := [key for key in one.keys if key not in number]:
        why = images.refused[0].reason if images.refused else "it has changed."
        raise DataError(f"An image of {len(changed)} rows is not the one that the machine of the command reads: {why}")
    return images, [number[key] for key in one.keys]


def store(one: Slice, features: NDArray[np.float16]) -> None:
    """Write the features of a slice to the cache."""
    assert one.cache is not None
    feature_cache.add(one.cache, one.fingerprint, one.keys, features)


def extractor_of(one: Slice) -> FrozenFeatures:
    """Return the extractor of a slice in this worker process.

    Raises:
        MissingError: the backbone has other weights here.
    """
    prepare = one.config.prepare
    key = repr((one.config.features, prepare.height, prepare.width))
    if key not in _extractors:
        _extractors[key] = build_features(one.config.features, height=prepare.height, width=prepare.width)
    if _extractors[key].fingerprint != one.fingerprint:
        raise MissingError("A node has other weights of the backbone. Install the same versions on every node.")
    return _extractors[key]
