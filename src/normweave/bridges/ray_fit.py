"""Fit a detector on a Ray cluster: each node keeps the features of some images and computes their statistics.

A part is some consecutive rows, whole batches as one machine would group them. Its features stay in the feature cache
of the node that computed them, which is asked again at every pass. If that node is lost, another one computes them
anew. What is merged, and in which order, depends on the parts only, so that the result is the same on any number of
nodes; one machine adds in another order.
"""

from __future__ import annotations

import os
import pickle
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normweave.bridges import ray as session
from normweave.bridges import ray_features, ray_tasks, ray_train
from normweave.bridges.ray_features import Slice
from normweave.config import Config
from normweave.data.rows import Rows
from normweave.errors import DataError, NormweaveError
from normweave.features import cache as feature_cache
from normweave.features.frozen import FrozenFeatures
from normweave.features.standardize import ChannelStandardizer
from normweave.heads.base import Head, TrainingStage
from normweave.network.torch import FittedRows
from normweave.passes import Merge, Statistics, Tensors, batches, by_part, per_image
from normweave.types import FeatureSource, FitData, Progress

T = TypeVar("T")

OPEN_PARTS = 32
"""Parts whose features a worker process has open."""


class Part(NamedTuple):
    """Some consecutive rows of the images of a fit."""

    rows: Slice
    cache: Path | None  # on the node; None: its default
    cache_gib: float


class Run(NamedTuple):
    """Rows of one part that follow each other in a pass."""

    part: int
    rows: NDArray[np.int64]  # of the part
    aligned: Tensors  # their rows


class _Asked(NamedTuple):
    """The features that a source was made of."""

    config: Config
    fingerprint: str  # of the extractor
    cache: Path | None
    max_gib: float


class _Kept(NamedTuple):
    """What the connected process keeps of the parts."""

    parts: list[Any]  # reference to each
    nodes: dict[int, str]  # the node that has the features of a part


_kept: dict[str, _Kept] = {}  # of the connected process, by the name of the fit
_open: dict[tuple[str, ...], FeatureSource] = {}  # of a worker process


@contextmanager
def sources(address: str, *, threads: int | None = None) -> Iterator[ClusterSources]:
    """Connect to a cluster whose machines take part in fits; see `network.torch.Sources`.

    Args:
        address: of the cluster; see `ray.opened`.
        threads: processors of a task; None: 1, and all of a node for a training by gradient.
    """
    with session.opened(address) as cluster:
        yield ClusterSources(cluster, threads)


class ClusterSources:
    """Features of the images of a fit on the nodes of a cluster, or computed there for a fit on this machine.

    Attributes:
        summary: what the cluster did for the last fit.
    """

    summary: str = ""
    machines: int = 1
    """See `network.torch.Sources`."""

    def __init__(self, cluster: session.Cluster, threads: int | None) -> None:
        self.cluster = cluster
        self.threads = threads

    def __call__(
        self,
        extractor: FrozenFeatures,
        images: Rows,
        config: Config,
        *,
        cache: Path | None,
        max_gib: float,
        here: str | None,
        progress: Progress | None,
    ) -> FeatureSource:
        """Return a source of the features of all rows; see `network.torch.Sources`."""
        self.machines = 1
        self._asked = _Asked(config, extractor.fingerprint, cache, max_gib)
        if here is None:
            self.summary = "fitted on the machines of the cluster"
            return ClusterFeatures(self, extractor, images, config, cache=cache, cache_gib=max_gib, progress=progress)
        self.summary = f"features computed on the cluster, fitted on this machine: {here}"
        folder = cache or feature_cache.default_folder()
        ray_features.compute(
            self.cluster,
            extractor,
            images,
            config,
            cache=folder,
            cache_gib=max_gib,
            threads=self.threads or 1,
            progress=progress,
        )
        return feature_cache.cached(
            extractor, images.keys, images.load, folder=folder, max_gib=max_gib, progress=progress
        )

    def train(
        self,
        head: Head,
        stages: Sequence[TrainingStage],
        chosen: FittedRows,
        data: FitData,
        standard: ChannelStandardizer,
        *,
        device: str,
        progress: Progress | None,
    ) -> bool:
        """Train all stages of a head on the nodes of the cluster; see `network.torch.Sources`."""
        asked = self._asked
        job = ray_train.Job.of(
            head,
            standard,
            chosen,
            data,
            asked.config,
            fingerprint=asked.fingerprint,
            cache=asked.cache,
            cache_gib=asked.max_gib,
            device=device,
        )
        self.machines = ray_train.train(self.cluster, job, stages, threads=self.threads, progress=progress)
        if self.machines > 1:
            self.summary = f"features computed on the cluster, trained by gradient on {self.machines} machines"
        return self.machines > 1


class ClusterFeatures:
    """A feature source whose features stay on the nodes of a cluster; `over` computes there."""

    def __init__(
        self,
        to: ClusterSources,
        extractor: FrozenFeatures,
        images: Rows,
        config: Config,
        *,
        cache: Path | None,
        cache_gib: float,
        progress: Progress | None,
    ) -> None:
        self.cluster, self.threads = to.cluster, to.threads or 1
        self.shape = extractor.shape
        self.count = len(images)
        self.size = ray_features.rows_of_task(extractor)
        self.progress = progress
        parts = []
        for start in range(0, len(images), self.size):
            end = min(start + self.size, len(images))
            samples = tuple(images.samples[owner] for owner in np.unique(images.owner[start:end]))
            own = Slice(config, samples, images.keys[start:end], extractor.fingerprint)
            parts.append(Part(own, cache and Path(os.path.abspath(cache)), cache_gib))
        self.name = uuid.uuid4().hex
        row_bytes = 2 * int(np.prod(self.shape))
        self.cluster.call(_keep, self.name, parts, self.count, row_bytes, cache_gib)

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Return the features of these images, (len(rows), D, h, w) float32, which are sent to this machine."""
        if len(rows) == 0:
            return torch.empty(0, *self.shape)
        (features,) = per_image(self, _unchanged, rows=np.asarray(rows, dtype=np.int64))
        return features.float()

    def over(self, statistics: Statistics[T], merge: Merge[T], rows: NDArray[np.int64], aligned: Tensors) -> T:
        """Return the merged statistics of these images; see `passes.over`."""
        work = [Run(part, own - part * self.size, rest) for part, own, rest in by_part(rows, self.size, aligned)]
        # As bytes: multiprocessing would share the memory of tensors instead of sending them.
        content = self.cluster.call(
            _over, self.name, pickle.dumps((statistics, merge, work)), self.threads, os.getcwd(), progress=self.progress
        )
        result: T = pickle.loads(content)
        return result


def _unchanged(features: Tensor) -> Tensors:
    return (features.half(),)


# ── in the process that is connected to the cluster ──────────────────────────────────────────────────────────────────


def _keep(progress: Progress, name: str, parts: list[Part], rows: int, row_bytes: int, cache_gib: float) -> None:
    """Keep the parts of a fit.

    Raises:
        DataError: their features do not fit the caches of all machines: they would remove each other's.
    """
    import ray

    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
    needed, limit = rows * row_bytes / feature_cache.GIB, len(machines) * cache_gib
    if machines and needed > limit:
        raise DataError(
            f"The features of {rows} images take {needed:.3g} GiB, and the caches of {len(machines)} machines are "
            f"limited to {limit:.3g} GiB together. Add machines, or raise the limit (`cache_gib` in Python)."
        )
    _kept[name] = _Kept([ray.put(part) for part in parts], {})


def _over(progress: Progress, name: str, content: bytes, threads: int, folder: str) -> bytes:
    """Return the merged statistics of all runs; those of one that is lost are computed again."""
    import ray

    statistics, merge, runs = pickle.loads(content)
    sent = ray.put(pickle.dumps(statistics))
    return pickle.dumps(merge(_results(progress, _kept[name], runs, sent, threads, folder)))


def _results(
    progress: Progress, kept: _Kept, runs: Sequence[Run], statistics: Any, threads: int, folder: str
) -> Iterator[Any]:
    """Yield the statistics of each run, in their order."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    parts, nodes = kept
    task = ray.remote(num_cpus=threads, max_retries=ray_tasks.RETRIES)(_of_run)
    waiting = iter(runs)
    running: deque[tuple[int, Any]] = deque()
    done = 0
    while True:
        most = ray_tasks.WAITING * max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        for run in islice(waiting, max(0, most - len(running))):  # nodes may be gone
            home = nodes.get(run.part)
            where = NodeAffinitySchedulingStrategy(home, soft=True) if home else "DEFAULT"
            given = (parts[run.part], statistics, run.rows, run.aligned, folder)
            running.append((run.part, task.options(scheduling_strategy=where).remote(*given)))
        if not running:
            return
        part, reference = running.popleft()
        try:
            nodes[part], result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, NormweaveError):
                raise error.cause from error
            raise
        except ray.exceptions.RayError as error:
            first = ray.get(parts[part]).rows.samples[0].image_path
            raise NormweaveError(
                f"The images from {first} on ended with {ray_tasks.loss(error)}. If a process needs more memory than "
                "its machine has, give each task more processors (--threads), so that fewer run at once. An image "
                "whose decoder ends its process is found by `normweave data check`."
            ) from error
        done += 1
        progress("statistics of images", done, len(runs))
        yield result


# ── in the workers ───────────────────────────────────────────────────────────────────────────────────────────────────


def _of_run(part: Part, statistics: bytes, rows: NDArray[np.int64], aligned: Tensors, folder: str) -> tuple[str, Any]:
    """Return this node and the statistics of some rows of a part."""
    import ray

    ray_tasks.in_folder(folder)
    return ray.get_runtime_context().get_node_id(), statistics_of(part, pickle.loads(statistics), rows, aligned)


@torch.no_grad()
def statistics_of(part: Part, statistics: Statistics[T], rows: NDArray[np.int64], aligned: Tensors) -> T:
    """Return the statistics of some rows of a part, whose features are computed unless this machine has them.

    Raises:
        MissingError: the backbone has other weights here.
        DataError: an image has changed, or cannot be read here.
    """
    return statistics(batches(_source(part), rows, aligned))


def _source(part: Part) -> FeatureSource:
    """Return the features of a part."""
    if part.rows.keys not in _open:
        while len(_open) >= OPEN_PARTS:
            _open.pop(next(iter(_open)))
        folder = part.cache or feature_cache.default_folder()
        _open[part.rows.keys] = ray_features.source(part.rows, cache=folder, cache_gib=part.cache_gib)
    return _open[part.rows.keys]
