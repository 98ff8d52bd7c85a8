"""THE JOINT: images in, outcomes out. Read this first.

Fitting walks the data's way (images, features, head) on the fit normals; the calibration normals, which no fit has
seen, walk on to the score, where the line is drawn. No test image can enter: `fit` drops test rows unopened.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave import __version__, bundle, scoring, settings, training
from normweave.config import CNCConfig, Config, OpenClipConfig, OutcomeConfig
from normweave.data import rows, splits, synthetic
from normweave.data.images import ImageInput
from normweave.data.prepare import Preparation
from normweave.errors import BundleError, ConfigError, ImageError, MissingError
from normweave.features import build as build_features
from normweave.features import cache as feature_cache
from normweave.features import pair as feature_pair
from normweave.features.frozen import FrozenFeatures
from normweave.features.standardise import ChannelStandard, Standardised
from normweave.heads import build as build_head
from normweave.heads.base import Head
from normweave.heads.state import load_state, state
from normweave.network import export, quantize
from normweave.network.onnx import OPENVINO, Network
from normweave.outcome.operating_point import Calibration, images_needed
from normweave.scoring import HASH_LETTERS, Judge, Line, Opened, Scored, Summary
from normweave.types import (
    FeatureSource,
    FitData,
    Outcome,
    Progress,
    Sample,
    SyntheticAnomalies,
    Tile,
)

CACHE_GIB = 20.0
GATE_IMAGES = 32
"""Calibration images on which what runs the graph must agree with torch."""
INT8_IMAGES = 64
"""Fit normals on which the ranges of int8 are seen."""


def cache_folder() -> Path:
    """Where features are kept unless the caller says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "normweave" / "features"


@dataclass(frozen=True, eq=False)
class _Part:
    """Some rows of a feature source."""

    source: FeatureSource
    rows: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.source.shape

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return self.source.read(self.rows[np.asarray(rows, dtype=np.int64)])


@dataclass(frozen=True)
class _Pixels:
    """Prepared pixels in the place of features: what an int8 graph takes."""

    images: rows.Rows

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, self.images.preparation.height, self.images.preparation.width)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.stack([self.images.load(int(row)) for row in rows]))


class _Fitted(NamedTuple):
    """Which images a detector was just fitted on."""

    images: rows.Rows
    fit: NDArray[np.int64]  # rows
    calibration: NDArray[np.int64]  # rows


class Detector:
    """A fitted detector: `fit` or `load` makes one, `score` and `stream` use it, `save` keeps it.

    Attributes:
        config: every setting it was made with.
        record: what it was trained on, as JSON holds it.
        refused: images that could not be read while fitting.
    """

    def __init__(
        self,
        *,
        config: Config,
        extractor: FrozenFeatures,
        standard: ChannelStandard,
        head: Head,
        calibration: Calibration | None,
        map_threshold: float | None,
        kinds: dict[str, tuple[str, str | None]],
        record: dict[str, Any],
        device: str = "cpu",
    ) -> None:
        self.config = config
        self.preparation = Preparation.of(config.prepare)
        self.extractor = extractor.to(device)
        self.standard = standard.to(device).eval()
        self.head = head
        _module(head).to(device).eval()
        self.calibration = calibration
        self.map_threshold = map_threshold
        self.kinds = kinds
        self.record = record
        self.refused: tuple[rows.Refusal, ...] = ()
        self.bundle_hash: str | None = None
        self._gate_images: list[NDArray[np.uint8]] = []  # (n, 3, height, width) each
        self._graph: bytes | None = None
        self._origin: Path | None = None  # the bundle this was loaded from
        self._fitted: _Fitted | None = None  # None: loaded
        self._int8: Network | None = None  # scores in the place of torch, once quantized
        self._device = device

    @property
    def image_level(self) -> bool:
        """Its maps say nothing of where."""
        return self.head.image_level

    @property
    def subclass_names(self) -> tuple[str, ...]:
        """What images are routed to; empty without routing."""
        return self.head.subclass_names

    # ---------------------------------------------------------------- fitting

    @classmethod
    def fit(
        cls,
        data: str | os.PathLike[str] | Sequence[Sample] | Sequence[str | os.PathLike[str]],
        *,
        model: str | None = None,
        subclass_from: str | None = None,
        config: Config | None = None,
        layout: str | None = None,
        cache: Path | None = None,
        use_cache: bool = True,
        cache_gib: float = CACHE_GIB,
        work: Path | None = None,
        resume: bool = False,
        device: str = "auto",
        progress: Progress | None = None,
    ) -> Self:
        """Learn from good images.

        Args:
            data: a manifest, a folder in a known layout, or samples or paths of good images.
            model: adapted-moe, cnc, simplenet, patchcore, dfm, msflow, pyramidflow or mean-shift; overrides the head of
                the config.
            subclass_from: overrides `config.data.subclass_from`.
            cache: folder of the feature cache; the user's cache folder if not given.
            use_cache: without it features are computed anew at every pass over the images.
            work: folder for the checkpoints of an interrupted training, which `resume` goes on from.

        Raises:
            DataError: no usable good images, or too few of them.
            CheckError: too few held-out images for the false-alarm rate.
            ConfigError, MissingError: a setting that cannot be, or a backbone that is not there.
        """
        config = _configured(config, model=model, subclass_from=subclass_from)
        device = _device(device)
        samples = splits.complete(scoring.samples_of(data, config, layout), seed=config.seed)
        samples = [sample for sample in samples if sample.split != "test"]

        extractor = build_features(config.features, height=config.prepare.height, width=config.prepare.width)
        extractor.to(device)
        preparation = Preparation.of(config.prepare)
        folder = (cache or cache_folder()) if use_cache else None
        scanned = _scan(samples, preparation, extractor, folder, progress)
        hashes = {
            sample.image_path: content
            for sample, content in zip(scanned.samples, scanned.hashes, strict=True)
        }
        division = splits.divide(
            scanned.samples,
            calibration_share=config.data.calibration_share,
            at_least=images_needed(config.outcome.false_alarm_rate),
            seed=config.seed,
            content=lambda sample: hashes[sample.image_path],
        )
        source = _source(extractor, scanned, folder=folder, max_gib=cache_gib, progress=progress)

        fit_rows = _rows_of(scanned, division.fit)
        standard = ChannelStandard(channels=source.shape[0])
        standard.fit(_Part(source, fit_rows))
        head = build_head(config.head, shape=source.shape, dims=extractor.dims)
        fit_data = _fit_data(scanned, fit_rows, Standardised(_Part(source, fit_rows), standard), config)
        fit_data = replace(
            fit_data,
            mean=standard.mean,
            deviation=standard.deviation,
            pair=feature_pair(config.features)
            if isinstance(config.head, CNCConfig)
            and (config.head.text != "off" or config.head.guide == "text")
            else None,
            synthetic=_synthetic(
                scanned,
                fit_rows,
                extractor,
                standard,
                head,
                holdout=fit_data.holdout,
                seed=config.seed,
                folder=folder,
                max_gib=cache_gib,
                progress=progress,
            ),
        )
        if work is not None:  # a checkpoint is worth something for the same features of the same images only
            work = (
                work
                / rows.fingerprint([extractor.fingerprint, *(scanned.keys[row] for row in fit_rows)])[
                    :HASH_LETTERS
                ]
            )
        _fit_head(head, fit_data, work=work, resume=resume, device=device, progress=progress)

        detector = cls(
            config=config,
            extractor=extractor,
            standard=standard,
            head=head,
            calibration=None,
            map_threshold=None,
            kinds={},
            record={},
            device=device,
        )
        detector.refused = scanned.refused
        detector.kinds = detector._name_kinds(scanned, fit_rows, source)
        calibration_rows = _rows_of(scanned, division.calibration)
        detector._draw(scanned, calibration_rows, source, outcome=config.outcome)
        detector._gate_images = _images(scanned, calibration_rows, at_most=GATE_IMAGES)
        detector.record = _record(detector, scanned, division)
        detector._fitted = _Fitted(scanned, fit_rows, calibration_rows)
        return detector

    def quantize(self, *, progress: Progress | None = None) -> None:
        """Compute the backbone in int8 from now on: a smaller and faster graph, which scores a little differently.

        So the line is drawn anew by its own scores of the same held-out normals. What is usual was seen on fit normals:
        the held-out ones stay unseen.

        Raises:
            ConfigError: the detector was loaded and its images are not at hand, or its backbone has no convolution.
            CheckError: as in `save`.
        """
        if self._fitted is None:
            raise ConfigError(
                "Only a detector that was just fitted can be quantized: it takes the images of the fit. Train it again "
                "with --int8."
            )
        scanned, fit_rows, calibration_rows = self._fitted
        self._graph = quantize.quantize(self._exported(), _images(scanned, fit_rows, at_most=INT8_IMAGES))
        self._int8 = self._network(self._graph)
        self.record = self.record | {"precision": "int8"}
        self._draw(
            scanned, calibration_rows, _Pixels(scanned), outcome=self.config.outcome, progress=progress
        )

    def _network(self, graph: bytes, device: str = "cpu") -> Network:
        size = (self.preparation.height, self.preparation.width)
        return Network(graph, where="The exported graph", size=size, device=device)

    def calibrate(
        self,
        data: str | os.PathLike[str] | Sequence[Sample] | Sequence[str | os.PathLike[str]],
        *,
        false_alarm_rate: float | None = None,
        layout: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Draw the operating points anew from other normal images, none of which the fit has seen.

        Raises:
            DataError: an image was used for fitting, or none can be read.
            CheckError: too few images for the rate.
        """
        rate = self.config.outcome.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
        config = replace(self.config, outcome=replace(self.config.outcome, false_alarm_rate=rate))
        scanned = scoring.calibration_rows(data, config, self.record, layout=layout, progress=progress)
        source = self._source(scanned, folder=None, max_gib=0, progress=progress)
        self._draw(scanned, np.arange(len(scanned)), source, outcome=config.outcome, progress=progress)
        self.config = config
        self.refused = scanned.refused
        self.record = scoring.calibrated_record(self.record, config, scanned)

    def _draw(
        self,
        scanned: rows.Rows,
        chosen: NDArray[np.int64],
        source: FeatureSource,
        *,
        outcome: OutcomeConfig,
        progress: Progress | None = None,
    ) -> None:
        summaries = [summary for _, _, summary in self._summaries(scanned, chosen, source, progress=progress)]
        strangers = None
        if self.head.can_exclude:
            walk = self._summaries(scanned, chosen, source, score_excluding=True, progress=progress)
            strangers = [summary for _, _, summary in walk]
        self.calibration, self.map_threshold = scoring.draw_line(
            summaries,
            strangers,
            subclass_names=self.head.subclass_names,
            kinds=self.kinds,
            outcome=outcome,
        )

    def _name_kinds(
        self, scanned: rows.Rows, fit_rows: NDArray[np.int64], source: FeatureSource
    ) -> dict[str, tuple[str, str | None]]:
        """The category and subclass behind each name that the head routes to."""
        kinds = {sample.subclass_name: (sample.category, sample.subclass) for sample in scanned.samples}
        found = [name for name in self.head.subclass_names if name not in kinds]
        if not found:
            return kinds
        votes: dict[int, Counter[str]] = {}
        for sample, _, summary in self._summaries(scanned, fit_rows, source):
            if summary.subclass is not None:
                votes.setdefault(summary.subclass, Counter())[sample.category] += 1
        for number, name in enumerate(self.head.subclass_names):
            category = votes[number].most_common(1)[0][0] if number in votes else scanned.samples[0].category
            kinds[name] = (category, name)
        return kinds

    # ---------------------------------------------------------------- scoring

    @overload
    def score(self, images: ImageInput, *, maps: bool = ...) -> Outcome: ...
    @overload
    def score(self, images: list[Any], *, maps: bool = ...) -> list[Outcome]: ...
    def score(self, images: Any, *, maps: bool = True) -> Outcome | list[Outcome]:
        """Judge one image, or a list of them: paths, bytes, arrays or PIL images.

        A single image that cannot be read raises; in a list it comes back with `error` set.
        """
        if isinstance(images, list):
            return list(self.stream(images, maps=maps))
        (outcome,) = self.stream([images], maps=maps)
        if outcome.error is not None:
            raise ImageError(outcome.error)
        return outcome

    def stream(self, images: Iterable[ImageInput], *, maps: bool = True) -> Iterator[Outcome]:
        """Judge images one after the other, in their order, however many there are.

        Args:
            maps: with anomaly maps at the size of each image, and the boxes found in them.
        """

        def network(pixels: NDArray[np.uint8]) -> Scored:
            given = torch.from_numpy(pixels)
            return self._score(given if self._int8 is not None else self.extractor.extract(given))

        return self._judge.stream(images, network, maps=maps)

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
        """Judge the images of a data set, by cached features where a cache folder is given.

        Args:
            reconstructions: filled, for each image anew, with its tiles and how far the features of each cell lie from
                what was decoded, (h, w); stays empty where the head does not decode.

        Raises:
            DataError: an image was used for fitting or calibration.
        """
        scanned = _scan(samples, self.preparation, self.extractor, cache, progress)
        scoring.refuse_seen(scanned, self.record, "test")
        source = self._source(scanned, folder=cache, max_gib=cache_gib, progress=progress)
        for position, (sample, scored, _) in enumerate(
            self._summaries(scanned, np.arange(len(scanned)), source, progress=progress)
        ):
            tiles = tuple(scanned.tiles[row] for row in np.flatnonzero(scanned.owner == position))
            if reconstructions is not None and scored.reconstruction is not None:
                reconstructions[:] = zip(tiles, scored.reconstruction, strict=True)
            image = Opened(str(sample.image_path), scanned.sizes[position], tiles, None, None)
            yield sample, self._judge.outcome(image, scored, maps=maps)
        refused = {refusal.image_path: refusal.reason for refusal in scanned.refused}
        for sample in samples:
            if (reason := refused.get(str(sample.image_path))) is not None:
                yield (
                    sample,
                    Outcome(image_path=str(sample.image_path), error=reason, model=self.config.head.kind),
                )

    @torch.inference_mode()
    def stream_embeddings(
        self,
        samples: Sequence[Sample],
        *,
        cache: Path | None = None,
        cache_gib: float = CACHE_GIB,
        progress: Progress | None = None,
    ) -> Iterator[tuple[Sample, NDArray[np.float32]]]:
        """Where images lie in the space in which the head tells kinds apart, (C,); a mean over an image's tiles.

        Nothing comes of a head without such a space, and of images that cannot be read.
        """
        scanned = _scan(samples, self.preparation, self.extractor, cache, progress)
        source = _source(self.extractor, scanned, folder=cache, max_gib=cache_gib, progress=progress)
        for position, sample in enumerate(scanned.samples):
            features = source.read(np.flatnonzero(scanned.owner == position)).to(self._device)
            embedding = self.head.embed(self.standard(features))
            if embedding is None:
                return
            yield sample, embedding.mean(dim=0).cpu().numpy()

    @property
    def _judge(self) -> Judge:
        line = None if self.calibration is None else Line(self.calibration, self.map_threshold)
        return Judge(
            config=self.config,
            line=line,
            kinds=self.kinds,
            subclass_names=self.head.subclass_names,
            bundle_hash=self.bundle_hash,
        )

    def _source(
        self, scanned: rows.Rows, *, folder: Path | None, max_gib: float, progress: Progress | None
    ) -> FeatureSource:
        """What `_score` takes of these images."""
        if self._int8 is not None:
            return _Pixels(scanned)
        return _source(self.extractor, scanned, folder=folder, max_gib=max_gib, progress=progress)

    @torch.inference_mode()
    def _score(self, features: Tensor, *, score_excluding: bool = False) -> Scored:
        """(n, D, h, w) raw features to scores; once quantized, (n, 3, height, width) prepared pixels."""
        if self._int8 is not None:
            pixels = features.numpy()
            said = self._int8(pixels)
            return Scored.of(self._int8(pixels, said["subclass"]) if score_excluding else said, self.config)
        standard = self.standard(features.to(self._device))
        patches = self.head(standard)
        if score_excluding and patches.routing is not None:
            patches = self.head.score_excluding(standard, patches.routing.subclass)
        return Scored.of(
            {name: value.cpu().numpy() for name, value in export.answers(patches).items()}, self.config
        )

    def _summaries(
        self,
        scanned: rows.Rows,
        chosen: NDArray[np.int64],
        source: FeatureSource,
        *,
        score_excluding: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[tuple[Sample, Scored, Summary]]:
        """Score the chosen rows, which hold whole images, an image at a time."""
        return scoring.summaries(
            scanned,
            chosen,
            lambda few: self._score(source.read(few), score_excluding=score_excluding),
            size=self.config.features.batch_images,
            progress=progress,
        )

    # ---------------------------------------------------------------- on disk

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the bundle: to a temporary name, then renamed.

        Raises:
            BundleError: the folder exists and `overwrite` is not set.
            CheckError: ONNX Runtime, or OpenVINO where it is installed, does not give the scores of torch, or the
                network cannot be exported.
        """
        target = Path(folder)
        bundle.check_place(target, overwrite=overwrite)
        graph = self._exported()
        bundle.write(
            target,
            tensors=self._tensors(),
            record=self.record | scoring.line_record(self._judge.line),
            files={bundle.GRAPH: graph},
            overwrite=overwrite,
        )
        self.bundle_hash = bundle.bundle_hash(target)
        return target

    def _exported(self) -> bytes:
        """The graph: that of the bundle this was loaded from, or written anew and compared with torch."""
        if self._origin is not None:
            return bundle.read_file(self._origin, bundle.GRAPH)
        if self._graph is None:
            parts = [self.extractor, self.standard, _module(self.head)]
            try:
                for part in parts:
                    part.to("cpu")
                whole = export.Whole(extractor=self.extractor, standard=self.standard, head=self.head).eval()
                graph = export.to_onnx(whole, height=self.preparation.height, width=self.preparation.width)
                for device in ("cpu", *([OPENVINO] if find_spec("openvino") else [])):
                    network = self._network(graph, device)
                    export.gate(whole, network, self._gate_images, self._judge)
            finally:
                for part in parts:
                    part.to(self._device)
            self._graph = graph
        return self._graph

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: str = "auto") -> Self:
        """Read a bundle that `save` wrote; every hash is checked.

        Raises:
            BundleError: damaged, foreign or of a newer format.
        """
        path = Path(folder)
        record = bundle.read(path)
        tensors = {name: torch.from_numpy(array) for name, array in bundle.read_tensors(path).items()}
        judge = Judge.of(record, bundle_hash=bundle.bundle_hash(path), where=path)
        config = judge.config
        try:
            shape: tuple[int, int, int] = tuple(record["feature_shape"])
            fingerprint = record["feature_fingerprint"]
        except (KeyError, TypeError) as error:
            raise BundleError(
                f"{path}/bundle.json lacks or misplaces {error}. Copy the bundle again or retrain."
            ) from error
        extractor = build_features(
            replace(config.features, weights="random"),
            height=config.prepare.height,
            width=config.prepare.width,
        )
        _load_strictly(extractor, tensors, "features.", path)
        extractor.fingerprint = (
            fingerprint  # of the weights before they were folded; these are the folded ones
        )
        standard = ChannelStandard(channels=shape[0])
        _load_strictly(standard, tensors, "standard.", path)
        head = build_head(config.head, shape=shape, dims=extractor.dims)
        load_state(_module(head), _own(tensors, "head."))
        head.subclass_names = judge.subclass_names
        detector = cls(
            config=config,
            extractor=extractor,
            standard=standard,
            head=head,
            calibration=judge.line and judge.line.calibration,
            map_threshold=judge.line and judge.line.map_threshold,
            kinds=dict(judge.kinds),
            record={key: value for key, value in record.items() if key not in bundle.LINE},
            device=_device(device),
        )
        detector.bundle_hash = judge.bundle_hash
        detector._origin = path
        if record.get("precision") == "int8":
            detector._int8 = detector._network(detector._exported())
        return detector

    def _tensors(self) -> dict[str, Tensor]:
        parts = {
            "features.": state(self.extractor),
            "standard.": state(self.standard),
            "head.": state(_module(self.head)),
        }
        return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def _configured(config: Config | None, *, model: str | None, subclass_from: str | None) -> Config:
    config = config or Config()
    if model is not None:
        config = settings.with_model(config, model)
    if subclass_from is not None:
        config = settings.override(config, [f"data.subclass_from={subclass_from}"])
    return config


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == OPENVINO:
        raise ConfigError(
            f"Device {name!r} runs finished bundles (predict, calibrate), and this needs torch. Use --device auto, "
            "cpu or cuda."
        )
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise MissingError(
            f"Device {name!r} was asked for, but this machine has no CUDA device. Use --device cpu or auto."
        )
    return name


def _scan(
    samples: Sequence[Sample],
    preparation: Preparation,
    extractor: FrozenFeatures,
    cache: Path | None,
    progress: Progress | None,
) -> rows.Rows:
    if cache is None:
        return rows.scan(samples, preparation, progress=progress)
    fingerprint = extractor.fingerprint

    def known(keys: Sequence[str]) -> Sequence[bool]:
        return feature_cache.known(cache, fingerprint, keys)

    return rows.scan(samples, preparation, known=known, progress=progress)


def _source(
    extractor: FrozenFeatures,
    scanned: rows.Rows,
    *,
    folder: Path | None,
    max_gib: float,
    progress: Progress | None,
) -> FeatureSource:
    if folder is None:
        return feature_cache.streamed(extractor, scanned.load, len(scanned))
    return feature_cache.cached(
        extractor, scanned.keys, scanned.load, folder=folder, max_gib=max_gib, progress=progress
    )


def _rows_of(scanned: rows.Rows, samples: Sequence[Sample]) -> NDArray[np.int64]:
    wanted = set(samples)
    chosen = np.array([sample in wanted for sample in scanned.samples], dtype=bool)
    return np.flatnonzero(chosen[scanned.owner])


def _images(scanned: rows.Rows, chosen: NDArray[np.int64], *, at_most: int) -> list[NDArray[np.uint8]]:
    """The tiles of images that stand evenly over the chosen rows, (n, 3, height, width) each."""
    owners = np.unique(scanned.owner[chosen])
    some = owners[np.linspace(0, len(owners) - 1, min(at_most, len(owners))).astype(int)]
    return [
        np.stack([scanned.load(int(row)) for row in np.flatnonzero(scanned.owner == owner)]) for owner in some
    ]


def _fit_data(
    scanned: rows.Rows, chosen: NDArray[np.int64], features: FeatureSource, config: Config
) -> FitData:
    owners = [scanned.samples[owner] for owner in scanned.owner[chosen]]
    labelled = config.data.subclass_from != "auto"
    names = tuple(sorted({sample.subclass_name for sample in owners})) if labelled else ()
    number = {name: index for index, name in enumerate(names)}
    subclasses = np.array([number.get(sample.subclass_name, -1) for sample in owners], dtype=np.int64)
    part_of: dict[str, int] = {}
    groups = np.array(
        [
            part_of.setdefault(
                f"group {sample.group}" if sample.group else f"file {sample.image_path}", len(part_of)
            )
            for sample in owners
        ],
        dtype=np.int64,
    )
    holdout = splits.holdout(groups, subclasses, share=config.data.holdout_share, seed=config.seed)
    return FitData(
        features=features,
        subclasses=subclasses,
        names=names,
        groups=groups,
        holdout=holdout,
        seed=config.seed,
    )


def _synthetic(
    scanned: rows.Rows,
    fit_rows: NDArray[np.int64],
    extractor: FrozenFeatures,
    standard: ChannelStandard,
    head: Head,
    *,
    holdout: NDArray[np.bool_],
    seed: int,
    folder: Path | None,
    max_gib: float,
    progress: Progress | None,
) -> SyntheticAnomalies | None:
    """The fit normals with damage put into their pictures, as often as the head wants them.

    Held-out images are damaged with pieces of held-out images, and the others with pieces of the others.
    """
    if head.synthetic_variants == 0:
        return None
    n = len(fit_rows)
    sides = {side: np.flatnonzero(holdout == side) for side in (False, True)}

    def others(row: int) -> tuple[int, np.random.Generator]:
        rng = synthetic.seeded(seed, row // n, row % n)
        return int(rng.choice(sides[bool(holdout[row % n])])), rng

    def damaged(row: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        other, rng = others(row)
        return synthetic.damage(scanned.load(fit_rows[row % n]), scanned.load(fit_rows[other]), rng=rng)

    def key(row: int) -> str:
        own, other = scanned.keys[fit_rows[row % n]], scanned.keys[fit_rows[others(row)[0]]]
        said = ["pseudo", synthetic.FORMAT, seed, row // n, row % n, own, other]
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def load(row: int) -> NDArray[np.uint8]:
        return damaged(row)[0]

    count = n * head.synthetic_variants
    # One byte a cell, asked for again and again, while the picture behind it takes milliseconds to make.
    shares = np.empty((count, *extractor.grid), dtype=np.uint8)
    for row in range(count):
        shares[row] = np.rint(255 * synthetic.coverage(damaged(row)[1], extractor.grid))
        if progress is not None and (row % 16 == 0 or row == count - 1):
            progress("damaging images", row + 1, count)
    if folder is None:
        source = feature_cache.streamed(extractor, load, count)
    else:
        source = feature_cache.cached(
            extractor,
            [key(row) for row in range(count)],
            load,
            folder=folder,
            max_gib=max_gib,
            progress=progress,
        )
    return SyntheticAnomalies(
        Standardised(source, standard), lambda few: torch.from_numpy(shares[few]).float() / 255
    )


def _fit_head(
    head: Head,
    data: FitData,
    *,
    work: Path | None,
    resume: bool,
    device: str,
    progress: Progress | None,
) -> None:
    head.begin(data)
    for stage in head.stages(data):
        training.train(stage, data, folder=work, resume=resume, progress=progress, device=device)
    _module(head).to("cpu")
    head.finish(data)


def _module(head: Head) -> nn.Module:
    assert isinstance(head, nn.Module)
    return head


def _record(detector: Detector, scanned: rows.Rows, division: splits.Division) -> dict[str, Any]:
    content = dict(zip(scanned.samples, scanned.hashes, strict=True))
    fit = sorted(content[sample] for sample in division.fit)
    calibration = sorted(content[sample] for sample in division.calibration)
    categories: dict[str, list[str]] = {}
    for category, subclass in sorted(detector.kinds.values(), key=str):
        categories.setdefault(category, [])
        if subclass is not None:
            categories[category].append(subclass)
    return {
        "model": detector.config.head.kind,
        "config": settings.as_dict(detector.config),
        "categories": categories,
        "kinds": {name: list(kind) for name, kind in detector.kinds.items()},
        "subclass_names": list(detector.head.subclass_names),
        "notes": detector.head.notes(),
        "feature_shape": list(detector.extractor.shape),
        "feature_fingerprint": detector.extractor.fingerprint,
        "preparation": detector.preparation.as_dict(),
        "precision": "float32",
        "seed": detector.config.seed,
        "fit_images": len(fit),
        "calibration_images": len(calibration),
        "refused": [[refusal.image_path, refusal.reason] for refusal in scanned.refused],
        "data_fingerprint": rows.fingerprint(scanned.hashes),
        "fit_hashes": [text[:HASH_LETTERS] for text in fit],
        "calibration_hashes": [text[:HASH_LETTERS] for text in calibration],
        "software": {"normweave": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "timm", "numpy", "pillow", *_guests(detector.config))},
    }


def _guests(config: Config) -> tuple[str, ...]:
    """Packages that only some features come from."""
    return ("open_clip_torch",) if isinstance(config.features, OpenClipConfig) else ()


def _own(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load_strictly(module: nn.Module, tensors: dict[str, Tensor], prefix: str, path: Path) -> None:
    try:
        module.load_state_dict(_own(tensors, prefix), strict=True)
    except RuntimeError as error:
        raise BundleError(
            f"{path}: the weights do not fit the model: {error}. Copy the bundle again or retrain."
        ) from error
