"""Base classes of every head and of every training stage. A new head overrides only what is its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.heads import state
from normweave.passes import BATCH_IMAGES

if TYPE_CHECKING:
    import torch

    from normweave.config import TrainingConfig
    from normweave.types import FeatureSource, FitData, PatchScores


def batches(source: FeatureSource, rows: NDArray[np.int64] | None = None) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield the rows and features of a few images at a time, in the order of `rows` (None = all images)."""
    rows = np.arange(len(source)) if rows is None else rows
    for start in range(0, len(rows), BATCH_IMAGES):
        batch = rows[start : start + BATCH_IMAGES]
        yield batch, source.read(batch)


class TrainingStage(ABC):
    """A part of a head that is trained by gradient. `training.train` is the only training loop.

    Attributes:
        name: names the checkpoint file and seeds the random numbers of the stage; unique within a head.
        module: holds every parameter and buffer that the stage changes.
        epochs, batch_images, epoch_images, learning_rate, patience: as in `config.TrainingConfig`.
        gradient_clip: the gradient norm over all parameters is clipped to this value; 0 = no clipping.
        accumulate: batches whose gradients are averaged for one step of the optimiser.
        final_rate: the learning rate follows half a cosine down to this share of its start; 1 = constant.
        worker_images: images of a batch that the loss needs together, at least. A batch can be divided between
            processes that average their gradients, each with this many. None: the loss compares all images of a batch.
    """

    name: str
    module: nn.Module
    gradient_clip: float = 0.0
    accumulate: int = 1
    final_rate: float = 1.0
    worker_images: int | None = 1

    def __init__(self, module: nn.Module, training: TrainingConfig) -> None:
        self.module = module
        self.epochs = training.epochs
        self.batch_images = training.batch_images
        self.epoch_images = training.epoch_images
        self.learning_rate = training.learning_rate
        self.patience = training.patience

    @abstractmethod
    def optimiser(self) -> torch.optim.Optimizer:
        """Return a new optimiser over the parameters of the module."""

    @abstractmethod
    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Return the loss terms of a batch by name; `loss` is the one that is minimised.

        Args:
            features: (B, D, h, w) standardised features.
            subclasses: (B,) int64 indices into `FitData.names`.
            generator: source of every random draw.
            training: False on held-out images; then nothing may change.
        """


class Head(nn.Module):
    """Turns features into patch scores.

    Fit in this order: `begin`, every stage of `stages` trained, `finish`. Everything fitted is a parameter or a
    buffer, so that `state_dict` contains all of it. A head must override `forward`; everything else has a default.
    """

    subclass_names: tuple[str, ...] = ()
    """`Sample.subclass_name` of each subclass that images are routed to, known after `begin`; empty = no routing."""
    image_level: bool = False
    """The map has one cell, so that no pixel metrics are computed."""
    synthetic_variants: int = 0
    """How many synthetic anomalies are made of each fit image; 0 = none."""
    distributed: bool = False
    """Whether `begin` and `finish` read the images by `passes.over` only, and there is no training stage: then they can
    be on several machines."""
    uses_text: bool = False
    """Needs the text side of a vision-language pair while fitting."""
    can_exclude: bool = False
    """Whether `score_excluding` leaves an expert out, known after `begin`."""
    origins: NDArray[np.int64] | None = None
    """(M, 3) row of the fit data, grid row and grid column of each stored patch that `PatchScores.nearest` refers to;
    known after `finish`, not part of the state. None: no such patches, or loaded."""

    @property
    def growing(self) -> tuple[str, ...]:
        """Names of the tensors that get another length when a subclass is added or removed.

        The networks before and after differ in nothing else. No name: they may differ in everything.
        """
        return ()

    def reuse(self, fitted: Head) -> None:
        """Take what a head of the same settings, fitted to all images, measured to weigh its parts (before `begin`).

        The heads of a cross-validation do not measure it again: it is a few numbers of all images, while everything
        else is fitted without the fold.
        """

    def defect_images(self, data: FitData) -> NDArray[np.int64]:
        """Return the fit images that the head needs with a synthetic defect (`FitData.defects`), each as often."""
        return np.empty(0, dtype=np.int64)

    def begin(self, data: FitData) -> None:
        """Fit everything in closed form that the training stages need."""

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """Return the training stages in order; none if nothing is trained by gradient."""
        return ()

    def finish(self, data: FitData) -> None:
        """Fit everything in closed form that needs the trained parts."""

    @abstractmethod
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w) standardised features; the result for an image does not depend on its batch."""

    def score_excluding(self, features: Tensor, subclasses: Tensor) -> PatchScores:
        """Score each image without the expert of its own subclass (leave-one-subclass-out).

        Args:
            features: (B, D, h, w) standardised features.
            subclasses: (B,) int64 indices into `subclass_names`; -1: no expert is left out.
        """
        scores: PatchScores = self(features)
        return scores

    def embed(self, features: Tensor) -> Tensor | None:
        """Return the embeddings (B, C) of the images, which separate the subclasses; None if the head has none."""
        return None

    def notes(self) -> dict[str, Any]:
        """Return the choices that were made while fitting, as JSON values."""
        return {}

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode; a training stage switches the mode of its own module."""
        return super().train(False)

    def state(self) -> dict[str, Tensor]:
        """Return copies of all parameters and persistent buffers, as safetensors stores them."""
        return state.state(self)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state` returned; raise BundleError if it does not fit."""
        state.load_state(self, tensors)
