"""THE JOINT: images in, outcomes out. Read this first.

Fitting walks the data's way (images, features, head) on the fit normals; the calibration normals, which no fit has
seen, walk on to the score, where the line is drawn. No test image can enter: `fit` drops test rows unopened.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave import __version__, bundle, maps, settings, training
from normweave.config import CNCConfig, Config, OpenClipConfig, OutcomeConfig
from normweave.data import images, layouts, pseudo, rows, splits
from normweave.data.images import ImageInput
from normweave.data.prepare import Preparation
from normweave.errors import BundleError, DataError, ImageError, MissingError
from normweave.features import build as build_features
from normweave.features import cache as feature_cache
from normweave.features import pair as feature_pair
from normweave.features.frozen import FrozenFeatures
from normweave.features.standardise import ChannelStandard, Standardised
from normweave.heads import build as build_head
from normweave.heads.state import load_state, state
from normweave.outcome import boxes, image_score
from normweave.outcome.operating_point import Calibration, draw, needed
from normweave.types import (
    DefectBox,
    FeatureSource,
    FitData,
    HasNotes,
    Head,
    KnowsStrangers,
    LearnsFromDamage,
    Outcome,
    Progress,
    PseudoAnomalies,
    Sample,
    Tile,
)

CACHE_GIB = 20.0
AHEAD = 2  # batches decoded while the network works


OUTSIDE = ("format", "files", "calibration", "map_threshold")  # of bundle.json, not of the record
HASH_LETTERS = 16  # of a SHA-256 in the record: 64 bits tell a factory's images apart


def cache_folder() -> Path:
    """Where features are kept unless the caller says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "normweave" / "features"


class _Scored(NamedTuple):
    """What the network says of n rows, off the device."""

    grids: NDArray[np.float32]  # (n, h, w)
    scores: NDArray[np.float64]  # (n,)
    peaks: NDArray[np.float64]  # (n,) maximum of the smoothed map
    weights: NDArray[np.float32] | None  # (n, K)
    subclass: NDArray[np.int64] | None  # (n,)
    distance: NDArray[np.float64] | None  # (n,)
    adapted: NDArray[np.bool_] | None  # (n,)
    reconstruction: NDArray[np.float32] | None  # (n, h, w)

    def part(self, start: int, stop: int) -> _Scored:
        rows = slice(start, stop)
        return _Scored(
            self.grids[rows],
            self.scores[rows],
            self.peaks[rows],
            None if self.weights is None else self.weights[rows],
            None if self.subclass is None else self.subclass[rows],
            None if self.distance is None else self.distance[rows],
            None if self.adapted is None else self.adapted[rows],
            None if self.reconstruction is None else self.reconstruction[rows],
        )


class _Summary(NamedTuple):
    """What the rows of one image say together."""

    score: float
    peak: float
    weights: NDArray[np.float32] | None
    subclass: int | None
    distance: float | None
    adapted: bool


def _summarise(scored: _Scored) -> _Summary:
    """An image is as anomalous as its worst tile, and of the kind that most of its tiles are taken for."""
    if scored.subclass is None or scored.weights is None or scored.distance is None or scored.adapted is None:
        return _Summary(float(scored.scores.max()), float(scored.peaks.max()), None, None, None, False)
    return _Summary(
        score=float(scored.scores.max()),
        peak=float(scored.peaks.max()),
        weights=scored.weights.mean(axis=0),
        subclass=int(np.bincount(scored.subclass).argmax()),
        distance=float(np.median(scored.distance)),
        adapted=bool(scored.adapted.any()),
    )


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


class _Opened(NamedTuple):
    """An image ready for the network, or why it is not."""

    name: str | None
    size: tuple[int, int]
    tiles: tuple[Tile, ...]
    pixels: NDArray[np.uint8] | None  # (n, 3, height, width)
    error: str | None


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
        self._device = device

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
            model: adapted-moe, cnc, simplenet, patchcore or dfm; overrides the config's head.
            subclass_from: overrides `config.data.subclass_from`.
            cache: folder of the feature cache; the user's cache folder if not given.
            use_cache: without it features are computed anew at every pass over the images.
            work: folder for the checkpoints of an interrupted training, which `resume` goes on from.

        Raises:
            DataError: no usable good images, or too few of them.
            GateError: too few held-out images for the false-alarm rate.
            ConfigError, MissingError: a setting that cannot be, or a backbone that is not there.
        """
        config = _configured(config, model=model, subclass_from=subclass_from)
        device = _device(device)
        samples = splits.complete(_samples(data, config, layout), seed=config.seed)
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
            at_least=needed(config.outcome.false_alarm_rate),
            seed=config.seed,
            content=lambda sample: hashes[sample.image_path],
        )
        source = _source(extractor, scanned, folder=folder, max_gib=cache_gib, progress=progress)

        fit_rows = _rows_of(scanned, division.fit)
        standard = ChannelStandard(channels=source.shape[0])
        standard.fit(_Part(source, fit_rows))
        head = build_head(config.head, shape=source.shape, dims=extractor.dims)
        fit_data = replace(
            _fit_data(scanned, fit_rows, Standardised(_Part(source, fit_rows), standard), config),
            mean=standard.mean,
            deviation=standard.deviation,
            pair=feature_pair(config.features)
            if isinstance(config.head, CNCConfig) and config.head.text != "off"
            else None,
            pseudo=_pseudo(scanned, fit_rows, extractor, standard, head, config, folder, cache_gib, progress),
        )
        if work is not None:  # a checkpoint is worth something for the same features of the same images only
            work = (
                work
                / _fingerprint([extractor.fingerprint, *(scanned.keys[row] for row in fit_rows)])[
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
        detector._draw(scanned, _rows_of(scanned, division.calibration), source, outcome=config.outcome)
        detector.record = _record(detector, scanned, division)
        return detector

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
            GateError: too few images for the rate.
        """
        rate = self.config.outcome.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
        config = replace(self.config, outcome=replace(self.config.outcome, false_alarm_rate=rate))
        # Where an image belongs is the router's to say: labels and choices of the training do not count here.
        anything = replace(config, data=replace(config.data, category=(), subclass=(), subclass_from="none"))
        normals = [s for s in _samples(data, anything, layout) if s.label == "normal" and s.split != "test"]
        scanned = rows.scan(normals, self.preparation, progress=progress)
        self._refuse_seen(scanned, "calibration")
        if not len(scanned):
            raise DataError(
                f"No normal image to calibrate with among {len(normals)} candidates. "
                "Give a folder or manifest of good images that training has not seen."
            )
        source = feature_cache.streamed(self.extractor, scanned.load, len(scanned))
        self._draw(scanned, np.arange(len(scanned)), source, outcome=config.outcome, progress=progress)
        self.config = config
        self.refused = scanned.refused
        self.record = self.record | {
            "config": settings.as_dict(config),
            "calibration_images": len(scanned.samples),
            "calibration_hashes": sorted(text[:HASH_LETTERS] for text in scanned.hashes),
            "calibrated_on": _fingerprint(scanned.hashes),
        }

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
        if isinstance(self.head, KnowsStrangers) and len(self.head.subclass_names) > 1:
            walk = self._summaries(scanned, chosen, source, as_strangers=True, progress=progress)
            # A stranger that lands in another category is no kin of anything: it is a foreign material there.
            kin = [
                stranger
                for own, (_, _, stranger) in zip(summaries, walk, strict=True)
                if self._category_of(own) == self._category_of(stranger)
            ]
            if len(kin) >= needed(outcome.false_alarm_rate):
                strangers = self._calibration(kin, outcome, strangers=None)
        self.calibration = self._calibration(summaries, outcome, strangers=strangers)
        scores = np.array([summary.score for summary in summaries])
        peaks = np.array([summary.peak for summary in summaries])
        # A head with an image score of its own speaks in other units than its map: boxes need a line of theirs.
        own_scores = bool((scores != peaks).any())
        self.map_threshold = (
            draw(peaks, false_alarm_rate=outcome.false_alarm_rate).threshold if own_scores else None
        )

    def _category_of(self, summary: _Summary) -> str | None:
        """The category of the kind that an image was taken for."""
        return None if summary.subclass is None else self.kinds[self.head.subclass_names[summary.subclass]][0]

    def _calibration(
        self, summaries: Sequence[_Summary], outcome: OutcomeConfig, *, strangers: Calibration | None
    ) -> Calibration:
        routed = [summary.subclass for summary in summaries if summary.subclass is not None]
        distances = [summary.distance for summary in summaries if summary.distance is not None]
        return Calibration(
            scores=np.array([summary.score for summary in summaries]),
            distances=np.array(distances) if routed else None,
            subclasses=np.array(routed, dtype=np.int64) if routed else None,
            subclass_names=self.head.subclass_names,
            subclass_categories=tuple(self.kinds[name][0] for name in self.head.subclass_names),
            false_alarm_rate=outcome.false_alarm_rate,
            unknown_rate=outcome.unknown_rate,
            strangers=strangers,
        )

    def _name_kinds(
        self, scanned: rows.Rows, fit_rows: NDArray[np.int64], source: FeatureSource
    ) -> dict[str, tuple[str, str | None]]:
        """The category and subclass behind each name that the head routes to."""
        kinds = {sample.kind: (sample.category, sample.subclass) for sample in scanned.samples}
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
        batch: list[_Opened] = []
        waiting = 0
        with ThreadPoolExecutor(max_workers=2) as pool:
            for opened in _ahead(pool, self._open, images, AHEAD * self.config.features.batch_images):
                batch.append(opened)
                waiting += len(opened.tiles)
                if waiting >= self.config.features.batch_images:
                    yield from self._judge(batch, maps)
                    batch, waiting = [], 0
            yield from self._judge(batch, maps)

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
        self._refuse_seen(scanned, "test")
        source = _source(self.extractor, scanned, folder=cache, max_gib=cache_gib, progress=progress)
        for position, (sample, scored, summary) in enumerate(
            self._summaries(scanned, np.arange(len(scanned)), source, progress=progress)
        ):
            tiles = tuple(scanned.tiles[row] for row in np.flatnonzero(scanned.owner == position))
            if reconstructions is not None and scored.reconstruction is not None:
                reconstructions[:] = zip(tiles, scored.reconstruction, strict=True)
            yield (
                sample,
                self._outcome(str(sample.image_path), scanned.sizes[position], tiles, scored, summary, maps),
            )
        refused = {refusal.image_path: refusal.reason for refusal in scanned.refused}
        for sample in samples:
            if (reason := refused.get(str(sample.image_path))) is not None:
                yield (
                    sample,
                    Outcome(image_path=str(sample.image_path), error=reason, model=self.config.head.kind),
                )

    def _open(self, image: ImageInput) -> _Opened:
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else None
        try:
            pixels = images.decode(image)
        except ImageError as error:
            return _Opened(name, (0, 0), (), None, str(error))
        height, width = pixels.shape[:2]
        tiles = self.preparation.tiles(height, width)
        prepared = np.stack([self.preparation.apply(pixels, tile) for tile in tiles])
        return _Opened(name, (height, width), tiles, prepared, None)

    def _judge(self, batch: Sequence[_Opened], with_maps: bool) -> Iterator[Outcome]:
        start = time.perf_counter()
        readable = [opened.pixels for opened in batch if opened.pixels is not None]
        scored = (
            self._score(self.extractor.extract(torch.from_numpy(np.concatenate(readable))))
            if readable
            else None
        )
        done = 0
        outcomes: list[Outcome] = []
        for opened in batch:
            if opened.error is not None or scored is None:
                outcomes.append(
                    Outcome(image_path=opened.name, error=opened.error, model=self.config.head.kind)
                )
                continue
            own = scored.part(done, done + len(opened.tiles))
            done += len(opened.tiles)
            outcomes.append(
                self._outcome(opened.name, opened.size, opened.tiles, own, _summarise(own), with_maps)
            )
        each_ms = (time.perf_counter() - start) * 1000 / max(len(readable), 1)
        for outcome in outcomes:
            yield outcome if outcome.error is not None else replace(outcome, latency_ms=each_ms)

    @torch.inference_mode()
    def _score(self, features: Tensor, *, as_strangers: bool = False) -> _Scored:
        """(n, D, h, w) raw features to scores."""
        standard = self.standard(features.to(self._device))
        patches = self.head(standard)
        if as_strangers and isinstance(self.head, KnowsStrangers) and patches.routing is not None:
            patches = self.head.as_strangers(standard, patches.routing.subclass)
        grids = patches.scores.float().cpu().numpy()
        prepare = self.config.prepare
        peaks = image_score.from_maps(
            maps.upsample(grids, prepare.height, prepare.width, smoothing=self.config.maps.smoothing)
        ).astype(np.float64)
        scores = peaks if patches.image_scores is None else patches.image_scores.double().cpu().numpy()
        routing = patches.routing
        raw = None if patches.reconstruction is None else patches.reconstruction.float().cpu().numpy()
        if routing is None:
            return _Scored(grids, scores, peaks, None, None, None, None, raw)
        return _Scored(
            grids,
            scores,
            peaks,
            routing.weights.float().cpu().numpy(),
            routing.subclass.cpu().numpy(),
            routing.distance.double().cpu().numpy(),
            routing.adapted.cpu().numpy(),
            raw,
        )

    def _summaries(
        self,
        scanned: rows.Rows,
        chosen: NDArray[np.int64],
        source: FeatureSource,
        *,
        as_strangers: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[tuple[Sample, _Scored, _Summary]]:
        """Score the chosen rows, which hold whole images, an image at a time."""
        size = self.config.features.batch_images
        owners = scanned.owner[chosen]
        images_at = np.flatnonzero(np.diff(owners, prepend=-1))  # where each image's rows begin
        for first in range(0, len(images_at), size):
            starts = images_at[first : first + size]
            stop = images_at[first + size] if first + size < len(images_at) else len(chosen)
            scored = self._score(source.read(chosen[starts[0] : stop]), as_strangers=as_strangers)
            for start, end in zip(starts, [*starts[1:], stop], strict=True):
                own = scored.part(start - starts[0], end - starts[0])
                yield scanned.samples[owners[start]], own, _summarise(own)
            if progress is not None:
                progress("scoring", min(first + size, len(images_at)), len(images_at))

    def _outcome(
        self,
        name: str | None,
        size: tuple[int, int],
        tiles: tuple[Tile, ...],
        scored: _Scored,
        summary: _Summary,
        with_maps: bool,
    ) -> Outcome:
        if self.calibration is None:
            raise BundleError("This detector has no operating point. Calibrate it with normal images first.")
        judgement = self.calibration.judge(
            score=summary.score, distance=summary.distance, subclass=summary.subclass
        )
        height, width = size
        anomaly_map = None
        if with_maps:
            smooth = self.config.maps.smoothing
            parts = [
                maps.upsample(grid[None], tile.height, tile.width, smoothing=smooth)[0]
                for grid, tile in zip(scored.grids, tiles, strict=True)
            ]
            anomaly_map = parts[0] if len(parts) == 1 else maps.stitch(parts, tiles, height, width)
        found: tuple[DefectBox, ...] = ()
        if anomaly_map is not None and judgement.verdict != "normal":
            line = judgement.threshold if self.map_threshold is None else self.map_threshold
            found = boxes.find(anomaly_map, line)
        category, subclass = None, None
        names = self.head.subclass_names
        if summary.subclass is not None and names:
            category, subclass = self.kinds[names[summary.subclass]]
        elif len({known for known, _ in self.kinds.values()}) == 1:
            category = next(iter(self.kinds.values()))[0]
        experts: tuple[tuple[str, float], ...] = ()
        if summary.weights is not None:
            order = np.argsort(-summary.weights, kind="stable")
            experts = tuple((names[k], float(summary.weights[k])) for k in order if summary.weights[k] > 0)
        return Outcome(
            image_path=name,
            verdict=judgement.verdict,
            pred_score=summary.score,
            p_value=judgement.p_value,
            threshold=judgement.threshold,
            false_alarm_rate=judgement.false_alarm_rate,
            category=category,
            subclass=subclass,
            subclass_distance=summary.distance,
            subclass_p_value=judgement.subclass_p_value,
            unseen=judgement.unseen,
            experts=experts,
            adapted=summary.adapted,
            boxes=found,
            anomaly_map=anomaly_map,
            height=height,
            width=width,
            model=self.config.head.kind,
            bundle_hash=self.bundle_hash,
        )

    # ---------------------------------------------------------------- on disk

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the bundle: to a temporary name, then renamed.

        Raises:
            BundleError: the folder exists and `overwrite` is not set.
        """
        target = Path(folder)
        calibration = None if self.calibration is None else self.calibration.as_dict()
        bundle.write(
            target,
            tensors=self._tensors(),
            record=self.record | {"calibration": calibration, "map_threshold": self.map_threshold},
            overwrite=overwrite,
        )
        self.bundle_hash = bundle.bundle_hash(target)
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: str = "auto") -> Self:
        """Read a bundle that `save` wrote; every hash is checked.

        Raises:
            BundleError: damaged, foreign or of a newer format.
        """
        path = Path(folder)
        record = bundle.read(path)
        tensors = {name: torch.from_numpy(array) for name, array in bundle.read_tensors(path).items()}
        try:
            config = settings.from_dict(record["config"])
            shape: tuple[int, int, int] = tuple(record["feature_shape"])
            kinds = {name: (kind[0], kind[1]) for name, kind in record["kinds"].items()}
            names = tuple(record["subclass_names"])
            fingerprint = record["feature_fingerprint"]
            calibration = Calibration.from_dict(record["calibration"])
            map_threshold = record["map_threshold"]
        except (KeyError, TypeError, IndexError) as error:
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
        head.subclass_names = names
        detector = cls(
            config=config,
            extractor=extractor,
            standard=standard,
            head=head,
            calibration=calibration,
            map_threshold=None if map_threshold is None else float(map_threshold),
            kinds=kinds,
            record={key: value for key, value in record.items() if key not in OUTSIDE},
            device=_device(device),
        )
        detector.bundle_hash = bundle.bundle_hash(path)
        return detector

    def _tensors(self) -> dict[str, Tensor]:
        parts = {
            "features.": state(self.extractor),
            "standard.": state(self.standard),
            "head.": state(_module(self.head)),
        }
        return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}

    def _refuse_seen(self, scanned: rows.Rows, purpose: str) -> None:
        """No image of the fit may be used for another purpose; calibration images may not test."""
        seen = set(self.record["fit_hashes"])
        if purpose == "test":
            seen |= set(self.record["calibration_hashes"])
        for sample, content in zip(scanned.samples, scanned.hashes, strict=True):
            if content[:HASH_LETTERS] in seen:
                raise DataError(
                    f"{sample.image_path} was used in training, so it cannot serve for {purpose}: a result on it "
                    "would be too good. Give images that training has not seen (same content counts as the same file)."
                )


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
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise MissingError(
            f"Device {name!r} was asked for, but this machine has no CUDA device. Use --device cpu or auto."
        )
    return name


def _samples(
    data: str | os.PathLike[str] | Sequence[Sample] | Sequence[str | os.PathLike[str]],
    config: Config,
    layout: str | None,
) -> list[Sample]:
    if isinstance(data, str | os.PathLike):
        return layouts.read(Path(data), config.data, layout=layout)
    return [item if isinstance(item, Sample) else Sample(image_path=Path(item)) for item in data]


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


def _fit_data(
    scanned: rows.Rows, chosen: NDArray[np.int64], features: FeatureSource, config: Config
) -> FitData:
    owners = [scanned.samples[owner] for owner in scanned.owner[chosen]]
    labelled = config.data.subclass_from != "auto"
    names = tuple(sorted({sample.kind for sample in owners})) if labelled else ()
    number = {name: index for index, name in enumerate(names)}
    subclasses = np.array([number.get(sample.kind, -1) for sample in owners], dtype=np.int64)
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


def _pseudo(
    scanned: rows.Rows,
    fit_rows: NDArray[np.int64],
    extractor: FrozenFeatures,
    standard: ChannelStandard,
    head: Head,
    config: Config,
    folder: Path | None,
    max_gib: float,
    progress: Progress | None,
) -> PseudoAnomalies | None:
    """The fit normals with damage put into their pictures, as often as the head wants them."""
    if not isinstance(head, LearnsFromDamage) or head.pseudo_variants == 0:
        return None
    n = len(fit_rows)

    def others(row: int) -> tuple[int, np.random.Generator]:
        rng = pseudo.seeded(config.seed, row // n, row % n)
        return int(rng.integers(n)), rng

    def damaged(row: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        other, rng = others(row)
        return pseudo.damage(scanned.load(fit_rows[row % n]), scanned.load(fit_rows[other]), rng=rng)

    def key(row: int) -> str:
        own, other = scanned.keys[fit_rows[row % n]], scanned.keys[fit_rows[others(row)[0]]]
        said = ["pseudo", pseudo.FORMAT, config.seed, row // n, row % n, own, other]
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def load(row: int) -> NDArray[np.uint8]:
        return damaged(row)[0]

    count = n * head.pseudo_variants
    # One byte a cell, asked for again and again, while the picture behind it takes milliseconds to make.
    shares = np.empty((count, *extractor.grid), dtype=np.uint8)
    for row in range(count):
        shares[row] = np.rint(255 * pseudo.coverage(damaged(row)[1], extractor.grid))
        if progress is not None and row % 16 == 0:
            progress("damaging images", row, count)
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
    return PseudoAnomalies(
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
    for lesson in head.lessons(data):
        training.train(lesson, data, folder=work, resume=resume, progress=progress, device=device)
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
        "notes": detector.head.notes() if isinstance(detector.head, HasNotes) else {},
        "feature_shape": list(detector.extractor.shape),
        "feature_fingerprint": detector.extractor.fingerprint,
        "preparation": detector.preparation.as_dict(),
        "seed": detector.config.seed,
        "fit_images": len(fit),
        "calibration_images": len(calibration),
        "refused": [[refusal.image_path, refusal.reason] for refusal in scanned.refused],
        "data_fingerprint": _fingerprint(scanned.hashes),
        "fit_hashes": [text[:HASH_LETTERS] for text in fit],
        "calibration_hashes": [text[:HASH_LETTERS] for text in calibration],
        "software": {"normweave": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "timm", "numpy", "pillow", *_guests(detector.config))},
    }


def _guests(config: Config) -> tuple[str, ...]:
    """Packages that only some features come from."""
    return ("open_clip_torch",) if isinstance(config.features, OpenClipConfig) else ()


def _fingerprint(hashes: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def _own(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load_strictly(module: nn.Module, tensors: dict[str, Tensor], prefix: str, path: Path) -> None:
    try:
        module.load_state_dict(_own(tensors, prefix), strict=True)
    except RuntimeError as error:
        raise BundleError(
            f"{path}: the weights do not fit the model: {error}. Copy the bundle again or retrain."
        ) from error


def _ahead(pool: ThreadPoolExecutor, work: Any, items: Iterable[Any], count: int) -> Iterator[_Opened]:
    """Results of `work` in order, at most `count` items ahead of the reader."""
    running: deque[Future[_Opened]] = deque()
    for item in items:
        running.append(pool.submit(work, item))
        if len(running) > count:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
