"""Score images: a network computes raw outputs, the operating points turn them into verdicts. No torch.

`Detector` is one class whatever computes the scores: torch while fitting, ONNX Runtime or OpenVINO from a bundle, a
model of anomalib in the benchmark. Read this first. `fitting.fit` makes a detector from good images.
"""

from __future__ import annotations

import importlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from normweave import bundle, history, references, settings
from normweave.by_region import ByRegion, Scored, limits_of
from normweave.config import Config, OutcomeConfig
from normweave.data import alignment, images, layouts, rows, splits, variations
from normweave.data.alignment import Limits
from normweave.data.images import ImageInput, read_ahead
from normweave.data.prepare import Preparations
from normweave.data.regions import cells_inside, filled
from normweave.drift import reference, statistics
from normweave.errors import BundleError, DataError, ImageError
from normweave.network import open_graph
from normweave.network.base import Network
from normweave.outcome import boxes
from normweave.outcome.operating_point import Calibration, groups_needed
from normweave.record import parse_record
from normweave.scoring import HeldOut, ImageScore, OperatingPoints, PreparedImage, TileScores, anomaly_map, drift_record
from normweave.types import DefectBox, ExpertWeight, Outcome, Progress, Sample, Tile

AHEAD = 2  # batches decoded while the network works
WORKERS = 2  # threads that decode
VARIED = 256
"""Images under harmless variations that are scored for the threshold of unseen subclasses, at most."""

Data = str | os.PathLike[str] | Sequence[Sample] | Sequence[str | os.PathLike[str]]
"""A manifest, a folder in a known layout, or samples or paths of images."""


class SampleOutcome(NamedTuple):
    """The outcome of one image of a data set."""

    sample: Sample
    outcome: Outcome
    tiles: tuple[Tile, ...] = ()
    reconstruction: NDArray[np.float32] | None = None  # (n, h, w) of each tile; None: the head does not decode


class Detector:
    """A fitted detector. `fit` or `load` makes one, `score` and `stream` use it, `save` writes it to disk.

    Args:
        network: computes raw outputs from prepared pixels.
        config: every setting.
        subclass_names: what images are routed to; empty without routing.
        subclasses: category and subclass of each name, and of the training data.
        record: what it was trained on, as JSON values.
        operating_points: the thresholds; None: not computed yet, so that no verdict can be given.
        bundle_hash: identifies the bundle on disk.
        refused: images that could not be read while fitting or calibrating.
    """

    def __init__(
        self,
        network: Network,
        *,
        config: Config,
        subclass_names: tuple[str, ...],
        subclasses: Mapping[str, tuple[str, str | None]],
        record: Mapping[str, Any],
        operating_points: OperatingPoints | None = None,
        bundle_hash: str | None = None,
        refused: tuple[rows.Refusal, ...] = (),
    ) -> None:
        self.network = network
        self.config = config
        self.record = dict(record)
        limits = {name: Limits(**each) for name, each in self.record.get(alignment.KEY, {}).items()}
        self.preparation = Preparations(config.prepare, regions=config.regions, limits_of=limits)
        self.subclass_names = subclass_names
        self.subclasses = dict(subclasses)
        self.operating_points = operating_points
        self.bundle_hash = bundle_hash
        self.refused = refused

    @classmethod
    def fit(
        cls,
        data: Data,
        *,
        model: str | None = None,
        subclass_from: str | None = None,
        config: Config | None = None,
        **options: Any,
    ) -> Detector:
        """Fit a detector to good images; `normweave.budget.fit` documents all options. Needs torch."""
        # By name: these modules build on this one, which runs without torch.
        budget = importlib.import_module("normweave.budget")
        detector: Detector = budget.fit(data, model=model, subclass_from=subclass_from, config=config, **options)
        return detector

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, threads: int | None = None, device: str = "auto") -> Detector:
        """Read a bundle, and check the hash of every file and that the graph is self-contained.

        Args:
            threads: number of threads of the network; None: the number of processors.
            device: auto, cpu, cuda[:N] or tensorrt[:N]; openvino or openvino:GPU.

        Raises:
            BundleError: damaged, not a bundle, or of another format version.
            MissingError: the device is not available.
        """
        path = Path(folder)
        record = bundle.read(path)
        parts = parse_record(record, where=path)
        if any(each.align != "none" for each in parts["config"].regions):
            alignment.library()  # before the first image, if it is missing
        prepare = parts["config"].prepare
        network = open_graph(
            bundle.read_file(path, bundle.GRAPH),
            where=f"{path}/{bundle.GRAPH}",
            size=(prepare.height, prepare.width),
            threads=threads,
            device=device,
        )
        network.bundle = path
        network.references = references.read(path)
        return cls(network, bundle_hash=bundle.bundle_hash(path), **parts)

    @property
    def model(self) -> str:
        """The name of the model."""
        return str(self.record["model"])

    @property
    def image_level(self) -> bool:
        """Whether maps have one cell, so that no pixel metrics are computed."""
        return bool(self.record.get("image_level", False))

    @property
    def batch_images(self) -> int:
        """How many images pass through the network together."""
        return self.config.features.batch_images

    @property
    def smoothing(self) -> float:
        """Standard deviation of the smoothing of anomaly maps, as `maps.upsample` takes it."""
        return self.config.smoothing

    @property
    def calibration(self) -> Calibration | None:
        """The scores of the held-out normal images and the thresholds computed from them."""
        return self.operating_points and self.operating_points.calibration

    @property
    def map_threshold(self) -> float | None:
        """The threshold of boxes, in units of the map; None: that of the image score is used."""
        return self.operating_points and self.operating_points.map_threshold

    @property
    def regions(self) -> ByRegion:
        """The regions of the categories, and the rule by which one of them is chosen for an image."""
        categories = {category for category, _ in self.subclasses.values()}
        routed = [self.subclasses.get(name, ("", None))[0] for name in self.subclass_names]
        return ByRegion.of(self.preparation, categories, routed)

    # ---------------------------------------------------------------- scoring

    @overload
    def score(self, images: ImageInput, *, maps: bool = ...) -> Outcome: ...
    @overload
    def score(self, images: list[Any], *, maps: bool = ...) -> list[Outcome]: ...
    def score(self, images: Any, *, maps: bool = True) -> Outcome | list[Outcome]:
        """Score one image or a list of images: paths, bytes, arrays or PIL images.

        A single image that cannot be read raises ImageError; in a list its outcome has `error` set.
        """
        if isinstance(images, list):
            return list(self.stream(images, maps=maps))
        (outcome,) = self.stream([images], maps=maps)
        if outcome.error is not None:
            raise ImageError(outcome.error)
        return outcome

    def stream(
        self, images: Iterable[ImageInput], *, maps: bool = True, batch_images: int | None = None
    ) -> Iterator[Outcome]:
        """Score any number of images, in order.

        Every `batch_images` images pass through the network together, in passes of at most as many tiles, so that the
        batch of an image depends only on its position.

        Args:
            maps: with anomaly maps at the size of each image, and the boxes found in them.
            batch_images: overrides the setting; with 1 no image waits for the next.
        """
        size = batch_images or self.batch_images
        with ThreadPoolExecutor(max_workers=WORKERS) as pool:
            # The images of a list exist already, so that reading ahead delays none of them.
            count = AHEAD * size if size > 1 or isinstance(images, Sequence) else 0
            opened = read_ahead(pool, self.open, images, count)
            while batch := list(islice(opened, size)):
                start = time.perf_counter()
                outcomes = [
                    self.outcome(image, tiles, maps=maps)
                    for image, tiles in zip(batch, self.scores(batch, size=size), strict=True)
                ]
                readable = sum(image.pixels is not None for image in batch)
                each_ms = (time.perf_counter() - start) * 1000 / max(readable, 1)
                for outcome in outcomes:
                    yield outcome if outcome.error is not None else replace(outcome, latency_ms=each_ms)

    def open(self, image: ImageInput) -> PreparedImage:
        """Decode an image and prepare its tiles under each region. This is the first of the three steps of `stream`."""
        path = os.fspath(image) if isinstance(image, str | os.PathLike) else None
        try:
            return self.regions.prepare(path, images.decode(image))
        except ImageError as error:
            return PreparedImage(path, (0, 0), (), None, str(error))

    def scores(self, batch: Sequence[PreparedImage], *, size: int | None = None) -> list[TileScores | None]:
        """Compute the scores of the tiles of each image, in passes of at most `size` tiles; None if unreadable."""
        return self.regions.scores(self.network, batch, self.config, size=size)

    def outcome(self, image: PreparedImage, tiles: TileScores | None, *, maps: bool = True) -> Outcome:
        """Return the outcome of an image from the scores of its tiles.

        Raises:
            BundleError: no operating point has been computed.
            DataError: a score is not finite.
        """
        image, tiles = self.regions.choose(image, tiles)
        if tiles is None:
            return Outcome(image_path=image.path, error=image.error, model=self.model)
        points = self._require_operating_points()
        scored = ImageScore.of(tiles)
        decision = points.calibration.decide(score=scored.score, distance=scored.distance, subclass=scored.subclass)
        height, width = image.size
        full_map, found = None, tuple[DefectBox, ...]()
        if maps:
            limit = points.box_threshold(threshold=decision.threshold, unseen=decision.unseen)
            full_map = anomaly_map(
                tiles.raw.scores,
                image.tiles,
                image.size,
                smoothing=self.smoothing,
                inside=image.inside,
                threshold=limit,
                placement=image.placement,
            )
            if decision.verdict != "normal":
                found = boxes.find(full_map, limit)
                if not found and decision.verdict == "anomalous":  # the image score is not the maximum of the map
                    inside = None if image.inside is None else alignment.to_image(image.inside, image.placement)
                    found = boxes.around_highest(full_map, inside)
                if self.network.references is not None and tiles.raw.nearest is not None:
                    found = self.network.references.mark(
                        found, full_map, tiles.raw.nearest, image.tiles, placement=image.placement
                    )
        cells = cells_inside(image.parts_inside, tiles.raw.scores.shape[1:])
        names = self.subclass_names
        seen = None if image.pixels is None else statistics.of_image(image.pixels)
        experts: tuple[ExpertWeight, ...] = ()
        if scored.weights is not None:
            order = np.lexsort((-scored.weights,))  # stable
            used = [k for k in order if scored.weights[k] > 0]
            if used and max(used) >= len(names):
                raise BundleError(
                    f"The network has a subclass {max(used) + 1}, and bundle.json names {len(names)} (subclass_names). "
                    "Copy the bundle again or retrain."
                )
            experts = tuple(ExpertWeight(names[k], float(scored.weights[k])) for k in used)
        category, subclass = self.product(scored.subclass)
        return Outcome(
            image_path=image.path,
            verdict=decision.verdict,
            pred_score=scored.score,
            p_value=decision.p_value,
            threshold=decision.threshold,
            false_alarm_rate=decision.false_alarm_rate,
            category=category,
            subclass=subclass,
            subclass_distance=scored.distance,
            subclass_p_value=decision.subclass_p_value,
            unseen=decision.unseen,
            experts=experts,
            adapted=scored.adapted,
            boxes=found,
            guarantee=decision.guarantee,
            anomaly_map=full_map,
            **({} if seen is None else seen._asdict()),
            **statistics.of_map(tiles.raw.scores, image.tiles, image.size, inside=cells)._asdict(),
            **({} if image.placement is None else image.placement.as_outcome()),
            height=height,
            width=width,
            model=self.model,
            bundle_hash=self.bundle_hash,
        )

    def product(self, subclass: int | None) -> tuple[str | None, str | None]:
        """Return category and subclass of an image that was routed to this subclass; None: the head does not route."""
        if subclass is not None and self.subclass_names:
            return self.subclasses[self.subclass_names[subclass]]
        categories = {category for category, _ in self.subclasses.values()}
        return (categories.pop() if len(categories) == 1 else None), None

    def stream_samples(
        self,
        samples: Sequence[Sample],
        *,
        maps: bool = True,
        cache: Path | None = None,
        progress: Progress | None = None,
    ) -> Iterator[SampleOutcome]:
        """Score the images of a data set; those that cannot be read come last, with `error` set.

        Args:
            cache: folder of the feature cache, for networks that can use one.

        Raises:
            DataError: an image was used for fitting or calibration.
        """
        scanned = self.scan(samples, cache=cache, progress=progress)
        rows.refuse_used(scanned, self.record, "test")
        everything = np.arange(len(scanned))
        for each in self.score_rows(scanned, everything, cache=cache, progress=progress):
            image, sample = each.image, scanned.samples[each.number]
            outcome = self.outcome(image, each.own, maps=maps)
            yield SampleOutcome(sample, outcome, image.tiles, each.own.raw.reconstruction)
        refused = {refusal.image_path: refusal.reason for refusal in scanned.refused}
        for sample in samples:
            if (reason := refused.get(str(sample.image_path))) is not None:
                yield SampleOutcome(sample, Outcome(image_path=str(sample.image_path), error=reason, model=self.model))

    def stream_embeddings(
        self, samples: Sequence[Sample], *, cache: Path | None = None, progress: Progress | None = None
    ) -> Iterator[tuple[Sample, NDArray[np.float32]]]:
        """Yield each image with its embedding (C,), the mean over its tiles. Embeddings separate the subclasses.

        Yields nothing if the network has no embedding, and skips images that cannot be read.
        """
        if not self.network.embeds:
            return
        scanned = self.scan(samples, cache=cache, progress=progress)
        reader = self.network.reader(scanned, cache=cache, progress=progress)
        for number, sample in enumerate(scanned.samples):
            embedding = reader.embed(reader.read(np.flatnonzero(scanned.owner == number)))
            if embedding is None:
                return
            yield sample, embedding.mean(axis=0)

    def scan(
        self, samples: Sequence[Sample], *, cache: Path | None = None, progress: Progress | None = None
    ) -> rows.Rows:
        """Read every image once; those whose features are in the cache are not decoded again."""
        known = None if cache is None else lambda keys: self.network.stored(cache, keys)
        return self.regions.scan(samples, known=known, progress=progress)

    def score_rows(
        self,
        scanned: rows.Rows,
        chosen: NDArray[np.int64],
        *,
        unseen: bool = False,
        cache: Path | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Scored]:
        """Score the chosen rows, which must hold whole images, each under one region; see `ByRegion`.

        Args:
            unseen: also without the expert of each image's own subclass (leave-one-subclass-out).
        """
        return self.regions.score_rows(
            self.network, scanned, chosen, self.config, unseen=unseen, cache=cache, progress=progress
        )

    # ---------------------------------------------------------------- operating points

    def calibrate(
        self,
        data: Data,
        *,
        false_alarm_rate: float | None = None,
        layout: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Compute the operating points from other normal images, none of which the fit used.

        Raises:
            DataError: an image was used for fitting, or none can be read.
            CheckError: there are too few groups of images for the rate. Then nothing has changed.
        """
        config = self.config
        if false_alarm_rate is not None:
            groups_needed(false_alarm_rate)  # refuses what is no rate
            config = replace(config, outcome=replace(config.outcome, false_alarm_rate=false_alarm_rate))
        # The network routes each image, so that labels and the selection of the training do not matter here.
        everything = replace(config.data, category=(), subclass=(), subclass_from="none")
        samples = samples_of(data, replace(config, data=everything), layout)
        normals = splits.good_images(samples)
        scanned = self.scan(normals, progress=progress)
        rows.refuse_used(scanned, self.record, "calibration")
        if not len(scanned):
            raise DataError(
                f"No normal image to calibrate with among {len(normals)} candidates. "
                "Give a folder or manifest of good images that were not used in training."
            )
        held_out = self.held_out_scores(scanned, np.arange(len(scanned)), progress=progress)
        self.draw_operating_points(held_out, config.outcome)
        self.config = config
        self.record |= {
            "config": settings.as_dict(config),
            "calibration_images": len(scanned.samples),
            "calibration_hashes": sorted(text[: rows.HASH_LETTERS] for text in scanned.hashes),
            "calibrated_on": (fingerprint := rows.fingerprint(scanned.hashes)),
        }
        step = history.step(
            "calibrated", images=len(scanned.samples), parent=self.bundle_hash, data_fingerprint=fingerprint
        )
        self.record[history.KEY] = history.extended(self.record, step)
        self.refused = scanned.refused

    def held_out_scores(
        self,
        scanned: rows.Rows,
        chosen: NDArray[np.int64],
        *,
        most_varied: int = VARIED,
        cache: Path | None = None,
        progress: Progress | None = None,
    ) -> list[HeldOut]:
        """Return the scores of the chosen rows, normal images that the network was not fitted on.

        Args:
            most_varied: largest number of variations that are scored, of all images together.
        """
        groups = splits.independent_groups(scanned.samples, scanned.hashes)
        scored = self.score_rows(scanned, chosen, unseen=self.network.can_exclude, cache=cache, progress=progress)
        counts = Counter(category for category, _ in self.subclasses.values())
        of_each = max(1, most_varied // max(1, len(chosen)))
        result: list[HeldOut] = []
        vary: list[int] = []
        routed: Counter[int | None] = Counter()
        views: list[rows.Rows] = []  # of each image, under its region
        for place, each in enumerate(scored):
            number = each.number
            if counts[scanned.samples[number].category] == 1 and place * of_each < most_varied and self.subclass_names:
                vary.append(place)
            score = ImageScore.of(each.own)
            routed[score.subclass] += 1
            vary_light = routed[score.subclass] <= reference.VARIED_IMAGES
            described = reference.describe(each.rows, number, each.own.raw.scores, vary=vary_light)
            others = each.unseen and ImageScore.of(each.unseen)
            result.append(HeldOut(number, groups[number], score, others, (), described, each.placed))
            views.append(each.rows)
        rendered = (
            (place, filled(tiles, parts), parts)
            for place in vary
            for parts in [views[place].parts_inside(result[place].number)]
            for tiles in variations.some(
                views[place].load_image(result[place].number), first=place * of_each, count=of_each
            )
        )
        varied: dict[int, list[ImageScore]] = {}
        while batch := list(islice(rendered, self.batch_images)):
            scores = TileScores.compute(
                self.network,
                np.concatenate([tiles for _, tiles, _ in batch]),
                self.config,
                parts=[part for _, _, parts in batch for part in parts],
            )
            end = 0
            for place, tiles, _ in batch:
                start, end = end, end + len(tiles)
                varied.setdefault(place, []).append(ImageScore.of(scores.part(start, end)))
        return [each._replace(varied=tuple(varied.get(place, ()))) for place, each in enumerate(result)]

    def draw_operating_points(
        self,
        held_out: Sequence[HeldOut],
        outcome: OutcomeConfig,
        *,
        cross_validated: bool = False,
        attainable: bool = False,
    ) -> None:
        """Compute the operating points from the scores of held-out normal images.

        Args:
            cross_validated, attainable: as in `Calibration`.

        Raises:
            CheckError: there are too few groups for the rate, without `attainable`.
        """
        self.operating_points = OperatingPoints.draw(
            held_out,
            subclass_names=self.subclass_names,
            subclasses=self.subclasses,
            outcome=outcome,
            cross_validated=cross_validated,
            attainable=attainable,
        )
        self.record[reference.KEY] = drift_record(held_out, self.product, cross_validated=cross_validated)
        self.set_limits(limits_of(self.config.regions, held_out))

    def set_limits(self, limits: Mapping[str, Limits]) -> None:
        """Set what images must reach under regions that follow the part, by category; other limits stay."""
        if limits:
            self.preparation = replace(self.preparation, limits_of={**self.preparation.limits_of, **limits})
            self.record[alignment.KEY] = {name: each._asdict() for name, each in self.preparation.limits_of.items()}

    def with_rate(self, false_alarm_rate: float) -> Detector:
        """Return the same network with thresholds for another false-alarm rate, from the same held-out images.

        The threshold of boxes stays, since the map values of those images are not in the bundle.

        Raises:
            CheckError: there are too few groups of held-out images for this rate.
            BundleError: no operating point has been computed.
        """
        points = self._require_operating_points()
        other = copy(self)
        outcome = replace(self.config.outcome, false_alarm_rate=false_alarm_rate)
        other.config = replace(self.config, outcome=outcome)
        other.operating_points = points._replace(calibration=points.calibration.with_rate(false_alarm_rate))
        other.record = self.record | {"config": settings.as_dict(other.config)}
        return other

    def box_threshold(self, outcome: Outcome) -> float:
        """Return the threshold above which the map of an outcome is marked, in units of the map."""
        assert outcome.threshold is not None
        return self._require_operating_points().box_threshold(threshold=outcome.threshold, unseen=outcome.unseen)

    def _require_operating_points(self) -> OperatingPoints:
        if self.operating_points is None:
            raise BundleError(
                "This detector has no operating point. Calibrate it with normal images: normweave calibrate."
            )
        return self.operating_points

    # ---------------------------------------------------------------- subclasses

    def with_regions(self, config: Config) -> Detector:
        """Return the same network with the regions of other settings, of categories that are added or removed."""
        other = copy(self)
        other.config = config
        named = {each.category for each in config.regions}
        limits = {name: each for name, each in self.preparation.limits_of.items() if name in named}
        other.preparation = Preparations(config.prepare, regions=config.regions, limits_of=limits)
        other.record = self.record | {"config": settings.as_dict(config), "preparation": other.preparation.as_dict()}
        other.record.pop(alignment.KEY, None)
        other.set_limits(limits)
        return other

    def with_subclass(self, data: Data, **options: Any) -> Detector:
        """Return a detector that also knows one or more subclasses; see `subclasses.with_subclass`. Needs torch."""
        subclasses = importlib.import_module("normweave.subclasses")
        result: Detector = subclasses.with_subclass(self, data, **options)
        return result

    def without_subclass(self, *, category: str, subclass: str | None, **options: Any) -> Detector:
        """Return a detector without a subclass that was added; see `subclasses`. Needs torch."""
        subclasses = importlib.import_module("normweave.subclasses")
        result: Detector = subclasses.without_subclass(self, category=category, subclass=subclass, **options)
        return result

    # ---------------------------------------------------------------- on disk

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the bundle under a temporary name, then rename it.

        Raises:
            BundleError: the folder exists and `overwrite` is not set.
            CheckError: the exported graph does not give the scores of torch, or the network cannot be exported.
        """
        target = Path(folder)
        bundle.check_target(target, overwrite=overwrite)
        points = self.operating_points
        record = self.record | (dict.fromkeys(bundle.OPERATING_POINTS) if points is None else points.as_dict())
        self.network.write(target, record=record, calibration=self.calibration, overwrite=overwrite)
        self.bundle_hash = bundle.bundle_hash(target)
        return target


def samples_of(data: Data, config: Config, layout: str | None) -> list[Sample]:
    """Return the samples of a manifest, a folder, or a list of samples or paths."""
    if isinstance(data, str | os.PathLike):
        return layouts.read(Path(data), config.data, layout=layout)
    return [item if isinstance(item, Sample) else Sample(image_path=Path(item)) for item in data]
