"""From what a network says of tiles to what is said of an image: the half of the way that needs no torch.

`Detector` and `Runtime` both walk it: they differ only in what computes the network.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave import maps, settings
from normweave.config import Config, OutcomeConfig
from normweave.data import images, layouts, rows
from normweave.data.images import ImageInput
from normweave.data.prepare import Preparation
from normweave.errors import BundleError, DataError, ImageError
from normweave.outcome import boxes, image_score
from normweave.outcome.operating_point import Calibration, draw_threshold, images_needed
from normweave.types import DefectBox, ExpertWeight, Outcome, Progress, Sample, Tile

AHEAD = 2  # batches decoded while the network works
WORKERS = 2  # threads that decode
HASH_LETTERS = 16  # of a SHA-256 in the record: 64 bits tell a factory's images apart


class Scored(NamedTuple):
    """What the network says of n rows, off the device."""

    grids: NDArray[np.float32]  # (n, h, w)
    scores: NDArray[np.float64]  # (n,)
    peaks: NDArray[np.float64]  # (n,) maximum of the smoothed map
    weights: NDArray[np.float32] | None  # (n, K)
    subclass: NDArray[np.int64] | None  # (n,)
    distance: NDArray[np.float64] | None  # (n,)
    adapted: NDArray[np.bool_] | None  # (n,)
    reconstruction: NDArray[np.float32] | None  # (n, h, w)

    @classmethod
    def of(cls, said: Mapping[str, NDArray[Any]], config: Config) -> Scored:
        """From a head's answers by name: fields of `PatchScores` and of `Routing`, those that it gives."""
        grids = np.asarray(said["scores"], dtype=np.float32)
        smooth = maps.upsample(
            grids, config.prepare.height, config.prepare.width, smoothing=config.maps.smoothing
        )
        peaks = image_score.from_maps(smooth).astype(np.float64)
        return cls(
            grids=grids,
            scores=np.asarray(said.get("image_scores", peaks), dtype=np.float64),
            peaks=peaks,
            weights=said.get("weights"),
            subclass=said.get("subclass"),
            distance=said["distance"].astype(np.float64) if "distance" in said else None,
            adapted=said.get("adapted"),
            reconstruction=said.get("reconstruction"),
        )

    def part(self, start: int, stop: int) -> Scored:
        """Rows `start` to before `stop`."""
        fields: Any = (None if field is None else field[start:stop] for field in self)
        return Scored(*fields)


class Opened(NamedTuple):
    """An image ready for the network, or why it is not."""

    name: str | None
    size: tuple[int, int]  # (height, width)
    tiles: tuple[Tile, ...]
    pixels: NDArray[np.uint8] | None  # (n, 3, height, width)
    error: str | None


class Summary(NamedTuple):
    """What the rows of one image say together."""

    score: float
    peak: float
    weights: NDArray[np.float32] | None
    subclass: int | None
    distance: float | None
    adapted: bool


def summarise(scored: Scored) -> Summary:
    """An image is as anomalous as its worst tile, and of the kind that most of its tiles are taken for."""
    if scored.subclass is None or scored.weights is None or scored.distance is None or scored.adapted is None:
        return Summary(float(scored.scores.max()), float(scored.peaks.max()), None, None, None, False)
    return Summary(
        score=float(scored.scores.max()),
        peak=float(scored.peaks.max()),
        weights=scored.weights.mean(axis=0),
        subclass=int(np.bincount(scored.subclass).argmax()),
        distance=float(np.median(scored.distance)),
        adapted=bool(scored.adapted.any()),
    )


# ── from scores to verdicts ──────────────────────────────────────────────────────────────────────────────────────────


class Line(NamedTuple):
    """Where the line lies between normal and not."""

    calibration: Calibration
    map_threshold: float | None  # of boxes; None where the image's own line serves them too


def draw_line(
    summaries: Sequence[Summary],
    strangers: Sequence[Summary] | None,
    *,
    subclass_names: tuple[str, ...],
    kinds: Mapping[str, tuple[str, str | None]],
    outcome: OutcomeConfig,
) -> Line:
    """Draw the operating points from held-out normals.

    Args:
        strangers: the same images, scored as if their subclasses had never been seen; None where a head cannot.
        kinds: the category and subclass behind each of the names.
    """
    categories = tuple(kinds[name][0] for name in subclass_names)

    def calibration(of: Sequence[Summary], strangers: Calibration | None) -> Calibration:
        routed = [summary.subclass for summary in of if summary.subclass is not None]
        distances = [summary.distance for summary in of if summary.distance is not None]
        return Calibration(
            scores=np.array([summary.score for summary in of]),
            distances=np.array(distances) if routed else None,
            subclasses=np.array(routed, dtype=np.int64) if routed else None,
            subclass_names=subclass_names,
            subclass_categories=categories,
            false_alarm_rate=outcome.false_alarm_rate,
            unknown_rate=outcome.unknown_rate,
            unseen=strangers,
        )

    def category(summary: Summary) -> str | None:
        return None if summary.subclass is None else categories[summary.subclass]

    # A stranger that lands in another category is no kin of anything: it is a foreign material there.
    kin = [
        stranger
        for own, stranger in zip(summaries, strangers or (), strict=bool(strangers))
        if category(own) == category(stranger)
    ]
    enough = len(kin) >= images_needed(outcome.false_alarm_rate)
    drawn = calibration(summaries, calibration(kin, None) if enough else None)
    scores = np.array([summary.score for summary in summaries])
    peaks = np.array([summary.peak for summary in summaries])
    # A head with an image score of its own speaks in other units than its map: boxes need a line of theirs.
    own_scores = bool((scores != peaks).any())
    map_threshold = (
        draw_threshold(peaks, false_alarm_rate=outcome.false_alarm_rate).threshold if own_scores else None
    )
    return Line(drawn, map_threshold)


def line_record(line: Line | None) -> dict[str, Any]:
    """Where the line lies, as a bundle's record holds it; `Judge.of` reads it."""
    if line is None:
        return {"calibration": None, "map_threshold": None}
    return {"calibration": line.calibration.as_dict(), "map_threshold": line.map_threshold}


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Everything between the network's scores and the outcome of an image."""

    config: Config
    line: Line | None
    """None: not drawn yet, so that no verdict can be given."""
    kinds: Mapping[str, tuple[str, str | None]]
    """The category and subclass behind each name that the head routes to."""
    subclass_names: tuple[str, ...]
    bundle_hash: str | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any], *, bundle_hash: str, where: Path) -> Judge:
        """What a bundle's record says.

        Raises:
            BundleError: something is missing or of another form.
        """
        try:
            map_threshold = record["map_threshold"]
            judge = cls(
                config=settings.from_dict(record["config"]),
                line=Line(
                    Calibration.from_dict(record["calibration"]),
                    None if map_threshold is None else float(map_threshold),
                ),
                kinds={name: (kind[0], kind[1]) for name, kind in record["kinds"].items()},
                subclass_names=tuple(record["subclass_names"]),
                bundle_hash=bundle_hash,
            )
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise BundleError(
                f"{where}/bundle.json lacks or misplaces {error}. Copy the bundle again or retrain."
            ) from error
        if strange := [name for name in judge.subclass_names if name not in judge.kinds]:
            raise BundleError(
                f"{where}/bundle.json routes to {strange[0]!r:.60}, which is none of its kinds. Copy the bundle "
                "again or retrain."
            )
        return judge

    def with_rate(self, false_alarm_rate: float) -> Judge:
        """The same held-out normals with lines for another rate; boxes keep theirs.

        Raises:
            CheckError: the held-out normals are too few for this rate.
            BundleError: no line has been drawn.
        """
        if self.line is None:
            raise _no_line()
        config = replace(self.config, outcome=replace(self.config.outcome, false_alarm_rate=false_alarm_rate))
        line = self.line._replace(calibration=self.line.calibration.with_rate(false_alarm_rate))
        return replace(self, config=config, line=line)

    def stream(
        self,
        items: Iterable[ImageInput],
        network: Callable[[NDArray[np.uint8]], Scored],
        *,
        maps: bool,
        batch_images: int | None = None,
    ) -> Iterator[Outcome]:
        """Judge images one after the other, in their order, however many there are.

        Every `batch_images` images go through the network together, in passes of at most so many tiles, so that what
        an image's neighbours are follows from its number alone.

        Args:
            network: prepared pixels (n, 3, height, width) to their scores.
            maps: with anomaly maps at the size of each image, and the boxes found in them.
            batch_images: instead of the setting; with 1 no image waits for the next.
        """
        size = batch_images or self.config.features.batch_images
        with ThreadPoolExecutor(max_workers=WORKERS) as pool:
            # Of a list every image is there: to open one before its turn makes none wait.
            count = AHEAD * size if size > 1 or isinstance(items, Sequence) else 0
            opened = _ahead(pool, self.open, items, count)
            while batch := list(islice(opened, size)):
                start = time.perf_counter()
                outcomes = [
                    self.outcome(image, scored, maps=maps)
                    for image, scored in zip(batch, self.scores(batch, network, size=size), strict=True)
                ]
                readable = sum(image.pixels is not None for image in batch)
                each_ms = (time.perf_counter() - start) * 1000 / max(readable, 1)
                for outcome in outcomes:
                    yield outcome if outcome.error is not None else replace(outcome, latency_ms=each_ms)

    def open(self, image: ImageInput) -> Opened:
        """Decode an image and prepare its tiles; one that cannot be read says why."""
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else None
        try:
            pixels = images.decode(image)
        except ImageError as error:
            return Opened(name, (0, 0), (), None, str(error))
        height, width = pixels.shape[:2]
        preparation = Preparation.of(self.config.prepare)
        tiles = preparation.tiles(height, width)
        prepared = np.stack([preparation.apply(pixels, tile) for tile in tiles])
        return Opened(name, (height, width), tiles, prepared, None)

    def scores(
        self, batch: Sequence[Opened], network: Callable[[NDArray[np.uint8]], Scored], *, size: int
    ) -> list[Scored | None]:
        """What the network says of each image of a batch, in passes of at most `size` tiles; None of the unreadable."""
        readable = [opened.pixels for opened in batch if opened.pixels is not None]
        if not readable:
            return [None] * len(batch)
        pixels = np.concatenate(readable)
        scored = in_passes(len(pixels), lambda rows: network(pixels[rows]), size)
        ends = np.cumsum([len(opened.tiles) for opened in batch])
        return [
            None if opened.pixels is None else scored.part(int(end) - len(opened.tiles), int(end))
            for opened, end in zip(batch, ends, strict=True)
        ]

    def outcome(self, image: Opened, scored: Scored | None, *, maps: bool) -> Outcome:
        """The outcome of an image from the scores of its tiles.

        Raises:
            BundleError: no line has been drawn.
            DataError: the network's answer is not finite.
        """
        if scored is None:
            return Outcome(image_path=image.name, error=image.error, model=self.config.head.kind)
        if self.line is None:
            raise _no_line()
        calibration, map_threshold = self.line
        summary = summarise(scored)
        judgement = calibration.decide(
            score=summary.score, distance=summary.distance, subclass=summary.subclass
        )
        height, width = image.size
        whole = None
        if maps:
            whole = anomaly_map(scored.grids, image.tiles, image.size, smoothing=self.config.maps.smoothing)
        found: tuple[DefectBox, ...] = ()
        if whole is not None and judgement.verdict != "normal":
            line = judgement.threshold if map_threshold is None else map_threshold
            found = boxes.find(whole, line)
        category, subclass = None, None
        names = self.subclass_names
        if summary.subclass is not None and names:
            category, subclass = self.kinds[names[summary.subclass]]
        elif len({known for known, _ in self.kinds.values()}) == 1:
            category = next(iter(self.kinds.values()))[0]
        experts: tuple[ExpertWeight, ...] = ()
        if summary.weights is not None:
            order = np.argsort(-summary.weights, kind="stable")
            experts = tuple(
                ExpertWeight(names[k], float(summary.weights[k])) for k in order if summary.weights[k] > 0
            )
        return Outcome(
            image_path=image.name,
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
            anomaly_map=whole,
            height=height,
            width=width,
            model=self.config.head.kind,
            bundle_hash=self.bundle_hash,
        )


def _no_line() -> BundleError:
    return BundleError("This detector has no operating point. Calibrate it with normal images first.")


def in_passes(count: int, score: Callable[[slice], Scored], size: int) -> Scored:
    """Scores of so many rows, at most `size` of them at a time."""
    parts = [score(slice(start, min(start + size, count))) for start in range(0, count, size)]
    if len(parts) == 1:
        return parts[0]
    fields: Any = (None if field[0] is None else np.concatenate(field) for field in zip(*parts, strict=True))
    return Scored(*fields)


def anomaly_map(
    grids: NDArray[np.float32], tiles: Sequence[Tile], size: tuple[int, int], *, smoothing: float
) -> NDArray[np.float32]:
    """The map (height, width) of an image of this size from the grids (n, h, w) of its tiles."""
    parts = [
        maps.upsample(grid[None], tile.height, tile.width, smoothing=smoothing)[0]
        for grid, tile in zip(grids, tiles, strict=True)
    ]
    return parts[0] if len(parts) == 1 else maps.stitch(parts, tiles, *size)


def _ahead(pool: ThreadPoolExecutor, work: Any, items: Iterable[Any], count: int) -> Iterator[Opened]:
    """Results of `work` in order, at most `count` items ahead of the reader."""
    running: deque[Future[Opened]] = deque()
    for item in items:
        running.append(pool.submit(work, item))
        if len(running) > count:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


# ── other normal images, to draw the line anew ───────────────────────────────────────────────────────────────────────


Data = str | os.PathLike[str] | Sequence[Sample] | Sequence[str | os.PathLike[str]]
"""A manifest, a folder in a known layout, or samples or paths of images."""


def samples_of(data: Data, config: Config, layout: str | None) -> list[Sample]:
    """The samples that `data` names."""
    if isinstance(data, str | os.PathLike):
        return layouts.read(Path(data), config.data, layout=layout)
    return [item if isinstance(item, Sample) else Sample(image_path=Path(item)) for item in data]


def calibration_rows(
    data: Data, config: Config, record: Mapping[str, Any], *, layout: str | None, progress: Progress | None
) -> rows.Rows:
    """Normal images to calibrate with, none of which the fit has seen.

    Raises:
        DataError: an image was used for fitting, or none can be read.
    """
    # Where an image belongs is the router's to say: labels and choices of the training do not count here.
    anything = replace(config, data=replace(config.data, category=(), subclass=(), subclass_from="none"))
    normals = [s for s in samples_of(data, anything, layout) if s.label == "normal" and s.split != "test"]
    scanned = rows.scan(normals, Preparation.of(config.prepare), progress=progress)
    refuse_seen(scanned, record, "calibration")
    if not len(scanned):
        raise DataError(
            f"No normal image to calibrate with among {len(normals)} candidates. "
            "Give a folder or manifest of good images that training has not seen."
        )
    return scanned


def calibrated_record(record: Mapping[str, Any], config: Config, scanned: rows.Rows) -> dict[str, Any]:
    """The record of a detector whose line was drawn anew from these images."""
    return dict(record) | {
        "config": settings.as_dict(config),
        "calibration_images": len(scanned.samples),
        "calibration_hashes": sorted(text[:HASH_LETTERS] for text in scanned.hashes),
        "calibrated_on": rows.fingerprint(scanned.hashes),
    }


def refuse_seen(scanned: rows.Rows, record: Mapping[str, Any], purpose: str) -> None:
    """No image of the fit may be used for another purpose; calibration images may not test.

    Raises:
        DataError: one was.
    """
    seen = set(record["fit_hashes"])
    if purpose == "test":
        seen |= set(record["calibration_hashes"])
    for sample, content in zip(scanned.samples, scanned.hashes, strict=True):
        if content[:HASH_LETTERS] in seen:
            raise DataError(
                f"{sample.image_path} was used in training, so it cannot serve for {purpose}: a result on it "
                "would be too good. Give images that training has not seen (same content counts as the same file)."
            )


def summaries(
    scanned: rows.Rows,
    chosen: NDArray[np.int64],
    score: Callable[[NDArray[np.int64]], Scored],
    *,
    size: int,
    progress: Progress | None = None,
) -> Iterator[tuple[Sample, Scored, Summary]]:
    """Score the chosen rows, which hold whole images, an image at a time.

    Args:
        score: some of the chosen rows to their scores.
        size: images scored together.
    """
    owners = scanned.owner[chosen]
    images_at = np.flatnonzero(np.diff(owners, prepend=-1))  # where each image's rows begin
    for first in range(0, len(images_at), size):
        starts = images_at[first : first + size]
        stop = images_at[first + size] if first + size < len(images_at) else len(chosen)
        scored = score(chosen[starts[0] : stop])
        for start, end in zip(starts, [*starts[1:], stop], strict=True):
            own = scored.part(start - starts[0], end - starts[0])
            yield scanned.samples[owners[start]], own, summarise(own)
        if progress is not None:
            progress("scoring", min(first + size, len(images_at)), len(images_at))
