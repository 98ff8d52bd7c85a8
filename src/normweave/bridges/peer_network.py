"""anomalib's models in our benchmark: fitted on our division of the data, as a `Network` behind our `Detector`."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.data.dataclasses import ImageItem
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from normweave.bridges.models import build, distil, quiet_anomalib
from normweave.bridges.peers import PREFIX, PeerPlan
from normweave.data import rows, splits
from normweave.data.images import decode
from normweave.data.prepare import Preparation
from normweave.detector import Detector
from normweave.errors import BundleError
from normweave.fitting import divide, rows_of
from normweave.network.base import Network
from normweave.outcome.operating_point import Calibration
from normweave.record import data_record
from normweave.types import RawOutput, Sample, Tile

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # anomalib imports deprecated modules of timm and of its own
    from anomalib.models.components import AnomalibModule


def fit(plan: PeerPlan, samples: Sequence[Sample]) -> Detector:
    """Train a model of anomalib on the fit images; compute the operating points from the calibration images.

    Raises:
        MissingError, ConfigError: as `models.build`.
        DataError: there are too few images.
    """
    config = plan.config
    # A peer is trained once: cross-validation would train it anew for each fold.
    images, division = divide(samples, replace(config, data=replace(config.data, calibration="split")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ExitStack() as stack:
        stack.enter_context(quiet_anomalib())
        stack.enter_context(isolate_rng())
        work = stack.enter_context(tempfile.TemporaryDirectory(prefix="normweave-peer-"))
        torch.manual_seed(config.seed)
        np.random.seed(config.seed)  # noqa: NPY002 - anomalib's coreset draws from it
        model = build(plan, work=Path(work))
        _train(model, plan, images, rows_of(images, division.fit), Path(work), device)
    detector = Detector(
        AnomalibNetwork(model, device=device),
        config=config,
        subclass_names=(),
        subclasses={each.subclass_name: (each.category, each.subclass) for each in images.samples},
        record={"model": PREFIX + plan.name, **data_record(images, division)},
        refused=images.refused,
    )
    held_out = detector.held_out_scores(images, rows_of(images, division.calibration))
    detector.draw_operating_points(held_out, config.outcome, attainable=True)
    return detector


class AnomalibNetwork(Network):
    """A trained model of anomalib; its maps and scores are not rescaled."""

    library = "anomalib"

    def __init__(self, model: AnomalibModule, *, device: str) -> None:
        self.model = model.to(device).eval()
        self.parameters = sum(each.numel() for each in model.state_dict().values() if each.is_floating_point())
        self._device = device

    @torch.no_grad()
    def __call__(self, pixels: NDArray[np.uint8], excluded: NDArray[np.int64] | None = None) -> RawOutput:
        """Return the maps (n, height, width) and image scores of (n, 3, height, width) prepared pixels."""
        images = torch.from_numpy(pixels).to(self._device).float() / 255  # (n, 3, H, W)
        outputs = self.model.model(self.model.pre_processor.transform(images))
        height, width = pixels.shape[2:]
        return RawOutput(
            scores=outputs.anomaly_map.float().reshape(-1, height, width).cpu().numpy(),
            image_scores=outputs.pred_score.float().reshape(-1).cpu().numpy(),
        )

    def write(
        self, folder: Path, *, record: Mapping[str, Any], calibration: Calibration | None, overwrite: bool
    ) -> None:
        """Raise an error, because a model of anomalib cannot be saved as a bundle.

        Raises:
            BundleError: always.
        """
        raise BundleError("A model of anomalib cannot be saved as a bundle. Export it with anomalib's Engine.")


class _Images(Dataset[ImageItem]):
    """Rows of good images as anomalib's items, in 0..1."""

    def __init__(self, scanned: rows.Rows, chosen: NDArray[np.int64]) -> None:
        self.scanned = scanned
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> ImageItem:
        row = int(self.chosen[number])
        return ImageItem(
            image=torch.from_numpy(self.scanned.load(row)).float() / 255,
            gt_label=torch.tensor(0),
            image_path=str(self.scanned.samples[self.scanned.owner[row]].image_path),
        )


class FitNormals(LightningDataModule):
    """The fit images as an anomalib data module, which some of its models use directly."""

    def __init__(self, scanned: rows.Rows, chosen: NDArray[np.int64], *, batch_images: int, seed: int) -> None:
        super().__init__()
        self.images = _Images(scanned, chosen)
        self.train_batch_size = batch_images
        self.seed = seed

    def train_dataloader(self) -> DataLoader[ImageItem]:
        """Return a loader of every image once, shuffled by the seed."""
        return DataLoader(
            self.images,
            batch_size=self.train_batch_size,
            shuffle=True,
            collate_fn=ImageBatch.collate,
            generator=torch.Generator().manual_seed(self.seed),
        )


def _train(
    model: AnomalibModule, plan: PeerPlan, scanned: rows.Rows, chosen: NDArray[np.int64], work: Path, device: str
) -> None:
    """Train with Lightning's trainer as anomalib's Engine does, but write no checkpoint."""
    config, values = plan.config, plan.values
    held: NDArray[np.int64] | None = None
    if plan.name == "efficient_ad":
        # Its maps are scaled by images that it is not trained on. These are fit images, since the threshold must be
        # computed from images that it has not seen at all.
        owners = scanned.owner[chosen]
        groups = [scanned.samples[owner].group or str(scanned.samples[owner].image_path) for owner in owners]
        out = splits.holdout(
            np.unique(groups, return_inverse=True)[1],
            np.zeros(len(chosen), dtype=np.int64),
            share=config.data.holdout_share,
            seed=config.seed,
        )
        held, chosen = chosen[out], chosen[~out]
        if not values["teacher"]:
            _distil(model, plan, scanned, chosen, work)
    data = FitNormals(scanned, chosen, batch_images=values.get("batch_images", 1), seed=config.seed)
    arguments: dict[str, Any] = {
        "max_epochs": values.get("epochs", 1),
        "max_steps": values.get("max_steps") or -1,
        "devices": 1,
        **model.trainer_arguments,
        "accelerator": "gpu" if device == "cuda" else "cpu",
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(**arguments)
    trainer.fit(model, datamodule=data)
    if held is not None:
        model.eval()
        loader = DataLoader(_Images(scanned, held), batch_size=1, collate_fn=ImageBatch.collate)
        model.model.quantiles.update(model.map_norm_quantiles(loader))


def _distil(model: AnomalibModule, plan: PeerPlan, scanned: rows.Rows, chosen: NDArray[np.int64], work: Path) -> None:
    """Distil the teacher of EfficientAD from fit images and synthetic textiles."""
    preparation = Preparation(plan.config.prepare)
    made = sorted(work.rglob("*.png"))

    def load(number: int) -> Tensor:
        if number < len(chosen):
            return torch.from_numpy(scanned.load(int(chosen[number])))
        image = decode(made[number - len(chosen)])
        return torch.from_numpy(preparation.apply(image, Tile(0, 0, *image.shape[:2])))

    generator = torch.Generator().manual_seed(plan.config.seed)
    distil(model.model.teacher, plan, load, len(chosen) + len(made), generator=generator)
