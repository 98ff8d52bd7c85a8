"""Any of our detectors as a model of anomalib's Engine."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.visualization import Visualizer
from torch import Tensor, nn

from normweave import fitting, maps, settings
from normweave.bridges.models import pre_processor
from normweave.config import Config
from normweave.detector import Detector
from normweave.errors import BundleError
from normweave.network.export import OPSET
from normweave.network.torch import TorchModule, TorchNetwork

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # anomalib imports deprecated modules of timm and of its own
    from anomalib.models.components import AnomalibModule, MemoryBankMixin


class NormweaveModel(MemoryBankMixin, AnomalibModule):  # type: ignore[misc]
    """Any of our detectors as a model of anomalib, for `Engine.fit`, `test`, `predict` and `export`.

    One epoch collects the paths of the training images. Then `fitting.fit` reads the files themselves, holds out
    calibration images and computes the threshold from them; anomalib's validation images are not used. The Engine
    passes the whole image, resized by anomalib: on images of the prepared size, scores and maps are those of
    `detector.score`; large images are not tiled. `pred_label` is whether the score is above the threshold of the
    subclass that the image is routed to; anomalib has no label for `unknown`.

    A checkpoint of the Engine cannot be read back. Save `model.detector.save("part.bundle")` and load it with
    `NormweaveModel(bundle="part.bundle")`.

    Args:
        config: every setting, or nested mappings of those that differ from the defaults.
        bundle: a saved detector to use instead of fitting one.
        evaluator, visualizer: anomalib's objects, or whether to use its defaults.
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
        detector = None if bundle is None else fitting.load(bundle)
        if detector is not None:
            config = detector.config
        elif not isinstance(config, Config):
            config = settings.from_dict(config or {})
        super().__init__(
            pre_processor=pre_processor((config.prepare.height, config.prepare.width)),
            post_processor=False,  # it would compute its threshold from labelled test images
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.config = config
        self.model: nn.Module = nn.Identity()
        self._paths: set[str] = set()
        if detector is not None:
            self._use(detector)

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Collect the paths of the training images."""
        del args, kwargs
        self._paths.update(str(path) for path in batch.image_path or ())
        return torch.tensor(0.0, requires_grad=True, device=self.device)  # Lightning needs a loss

    def fit(self) -> None:
        """Fit the detector on the images of the epoch; called by anomalib.

        Raises:
            DataError, CheckError: as `fitting.fit`.
        """
        paths = sorted(self._paths)  # independent of the order of the epoch
        with torch.inference_mode(False), torch.enable_grad():  # Lightning may call it during a validation
            self._use(fitting.fit(paths, config=self.config, device=self.device.type))

    def _use(self, detector: Detector) -> None:
        self.detector = detector
        self.model = InferenceModule(detector)
        self._is_fitted = torch.tensor([True], device=self.device)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        """Predict, as in a test."""
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
        """Export as anomalib does, but with the ONNX opset version of our own export."""
        arguments = {"opset_version": OPSET} | kwargs
        written: Path = super().to_onnx(export_root, model_file_name, input_size, **arguments)
        return written

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the settings as plain data, which can be read without executing anything."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] = {"config": settings.as_dict(self.config)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise an error, because a checkpoint has neither the thresholds nor the record of the training.

        Raises:
            BundleError: always.
        """
        raise BundleError(
            "A checkpoint of anomalib's Engine does not hold a complete detector. Save it with "
            "model.detector.save('part.bundle') and load it with NormweaveModel(bundle='part.bundle')."
        )


class InferenceModule(nn.Module):
    """A detector in torch, from images to anomalib's outputs.

    map = M_h · scores · M_wᵀ, as in `maps`.
    """

    rows: Tensor
    columns: Tensor
    thresholds: Tensor

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        config = detector.config
        network = detector.network
        assert isinstance(network, TorchNetwork)
        assert detector.calibration is not None  # computed by the fit
        self.module = TorchModule(extractor=network.extractor, standard=network.standard, head=network.head)
        _, h, w = network.extractor.shape
        smooth = config.smoothing
        for name, cells, pixels in (("rows", h, config.prepare.height), ("columns", w, config.prepare.width)):
            self.register_buffer(name, torch.from_numpy(maps.map_matrix(cells, pixels, smoothing=smooth).copy()))
        points = [detector.calibration.point(k) for k in range(len(detector.subclass_names))]
        thresholds = [point.threshold for point in points or [detector.calibration.point()]]
        self.register_buffer("thresholds", torch.tensor(thresholds))  # (K,), or (1,) without routing
        self.map_threshold = detector.map_threshold

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score (B, 3, height, width) images in 0..1."""
        pixels = (images.clamp(0, 1) * 255).round()
        outputs = self.module.outputs(pixels)
        smooth = self.rows @ outputs["scores"] @ self.columns.T  # (B, H, W)
        score = outputs["image_scores"] if "image_scores" in outputs else smooth.amax(dim=(1, 2))  # (B,)
        subclass = outputs.get("subclass", torch.zeros_like(score, dtype=torch.int64))
        threshold = self.thresholds[subclass]  # (B,)
        map_threshold = threshold[:, None, None] if self.map_threshold is None else self.map_threshold
        return InferenceBatch(
            pred_score=score,
            pred_label=score > threshold,
            anomaly_map=smooth[:, None],
            pred_mask=(smooth > map_threshold)[:, None],
        )
