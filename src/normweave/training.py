"""The training loop of all stages that are trained by gradient.

Lightning runs the loop. This module adds the order of the images, the random numbers, early stopping and checkpoints.
All random numbers come from generators seeded by (seed, stage, epoch, batch), so that a run that was killed and
resumed from its last completed epoch ends with bit-equal weights.

Several processes can train a stage together (`Workers`): each has a share of the images and of every batch, and the
gradients are averaged. Then the rank of the process is part of the seed, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import Strategy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from normweave.atomic import write_atomically
from normweave.errors import BundleError, ConfigError, DataError, MissingError
from normweave.heads.base import TrainingStage
from normweave.logs import quiet
from normweave.types import FitData, Progress


@dataclass(kw_only=True)
class History:
    """Losses and best epoch of a stage. Epochs count from 1."""

    epochs: int = 0
    best_epoch: int = 0
    """Epoch whose weights are kept: the lowest loss on the held-out images; without any, the last epoch."""
    best_loss: float | None = None
    """Loss on the held-out images after the best epoch; None without held-out images."""
    stopped_early: bool = False
    losses: list[float] = field(default_factory=list)
    """Mean training loss of every epoch."""
    holdout_losses: list[float] = field(default_factory=list)
    """Loss on the held-out images after every epoch; empty without held-out images."""


class Workers(NamedTuple):
    """Processes that train a stage together. The default process group of torch connects them."""

    rank: int
    """Of this process."""
    size: int
    images: int
    """Training images of all processes."""
    strategy: Callable[[], Strategy]
    """Returns Lightning's strategy, which averages the gradients."""
    environment: ClusterEnvironment

    def share(self, batch: NDArray[np.int64]) -> tuple[NDArray[np.int64], float]:
        """Return the images of a batch that are of this process, and the weight of their mean loss.

        The images of an epoch are dealt to the processes in turn: the i-th one is image i // size of process i % size.
        With these weights the average over the processes is the mean over the batch. A process without an image in a
        batch, such as the last one of an epoch, repeats one with the weight 0.

        Args:
            batch: consecutive numbers in the epoch.
        """
        own = batch[batch % self.size == self.rank] // self.size
        return (own if len(own) else batch[:1] // self.size), len(own) * self.size / len(batch)


def train(
    stage: TrainingStage,
    data: FitData,
    *,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    device: str = "auto",
    workers: Workers | None = None,
) -> History:
    """Train `stage.module` on all images but the held-out ones; leave it in eval mode with its best weights.

    Args:
        data: of this process.
        folder: the state after each epoch is written to `NAME.safetensors` in it; None = not written.
        resume: continue from that file. A finished stage is loaded and not trained again.
        progress: called after each epoch.
        device: auto, cpu or cuda.
        workers: the processes that train together, each of which calls this; None: this process alone.

    Raises:
        DataError: no images to train on, or features that are not finite.
        ConfigError: the loss is not finite, or the file to resume from was written with other settings.
        BundleError: the file to resume from is damaged.
        MissingError: the device is not available.
    """
    loop = _Loop(stage, data, progress, workers)
    path = folder / f"{stage.name}.safetensors" if folder else None
    resumed = False
    if path is not None and path.exists():
        if resume:
            loop.on_load_checkpoint(read_checkpoint(path))
            resumed = True
        else:
            path.unlink()
    if not loop.finished:
        loop.path = path
        accelerator = _accelerator(device)
        home = next((tensor.device for tensor in stage.module.state_dict().values()), torch.device("cpu"))
        try:
            with quiet("lightning.pytorch"):
                trainer = Trainer(
                    accelerator=accelerator,
                    devices=1,
                    max_epochs=stage.epochs,
                    gradient_clip_val=stage.gradient_clip or None,
                    accumulate_grad_batches=stage.accumulate,
                    strategy="auto" if workers is None else workers.strategy(),
                    plugins=[SafetensorsCheckpoints(), workers.environment if workers else LightningEnvironment()],
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
                trainer.fit(loop, train_dataloaders=loop.batches, ckpt_path=path if resumed else None)
        except SystemExit:
            # Lightning turns Ctrl-C into exit code 1, which the command line uses for "anomalous".
            raise KeyboardInterrupt from None
        stage.module.to(home).zero_grad()
    stage.module.load_state_dict(loop.best)
    stage.module.eval()
    return loop.history


class _Loop(LightningModule):
    """Lightning module of a stage."""

    def __init__(self, stage: TrainingStage, data: FitData, progress: Progress | None, workers: Workers | None) -> None:
        super().__init__()
        self.stage = stage
        self.module = stage.module
        self.data = data
        self.subclasses = torch.from_numpy(data.subclasses)
        self.report_progress = progress
        self.workers = workers
        self.own = () if workers is None else (workers.rank,)
        self.size = 1 if workers is None else workers.size
        self.path: Path | None = None
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self.running: list[Tensor] = []
        self.train_rows = np.flatnonzero(~data.holdout)
        images = len(self.train_rows) if workers is None else workers.images
        self.epoch_images = min(stage.epoch_images or images, images)  # of all processes
        held_out = np.flatnonzero(data.holdout)
        limit = math.ceil(stage.epoch_images / self.size)
        every = math.ceil(len(held_out) / (limit or len(data))) or 1
        self.holdout_rows = held_out[::every]  # as the batches, at most `epoch_images`
        if len(self.train_rows) == 0:
            raise DataError(
                f"Nothing to train {stage.name!r} on: all {len(data)} fit images are held out. "
                "Add images or lower data.holdout_share."
            )
        self.batches = _Batches(self)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or training stopped early."""
        return self.history.stopped_early or self.history.epochs >= self.stage.epochs

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Return a generator for one purpose. It is on the CPU, so that its numbers are equal on every device."""
        key = repr((self.data.seed, self.stage.name, *purpose)).encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))

    def read(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return features and subclasses of these images."""
        features = self.data.features.read(rows)  # (B, D, h, w)
        if not bool(torch.isfinite(features).all()):
            bad = rows[~torch.isfinite(features).flatten(1).all(1).numpy()]
            raise DataError(
                f"The features of fit image {bad[0]} hold NaN or infinity. Features must be finite: "
                "empty the feature cache, and check the image and the backbone's weights."
            )
        return features, self.subclasses[torch.from_numpy(rows)]

    def configure_optimizers(self) -> Any:
        """Return the optimiser and, if the learning rate is not constant, its cosine schedule over epochs."""
        optimiser, stage = self.stage.optimiser(), self.stage
        if stage.final_rate == 1:
            return optimiser

        def share(epoch: int) -> float:
            return stage.final_rate + (1 - stage.final_rate) * (1 + math.cos(math.pi * epoch / stage.epochs)) / 2

        return [optimiser], [torch.optim.lr_scheduler.LambdaLR(optimiser, share)]

    def on_train_start(self) -> None:
        """Note the buffers, which are equal in all processes."""
        if self.workers is not None:
            self.shared = self._buffer_values()

    def on_train_epoch_start(self) -> None:
        """Switch batch statistics and dropout on."""
        self.module.train()
        self.running = []

    def training_step(self, batch: tuple[Tensor, Tensor, float], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        features, subclasses, weight = batch
        loss = self.stage.loss(
            features,
            subclasses,
            generator=self.generator("train", self.history.epochs, batch_idx, *self.own),
            training=True,
        )["loss"]
        if not bool(torch.isfinite(loss)):
            self._not_finite(loss, f"batch {batch_idx + 1}")
        loss = weight * loss
        self.running.append(loss.detach())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Average over the processes by how much each changed its buffers, such as the statistics of a batch norm."""
        if self.workers is None:
            return
        self.shared += self._sum(self._buffer_values() - self.shared) / self.size
        start = 0
        for buffer in self._floating():
            buffer.copy_(self.shared[start : start + buffer.numel()].view_as(buffer))
            start += buffer.numel()

    def _floating(self) -> list[Tensor]:
        return [buffer for buffer in self.module.buffers() if buffer.is_floating_point()]

    def _buffer_values(self) -> Tensor:
        """Return the values of all buffers, (n,), as 32-bit numbers."""
        return torch.cat([torch.empty(0, device=self.device), *(each.float().flatten() for each in self._floating())])

    def _sum(self, values: Tensor) -> Tensor:
        """Return the sums over the processes."""
        if self.workers is not None:
            torch.distributed.all_reduce(values)
        return values

    def on_train_epoch_end(self) -> None:
        """Compute the loss on the held-out images, keep the best weights, write the checkpoint."""
        history, weights = self.history, self.module.state_dict()
        loss = self._holdout_loss()
        history.epochs += 1
        mean = self._sum(torch.stack(self.running).mean()) / self.size
        history.losses.append(mean.item())
        if loss is not None:
            history.holdout_losses.append(loss)
        if loss is None or history.best_loss is None or loss < history.best_loss:
            history.best_loss, history.best_epoch = loss, history.epochs
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        patience, stale = self.stage.patience, history.epochs - history.best_epoch
        history.stopped_early = 0 < patience <= stale and history.epochs < self.stage.epochs
        self.trainer.should_stop = history.stopped_early
        if self.path is not None:
            self.trainer.save_checkpoint(self.path, weights_only=False)
        if self.report_progress is not None:
            self.report_progress(f"train {self.stage.name}", history.epochs, self.stage.epochs)

    @torch.no_grad()
    def _holdout_loss(self) -> float | None:
        """Return the mean loss over the held-out images, with the same random numbers after every epoch; None: none."""
        self.module.eval()
        total = 0.0
        for batch, start in enumerate(range(0, len(self.holdout_rows), self.stage.batch_images)):
            rows = self.holdout_rows[start : start + self.stage.batch_images]
            features, subclasses = self.read(rows)
            loss = self.stage.loss(
                features.to(self.device),
                subclasses.to(self.device),
                generator=self.generator("holdout", batch, *self.own),
                training=False,
            )["loss"]
            total += loss.item() * len(rows)
        both = torch.tensor([total, len(self.holdout_rows)], dtype=torch.float64, device=self.device)
        total, count = self._sum(both).tolist()
        if not math.isfinite(total):
            self._not_finite(torch.tensor(total), "the held-out images")
        return total / count if count else None

    def _not_finite(self, loss: Tensor, batch: str) -> None:
        raise ConfigError(
            f"Training {self.stage.name!r} diverged: the loss is {loss.item()} at epoch "
            f"{self.history.epochs + 1}, {batch}. It must be finite: lower the learning rate."
        )

    def settings(self) -> str:
        """Return a hash of the settings that must be equal for a run to be resumed."""
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.stage.optimiser().param_groups
        ]
        shapes = {name: list(tensor.shape) for name, tensor in self.module.state_dict().items()}
        settings = (
            [self.stage.name, self.stage.epochs, self.stage.batch_images, self.stage.epoch_images, self.stage.patience],
            [self.stage.gradient_clip, self.stage.final_rate, self.stage.accumulate],
            [self.data.seed, self.data.subclasses.tolist(), self.data.holdout.tolist(), groups, shapes],
        )
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the settings, the history and the best weights."""
        checkpoint["stage"] = {
            "settings": self.settings(),
            "history": asdict(self.history),
            "best": self.best,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the history and the best weights; raise ConfigError if the settings differ."""
        saved = checkpoint["stage"]
        if saved["settings"] != self.settings():
            raise ConfigError(
                f"The checkpoint of {self.stage.name!r} was written with other settings, another seed or other "
                "images. Resume with the same ones, or train without --resume."
            )
        self.history = History(**saved["history"])
        self.best = saved["best"]


class _Batches:
    """Batches of the images of an epoch, drawn in random order from the training images."""

    def __init__(self, loop: _Loop) -> None:
        self.loop = loop

    def __len__(self) -> int:
        return math.ceil(self.loop.epoch_images / self.loop.stage.batch_images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        loop, size = self.loop, self.loop.stage.batch_images
        generator = loop.generator("order", loop.history.epochs, *loop.own)
        rows = loop.train_rows[torch.randperm(len(loop.train_rows), generator=generator).numpy()]
        for start in range(0, loop.epoch_images, size):
            batch, weight = np.arange(start, min(start + size, loop.epoch_images)), 1.0
            if loop.workers is not None:
                batch, weight = loop.workers.share(batch)
            yield *loop.read(rows[batch % len(rows)]), weight  # images have several tiles, shares are of whole images


class SafetensorsCheckpoints(CheckpointIO):
    """Lightning checkpoints in safetensors files: reading one cannot execute code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write the checkpoint atomically."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint to the CPU."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the file."""
        Path(path).unlink()


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write nested dicts, lists and tuples of numbers, strings and tensors. All but the tensors is stored as JSON.

    Raises:
        TypeError: the checkpoint holds a value of another type.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(checkpoint, tensors))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"tree": tree}))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote.

    Raises:
        BundleError: the file is damaged or not a checkpoint of `write_checkpoint`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            checkpoint: dict[str, Any] = _decode(json.loads(file.metadata()["tree"]), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{path} is not a checkpoint that can be read ({error}). Delete it, or train without --resume."
        ) from error
    return checkpoint


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON stores it, containers as [type, *items]; tensors are moved to `tensors`."""
    match value:
        case Tensor():
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return ["tensor", name]
        case Mapping():
            return ["dict", *([_encode(key, tensors), _encode(item, tensors)] for key, item in value.items())]
        case list():
            return ["list", *(_encode(item, tensors) for item in value)]
        case tuple():
            return ["tuple", *(_encode(item, tensors) for item in value)]
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise TypeError(f"A checkpoint cannot hold a {type(value).__name__}: {value!r}")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    match value:
        case ["tensor", name]:
            return tensors[name]
        case ["dict", *items]:
            return {_decode(key, tensors): _decode(item, tensors) for key, item in items}
        case ["list", *items]:
            return [_decode(item, tensors) for item in items]
        case ["tuple", *items]:
            return tuple(_decode(item, tensors) for item in items)
        case _:
            return value


def _accelerator(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingError("No CUDA device was found. Use device cpu or auto, or install a torch build with CUDA.")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
