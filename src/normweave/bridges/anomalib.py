"""anomalib and we, both ways: its models as peers in our benchmark (`Peer`), our detectors in its Engine."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from anomalib import LearningType
from anomalib.data import Batch, ImageBatch, InferenceBatch
from anomalib.data.dataclasses import ImageItem
from anomalib.metrics import Evaluator
from anomalib.visualization import Visualizer
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from normweave import maps, scoring, settings
from normweave.bridges.models import build, distil, pre_processor, quiet
from normweave.bridges.peers import PREFIX, PeerPlan
from normweave.config import Config
from normweave.data import rows, splits
from normweave.data.images import ImageInput, decode
from normweave.data.prepare import Preparation
from normweave.detector import CACHE_GIB, Detector
from normweave.errors import BundleError
from normweave.network.export import OPSET, Whole
from normweave.outcome.operating_point import images_needed
from normweave.scoring import HASH_LETTERS, Judge, Line, Opened, Scored
from normweave.types import Outcome, Progress, Sample, Tile

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # anomalib imports what timm and itself call deprecated
    from anomalib.models.components import AnomalibModule, MemoryBankMixin

# ── their models in our benchmark ────────────────────────────────────────────────────────────────────────────────────


class _Images(Dataset[ImageItem]):
    """Rows as anomalib's items: good images, as shares of white."""

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
    """Fit normals as a data module of anomalib's kind, which some of its models ask for more than batches."""

    def __init__(
        self, scanned: rows.Rows, chosen: NDArray[np.int64], *, batch_images: int, seed: int
    ) -> None:
        super().__init__()
        self.images = _Images(scanned, chosen)
        self.train_batch_size = batch_images
        self.seed = seed

    def train_dataloader(self) -> DataLoader[ImageItem]:
        """Every image once, in an order of the seed."""
        return DataLoader(
            self.images,
            batch_size=self.train_batch_size,
            shuffle=True,
            collate_fn=ImageBatch.collate,
            generator=torch.Generator().manual_seed(self.seed),
        )


class Peer:
    """A trained model of anomalib, asked for raw maps and raw scores, with a line drawn as for our own detectors.

    Attributes:
        model: anomalib's.
        record: what it was trained on.
    """

    subclass_names: tuple[str, ...] = ()  # it routes nowhere
    image_level = False

    def __init__(
        self,
        plan: PeerPlan,
        model: AnomalibModule,
        *,
        kinds: dict[str, tuple[str, str | None]],
        record: dict[str, Any],
        device: str,
    ) -> None:
        self.plan = plan
        self.model = model.to(device).eval()
        self.kinds = kinds
        self.record = record
        self.line: Line | None = None
        self._device = device

    @classmethod
    def fit(cls, plan: PeerPlan, samples: Sequence[Sample]) -> Self:
        """Train on fit normals; calibration normals, divided off as `Detector.fit` does it, draw the line.

        Raises:
            MissingError, ConfigError: as `models.build`.
            CheckError: too few held-out images for the false-alarm rate.
        """
        config = plan.config
        complete = splits.complete(samples, seed=config.seed)
        scanned = rows.scan([s for s in complete if s.split != "test"], Preparation.of(config.prepare))
        contents = {
            sample.image_path: content
            for sample, content in zip(scanned.samples, scanned.hashes, strict=True)
        }
        division = splits.divide(
            scanned.samples,
            calibration_share=config.data.calibration_share,
            at_least=images_needed(config.outcome.false_alarm_rate),
            seed=config.seed,
            content=lambda sample: contents[sample.image_path],
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(isolate_rng())
            work = stack.enter_context(tempfile.TemporaryDirectory(prefix="normweave-peer-"))
            torch.manual_seed(config.seed)
            np.random.seed(config.seed)  # noqa: NPY002 - anomalib's coreset draws from it
            model = build(plan, work=Path(work))
            _train(model, plan, scanned, _rows_of(scanned, division.fit), Path(work), device)
        peer = cls(
            plan,
            model,
            kinds={sample.subclass_name: (sample.category, sample.subclass) for sample in scanned.samples},
            record={
                "model": PREFIX + plan.name,
                "fit_images": len(division.fit),
                "calibration_images": len(division.calibration),
                "data_fingerprint": rows.fingerprint(scanned.hashes),
                "fit_hashes": [contents[s.image_path][:HASH_LETTERS] for s in division.fit],
                "calibration_hashes": [contents[s.image_path][:HASH_LETTERS] for s in division.calibration],
            },
            device=device,
        )
        held_out = peer._summaries(scanned, _rows_of(scanned, division.calibration))
        peer.line = scoring.draw_line(
            [summary for _, _, summary in held_out],
            None,
            subclass_names=(),
            kinds=peer.kinds,
            outcome=config.outcome,
        )
        return peer

    def stream(self, images: Iterable[ImageInput], *, maps: bool = True) -> Iterator[Outcome]:
        """As `Detector.stream`."""
        for outcome in self._judge.stream(images, self.raw, maps=maps):
            yield replace(outcome, model=PREFIX + self.plan.name)

    def stream_samples(
        self,
        samples: Sequence[Sample],
        *,
        maps: bool = True,
        cache: Path | None = None,
        cache_gib: float = CACHE_GIB,
        progress: Progress | None = None,
        reconstructions: list[tuple[Tile, NDArray[np.float32]]] | None = None,
    ) -> Iterator[tuple[Sample, Outcome]]:
        """As `Detector.stream_samples`, but that a peer keeps no features and tells no reconstructions.

        Raises:
            DataError: an image was used for fitting or calibration.
        """
        scanned = rows.scan(samples, Preparation.of(self.plan.config.prepare), progress=progress)
        scoring.refuse_seen(scanned, self.record, "test")
        everything = np.arange(len(scanned))
        for position, (sample, scored, _) in enumerate(self._summaries(scanned, everything, progress)):
            tiles = tuple(scanned.tiles[row] for row in np.flatnonzero(scanned.owner == position))
            image = Opened(str(sample.image_path), scanned.sizes[position], tiles, None, None)
            outcome = self._judge.outcome(image, scored, maps=maps)
            yield sample, replace(outcome, model=PREFIX + self.plan.name)
        refused = {refusal.image_path: refusal.reason for refusal in scanned.refused}
        for sample in samples:
            if (reason := refused.get(str(sample.image_path))) is not None:
                yield sample, Outcome(image_path=str(sample.image_path), error=reason)

    @torch.no_grad()
    def raw(self, pixels: NDArray[np.uint8]) -> Scored:
        """Prepared pixels (n, 3, height, width) to what the model itself says of them."""
        shares = torch.from_numpy(pixels).to(self._device).float() / 255  # (n, 3, H, W)
        said = self.model.model(self.model.pre_processor.transform(shares))
        height, width = pixels.shape[2:]
        grids = said.anomaly_map.float().reshape(-1, height, width).cpu().numpy()  # (n, H, W)
        return Scored(
            grids=grids,
            scores=said.pred_score.double().reshape(-1).cpu().numpy(),
            peaks=grids.max(axis=(1, 2)).astype(np.float64),
            weights=None,
            subclass=None,
            distance=None,
            adapted=None,
            reconstruction=None,
        )

    @property
    def _judge(self) -> Judge:
        return Judge(config=self.plan.config, line=self.line, kinds=self.kinds, subclass_names=())

    def _summaries(
        self, scanned: rows.Rows, chosen: NDArray[np.int64], progress: Progress | None = None
    ) -> Iterator[tuple[Sample, Scored, scoring.Summary]]:
        def score(few: NDArray[np.int64]) -> Scored:
            return self.raw(np.stack([scanned.load(int(row)) for row in few]))

        size = self.plan.config.features.batch_images
        return scoring.summaries(scanned, chosen, score, size=size, progress=progress)


def _rows_of(scanned: rows.Rows, samples: Sequence[Sample]) -> NDArray[np.int64]:
    wanted = set(samples)
    return np.flatnonzero([scanned.samples[owner] in wanted for owner in scanned.owner])


def _train(
    model: AnomalibModule,
    plan: PeerPlan,
    scanned: rows.Rows,
    chosen: NDArray[np.int64],
    work: Path,
    device: str,
) -> None:
    """With Lightning's trainer, as anomalib's Engine does it, but that no checkpoint is written."""
    config, values = plan.config, plan.values
    held: NDArray[np.int64] | None = None
    if plan.name == "efficient_ad":
        # Its maps are brought to one scale by images that it is not trained on: fit normals, for the line must be
        # drawn from images that it has not seen at all, and test images are for nothing but the test.
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


def _distil(
    model: AnomalibModule, plan: PeerPlan, scanned: rows.Rows, chosen: NDArray[np.int64], work: Path
) -> None:
    """EfficientAD's teacher from fit normals and made-up textiles."""
    preparation = Preparation.of(plan.config.prepare)
    made = sorted(work.rglob("*.png"))

    def load(number: int) -> Tensor:
        if number < len(chosen):
            return torch.from_numpy(scanned.load(int(chosen[number])))
        image = decode(made[number - len(chosen)])
        return torch.from_numpy(preparation.apply(image, Tile(0, 0, *image.shape[:2])))

    generator = torch.Generator().manual_seed(plan.config.seed)
    distil(model.model.teacher, plan, load, len(chosen) + len(made), generator=generator)


# ── our detectors in their Engine ────────────────────────────────────────────────────────────────────────────────────


class NormweaveModel(MemoryBankMixin, AnomalibModule):  # type: ignore[misc]
    """Any of our detectors as a model of anomalib: `Engine.fit`, `test`, `predict` and `export` take it as their own.

    One epoch goes over the training images to learn their paths; then `Detector.fit` reads the files themselves, holds
    out its calibration normals and draws the line from them. anomalib's validation images are for nothing. What the
    Engine sees is one pass over the whole image, resized by anomalib: on images of the prepared size scores and maps
    are those of `detector.score`; large images are not tiled. `pred_label` says whether the score lies above the line
    of the subclass that the image is routed to; anomalib has no word for `unknown`.

    A checkpoint of the Engine cannot be read back. Keep `model.detector.save("part.bundle")`, and go on from it with
    `NormweaveModel(bundle="part.bundle")`.

    Args:
        config: every setting, or nested mappings of those that differ from the defaults.
        bundle: a saved detector to go on with, instead of fitting one.
        evaluator, visualizer: anomalib's own, or whether to have its defaults.
    """

    detector: Detector | None = None
    """None: not fitted yet."""

    def __init__(
        self,
        config: Config | Mapping[str, Any] | None = None,
        *,
        bundle: str | None = None,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = False,
    ) -> None:
        detector = None if bundle is None else Detector.load(bundle)
        if detector is not None:
            config = detector.config
        elif not isinstance(config, Config):
            config = settings.from_dict(config or {})
        super().__init__(
            pre_processor=pre_processor((config.prepare.height, config.prepare.width)),
            post_processor=False,  # it would draw its threshold from labelled test images
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.config = config
        self.model: nn.Module = nn.Identity()
        self._paths: set[str] = set()
        if detector is not None:
            self._take(detector)

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Learn which images train."""
        del args, kwargs
        self._paths.update(str(path) for path in batch.image_path or ())
        return torch.tensor(0.0, requires_grad=True, device=self.device)  # Lightning wants a loss

    def fit(self) -> None:
        """Fit the detector on the images of the epoch that is over; called by anomalib.

        Raises:
            DataError, CheckError: as `Detector.fit`.
        """
        paths = sorted(self._paths)  # whatever order the epoch had
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
        ):  # Lightning may ask in the midst of a validation
            self._take(Detector.fit(paths, config=self.config, use_cache=False, device=self.device.type))

    def _take(self, detector: Detector) -> None:
        self.detector = detector
        self.model = Judged(detector)
        self._is_fitted = torch.tensor([True], device=self.device)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        """As in a test."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is left for Lightning to optimise."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One epoch, on one device."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    @property
    def learning_type(self) -> LearningType:
        """Good images only."""
        return LearningType.ONE_CLASS

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """As anomalib does it, in the operators that our own export has."""
        arguments = {"opset_version": OPSET} | kwargs
        written: Path = super().to_onnx(export_root, model_file_name, input_size, **arguments)
        return written

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Settings as plain data, which can be read without executing anything."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] = {"config": settings.as_dict(self.config)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse: a checkpoint has neither the line nor what the detector was trained on.

        Raises:
            BundleError: always.
        """
        raise BundleError(
            "A checkpoint of anomalib's Engine does not hold a whole detector. Keep it with "
            "model.detector.save('part.bundle') and go on with NormweaveModel(bundle='part.bundle')."
        )


class Judged(nn.Module):
    """A detector from images to anomalib's answers, in torch all the way.

    map = M_h · scores · M_wᵀ, as in `maps`.
    """

    rows: Tensor
    columns: Tensor
    thresholds: Tensor

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        config = detector.config
        assert isinstance(detector.head, nn.Module)
        assert detector.calibration is not None  # fitted or loaded: it has its line
        self.whole = Whole(extractor=detector.extractor, standard=detector.standard, head=detector.head)
        _, h, w = detector.extractor.shape
        smooth = config.maps.smoothing
        for name, cells, pixels in (("rows", h, config.prepare.height), ("columns", w, config.prepare.width)):
            self.register_buffer(
                name, torch.from_numpy(maps.map_matrix(cells, pixels, smoothing=smooth).copy())
            )
        points = [detector.calibration.point(k) for k in range(len(detector.head.subclass_names))]
        lines = [point.threshold for point in points or [detector.calibration.point()]]
        self.register_buffer("thresholds", torch.tensor(lines))  # (K,), or (1,) without routing
        self.map_threshold = detector.map_threshold

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: what is fitted is fitted."""
        return super().train(False)

    def forward(self, images: Tensor) -> InferenceBatch:
        """(B, 3, height, width) as shares of white."""
        pixels = (images.clamp(0, 1) * 255).round()
        said = self.whole.says(pixels)
        smooth = self.rows @ said["scores"] @ self.columns.T  # (B, H, W)
        score = said["image_scores"] if "image_scores" in said else smooth.amax(dim=(1, 2))  # (B,)
        chosen = said["subclass"] if "subclass" in said else torch.zeros_like(score, dtype=torch.int64)
        line = self.thresholds[chosen]  # (B,)
        of_map = line[:, None, None] if self.map_threshold is None else self.map_threshold
        return InferenceBatch(
            pred_score=score,
            pred_label=score > line,
            anomaly_map=smooth[:, None],
            pred_mask=(smooth > of_map)[:, None],
        )
