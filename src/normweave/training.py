"""The one loop in which gradients train a part of a head. Heads in closed form never come here.

Lightning turns the loop; what is ours is the order of the images, the random numbers, the stop rule and the
file. Everything random is drawn from generators seeded by (seed, stage, epoch, batch), so a run that was
killed and taken up again at an epoch's end comes to the same weights, to the bit, as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import CheckpointIO
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from normweave.atomic import write_atomically
from normweave.errors import BundleError, ConfigError, DataError, MissingError
from normweave.heads.base import TrainingStage
from normweave.types import FitData, Progress


@dataclass(kw_only=True)
class History:
    """How a stage went. Epochs count from 1."""

    epochs: int = 0
    best_epoch: int = 0
    """Whose weights the module holds: the lowest loss on the held-out normals; without any, the last."""
    best_loss: float | None = None
    """On the held-out normals; None when there are none."""
    stopped_early: bool = False
    losses: list[float] = field(default_factory=list)
    """Mean loss of every epoch on the images that it trained on."""
    holdout_losses: list[float] = field(default_factory=list)
    """Loss on the held-out normals after every epoch; empty without any."""


def train(
    stage: TrainingStage,
    data: FitData,
    *,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    device: str = "auto",
) -> History:
    """Train `stage.module` on all images but the held-out ones; leave it in eval mode with its best weights.

    Args:
        folder: where the state after each epoch is kept, as `NAME.safetensors`; None: nowhere.
        resume: go on from that file, or take over what it holds when the stage was finished.
        device: auto, cpu or cuda.

    Raises:
        DataError: nothing to train on, or features that are not finite.
        ConfigError: the loss is not finite, or the file to resume from was written with other settings.
        BundleError: the file to resume from is damaged.
        MissingError: the device is not there.
    """
    loop = _Loop(stage, data, progress)
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
        with _quiet():
            trainer = Trainer(
                accelerator=accelerator,
                devices=1,
                max_epochs=stage.epochs,
                gradient_clip_val=stage.gradient_clip or None,
                plugins=[SafetensorsCheckpoints(), LightningEnvironment()],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(loop, train_dataloaders=loop.batches, ckpt_path=path if resumed else None)
        stage.module.to(home).zero_grad()  # the last gradients are of no use to anyone
    stage.module.load_state_dict(loop.best)
    stage.module.eval()
    return loop.history


class _Loop(LightningModule):
    """Lightning's view of a stage."""

    def __init__(self, stage: TrainingStage, data: FitData, progress: Progress | None) -> None:
        super().__init__()
        self.stage = stage
        self.module = stage.module
        self.data = data
        self.subclasses = torch.from_numpy(data.subclasses)
        self.told = progress
        self.path: Path | None = None
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self.running: list[Tensor] = []
        self.train_rows = np.flatnonzero(~data.holdout)
        self.holdout_rows = np.flatnonzero(data.holdout)
        if len(self.train_rows) == 0:
            raise DataError(
                f"Nothing to train {stage.name!r} on: all {len(data)} fit normals are held out. "
                "Add images or lower data.holdout_share."
            )
        self.batches = _Batches(self)

    @property
    def finished(self) -> bool:
        """Whether every epoch is done, or the stop rule has spoken."""
        return self.history.stopped_early or self.history.epochs >= self.stage.epochs

    def generator(self, *where: str | int) -> torch.Generator:
        """Random numbers for one purpose, on the CPU: the same on every device."""
        said = repr((self.data.seed, self.stage.name, *where)).encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(said).digest()[:7], "big"))

    def read(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Features and subclasses of these images."""
        features = self.data.features.read(rows)  # (B, D, h, w)
        if not bool(torch.isfinite(features).all()):
            bad = rows[~torch.isfinite(features).flatten(1).all(1).numpy()]
            raise DataError(
                f"The features of fit image {bad[0]} hold NaN or infinity. Features must be finite: "
                "empty the feature cache, and check the image and the backbone's weights."
            )
        return features, self.subclasses[torch.from_numpy(rows)]

    def configure_optimizers(self) -> Any:
        """The stage's own, and how its learning rate falls: cos, at the end of each epoch."""
        optimiser, stage = self.stage.optimiser(), self.stage
        if stage.final_rate == 1:
            return optimiser

        def share(epoch: int) -> float:
            return (
                stage.final_rate + (1 - stage.final_rate) * (1 + math.cos(math.pi * epoch / stage.epochs)) / 2
            )

        return [optimiser], [torch.optim.lr_scheduler.LambdaLR(optimiser, share)]

    def on_train_epoch_start(self) -> None:
        """Batch statistics and dropout on."""
        self.module.train()
        self.running = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        loss = self.stage.loss(
            *batch, generator=self.generator("train", self.history.epochs, batch_idx), training=True
        )["loss"]
        if not bool(torch.isfinite(loss)):
            self._not_finite(loss, f"batch {batch_idx + 1}")
        self.running.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        """Judge the epoch on the held-out normals, remember the best, write the state down."""
        history, weights = self.history, self.module.state_dict()
        loss = self._holdout_loss() if len(self.holdout_rows) else None
        history.epochs += 1
        history.losses.append(torch.stack(self.running).mean().item())
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
        if self.told is not None:
            self.told(f"train {self.stage.name}", history.epochs, self.stage.epochs)

    @torch.no_grad()
    def _holdout_loss(self) -> float:
        """Mean loss of a held-out image, with the same random numbers after every epoch."""
        self.module.eval()
        total = 0.0
        for batch, start in enumerate(range(0, len(self.holdout_rows), self.stage.batch_images)):
            rows = self.holdout_rows[start : start + self.stage.batch_images]
            features, subclasses = self.read(rows)
            loss = self.stage.loss(
                features.to(self.device),
                subclasses.to(self.device),
                generator=self.generator("holdout", batch),
                training=False,
            )["loss"]
            total += loss.item() * len(rows)
        if not math.isfinite(total):
            self._not_finite(torch.tensor(total), "the held-out normals")
        return total / len(self.holdout_rows)

    def _not_finite(self, loss: Tensor, where: str) -> None:
        raise ConfigError(
            f"Training {self.stage.name!r} went astray: the loss is {loss.item()} at epoch "
            f"{self.history.epochs + 1}, {where}. It must be finite: lower the learning rate."
        )

    def settings(self) -> str:
        """What a run must have in common with the one that it goes on from."""
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.stage.optimiser().param_groups
        ]
        shapes = {name: list(tensor.shape) for name, tensor in self.module.state_dict().items()}
        said = (
            [self.stage.name, self.stage.epochs, self.stage.batch_images, self.stage.patience],
            [self.stage.gradient_clip, self.stage.final_rate],
            [self.data.seed, self.data.subclasses.tolist(), self.data.holdout.tolist(), groups, shapes],
        )
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know of."""
        checkpoint["stage"] = {
            "settings": self.settings(),
            "history": asdict(self.history),
            "best": self.best,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        saved = checkpoint["stage"]
        if saved["settings"] != self.settings():
            raise ConfigError(
                f"The saved state of {self.stage.name!r} was written with other settings, another seed or other "
                "images. Resume with the same ones, or train anew without --resume."
            )
        self.history = History(**saved["history"])
        self.best = saved["best"]


class _Batches:
    """The images of one epoch, in an order of that epoch. No DataLoader: features are on disk or at hand."""

    def __init__(self, loop: _Loop) -> None:
        self.loop = loop

    def __len__(self) -> int:
        return math.ceil(len(self.loop.train_rows) / self.loop.stage.batch_images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        loop, size = self.loop, self.loop.stage.batch_images
        generator = loop.generator("order", loop.history.epochs)
        rows = loop.train_rows[torch.randperm(len(loop.train_rows), generator=generator).numpy()]
        for start in range(0, len(rows), size):
            yield loop.read(rows[start : start + size])


class SafetensorsCheckpoints(CheckpointIO):
    """Lightning's checkpoints as one safetensors file, so that reading one cannot run code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write all of it or nothing."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read it to the CPU."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete it."""
        Path(path).unlink()


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write nested dicts, lists and tuples of numbers, texts and tensors: all but the tensors as JSON.

    Raises:
        TypeError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(checkpoint, tensors))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"tree": tree}))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote.

    Raises:
        BundleError: it is damaged, or not ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            checkpoint: dict[str, Any] = _decode(json.loads(file.metadata()["tree"]), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{path} is not a state of training that can be read ({error}). "
            "Delete it, or train without --resume."
        ) from error
    return checkpoint


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON can hold it, what has parts as [kind, *parts]; tensors move to `tensors`."""
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
        raise MissingError(
            "No CUDA device was found. Use device cpu or auto, or install a torch build with CUDA."
        )
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's news and advice to itself, and let Ctrl-C be a KeyboardInterrupt."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)  # such as a GPU that device=cpu leaves idle
            # Lightning 2.6 upon torch 2.14: its own call, nothing a user could change.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    except SystemExit:
        # Lightning turns Ctrl-C into exit code 1, which is the command line's word for "anomalous".
        raise KeyboardInterrupt from None
    finally:
        logger.setLevel(level)
