"""Train heads by gradient on several nodes of a Ray cluster: Lightning with DDP through Ray Train.

Each worker has a share of the images: it reads or computes their features on its node, and makes their synthetic
defects there. The gradients are averaged after each batch. If a worker is lost, Ray Train starts all of them again
from the first epoch, with the same result; if its machine is not replaced, those that are left do so.
"""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave import fitting, training
from normweave.bridges import ray_features, ray_tasks
from normweave.bridges.ray import Cluster, resources
from normweave.bridges.ray_features import Slice
from normweave.config import Config
from normweave.errors import ConfigError, MissingError, NormweaveError
from normweave.features import cache as feature_cache
from normweave.features import pair as feature_pair
from normweave.features.standardize import ChannelStandardizer, StandardizedFeatures
from normweave.heads.base import Head, TrainingStage
from normweave.network.torch import FittedRows
from normweave.types import FitData, Progress, Sample

POLL_S = 0.2
START_S = "300"
"""Seconds for the machines to be free, and for a lost one to be replaced, unless RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S
is set. Ray Train allows 60."""
COMMON = ("names", "seed", "category_names", "mean", "std")
PER_IMAGE = ("subclasses", "groups", "holdout", "given_categories")


class Job(NamedTuple):
    """A head to train, and the images that it is trained on."""

    head: Head  # after `begin`
    standard: ChannelStandardizer
    config: Config
    fingerprint: str  # of the extractor
    samples: tuple[Sample, ...]
    keys: tuple[str, ...]  # n, of the features of the rows
    owner: NDArray[np.int64]  # (n,) the sample of each row
    common: dict[str, Any]  # fields of the fit data
    per_image: dict[str, Any]  # fields of the fit data, (n,)
    cache: Path | None  # on the nodes; None: their default
    cache_gib: float
    device: str
    folder: str  # of the command

    @classmethod
    def of(
        cls,
        head: Head,
        standard: ChannelStandardizer,
        chosen: FittedRows,
        data: FitData,
        config: Config,
        *,
        fingerprint: str,
        cache: Path | None,
        cache_gib: float,
        device: str,
    ) -> Job:
        """Describe the training of a head on the fit rows."""
        images, fit = chosen.images, chosen.fit
        return cls(
            head,
            standard,
            config,
            fingerprint,
            images.samples,
            tuple(images.keys[row] for row in fit),
            images.owner[fit],
            {name: getattr(data, name) for name in COMMON},
            {name: getattr(data, name) for name in PER_IMAGE},
            cache and Path(os.path.abspath(cache)),
            cache_gib,
            device.partition(":")[0],
            os.getcwd(),
        )

    def share(self, rank: int, size: int) -> NDArray[np.int64]:
        """Return the rows of a worker: all of every `size`-th training image, and of every `size`-th held-out one."""
        held_out = self.per_image["holdout"]
        rows = []
        for side in (~held_out, held_out):
            images = np.unique(self.owner[side])[rank::size]
            rows.append(np.flatnonzero(side & np.isin(self.owner, images)))
        return np.sort(np.concatenate(rows))

    def data(self, rows: NDArray[np.int64]) -> FitData:
        """Return the fit data of some rows, whose features are computed unless this machine has them."""
        samples = tuple(self.samples[number] for number in np.unique(self.owner[rows]))
        own = Slice(self.config, samples, tuple(self.keys[row] for row in rows), self.fingerprint)
        cache = self.cache or feature_cache.default_folder()
        source = ray_features.source(own, cache=cache, cache_gib=self.cache_gib)
        fields: dict[str, Any] = self.common | {
            name: values if values is None else values[rows] for name, values in self.per_image.items()
        }
        data = FitData(
            features=StandardizedFeatures(source, self.standard),
            pair=feature_pair(self.config.features) if self.head.uses_text else None,
            **fields,
        )
        if not self.head.synthetic_variants:
            return data
        images, numbers = ray_features.scanned(own)
        synthetic = fitting.synthetic_anomalies(
            FittedRows(images, np.array(numbers), np.empty(0, dtype=np.int64)),
            ray_features.extractor_of(own),
            self.standard,
            data,
            variants=self.head.synthetic_variants,
            cache=cache,
            max_gib=self.cache_gib,
        )
        return replace(data, synthetic=synthetic)


def most_workers(stages: Sequence[TrainingStage], job: Job) -> int:
    """Return how many workers can divide the images, and each batch of these stages; 1 without a stage."""
    images = len(np.unique(job.owner[~job.per_image["holdout"]])) if stages else 1
    return min([images, *(stage.batch_images // stage.worker_images if stage.worker_images else 1 for stage in stages)])


def train(
    cluster: Cluster,
    job: Job,
    stages: Sequence[TrainingStage],
    *,
    threads: int | None,
    progress: Progress | None,
) -> int:
    """Train all stages of the head on the nodes of a cluster, and return the number of workers.

    Args:
        stages: of the head.
        threads: processors of a worker; None: all of the smallest node.

    Returns:
        1 if nothing was trained: there are not two nodes, or the batches cannot be divided.

    Raises:
        ConfigError: the head cannot be sent to other machines, or the loss is not finite.
        DataError: the features of a node are not those of the machine of the command, or not finite.
        NormweaveError: the workers were lost again and again.
    """
    limit = most_workers(stages, job)
    if limit < 2:
        return 1
    try:
        content = pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{job.config.head.model} cannot be sent to other machines ({error}). Train it without --ray, or make "
            "everything that the head holds picklable: no lambda, no open file."
        ) from error
    gpu = job.device == "cuda"
    size, trained = cluster.call(_train, content, limit, threads, gpu, progress=progress)
    if trained is not None:
        job.head.load_state_dict(pickle.loads(trained))
    return size


# ── in the process that is connected to the cluster ──────────────────────────────────────────────────────────────────


def _train(progress: Progress, content: bytes, limit: int, threads: int | None, gpu: bool) -> tuple[int, bytes | None]:
    """Return the number of workers, and the state of the head that they trained; None if there are not two nodes.

    If a node is lost and not replaced, those that are left start again.
    """
    while True:
        nodes = _nodes(threads, gpu)
        size = min(len(nodes), limit)
        if size < 2:
            return 1, None
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_S)
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process that is of use to checkpoints only
        from ray.train import TrainingFailedError

        try:
            return size, _fit(progress, content, size, int(min(each["CPU"] for each in nodes)), threads, gpu)
        except TrainingFailedError as error:
            if len(_nodes(threads, gpu)) < size:
                continue
            reason = str(error).strip().splitlines()[-1][:500]  # the line after the traceback
            raise NormweaveError(
                f"The training on {size} machines was started {ray_tasks.RETRIES + 1} times and ended each time, or "
                f"other work took their processors ({reason}). Run the command again."
            ) from error


def _nodes(threads: int | None, gpu: bool) -> list[dict[str, float]]:
    """Return the resources of each node that can have a worker."""
    machines = resources()
    return [each for each in machines if each.get("CPU", 0) >= (threads or 1) and (each.get("GPU") or not gpu)]


def _fit(progress: Progress, content: bytes, size: int, least: int, threads: int | None, gpu: bool) -> bytes:
    """Return the state of the head that this number of workers trained.

    Args:
        least: processors of the smallest node.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    messages: Any = ray.remote(num_cpus=0)(ray_tasks.Messages).options(scheduling_strategy=here).remote()
    outcome: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"content": content, "messages": messages},
            scaling_config=ScalingConfig(
                num_workers=size,
                use_gpu=gpu,
                resources_per_worker={"CPU": threads or least} | ({"GPU": 1} if gpu else {}),
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                storage_path=folder,
                failure_config=FailureConfig(max_failures=ray_tasks.RETRIES, controller_failure_limit=0),
            ),
        )

        def fit() -> None:
            try:
                outcome.append(trainer.fit())
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        last = error = None
        while thread.is_alive():
            thread.join(POLL_S)
            step, error = ray.get(messages.read.remote())
            if (left := len(_nodes(threads, gpu))) < size:
                step = (f"wait for {size} machines", left, size)
            if step is not None and step != last:
                progress(*step)
                last = step
    (result,) = outcome
    if error is not None:
        raise pickle.loads(error)
    if isinstance(result, Exception):
        raise result
    state: bytes = result.return_value
    return state


# ── in the workers ───────────────────────────────────────────────────────────────────────────────────────────────────


def received(content: bytes) -> Job:
    """Return a job that the machine of the command has sent.

    Raises:
        MissingError: this machine has not the package of the head.
    """
    try:
        job: Job = pickle.loads(content)
    except (ImportError, AttributeError) as error:
        raise MissingError(
            f"The worker {socket.gethostname()} cannot load the head of this training ({error}). Install the same "
            "versions of normweave and its plug-ins on every node."
        ) from error
    return job


def _work(given: dict[str, Any]) -> bytes | None:
    """Train all stages with the share of this worker, and return the state of the head."""
    import ray
    import ray.train
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

    messages = given["messages"]
    if ray.get(messages.read.remote())[1] is not None:  # started again after an error that is raised again
        return None
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()

    def report(*step: Any) -> None:
        messages.report.remote(*step)

    try:
        job = received(given["content"])
        ray_tasks.in_folder(job.folder)
        workers = training.Workers(
            rank,
            size,
            int((~job.per_image["holdout"]).sum()),
            partial(RayDDPStrategy, find_unused_parameters=True, broadcast_buffers=False),
            RayLightningEnvironment(),
        )
        data = job.data(job.share(rank, size))
        for stage in job.head.stages(data):
            training.train(stage, data, progress=None if rank else report, device=job.device, workers=workers)
    except NormweaveError as error:
        ray.get(messages.fail.remote(pickle.dumps(error)))
        raise
    return pickle.dumps({name: tensor.detach().cpu() for name, tensor in job.head.state_dict().items()})
