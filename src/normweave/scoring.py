"""Compute image scores and operating points from the raw outputs of a network. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave import maps
from normweave.config import Config, OutcomeConfig
from normweave.data import alignment, regions
from normweave.data.alignment import Placement
from normweave.data.prepare import Preparation
from normweave.data.regions import Region, TileRegion
from normweave.drift import reference
from normweave.drift.reference import Described
from normweave.outcome import image_score
from normweave.outcome.operating_point import Calibration, OperatingPoint, draw_threshold, groups_needed
from normweave.types import RawOutput, Tile

BELOW = 1e-3
"""The map outside of a region is at least this share below the threshold, so that nothing there is marked."""


class PreparedImage(NamedTuple):
    """An image ready for the network, or the reason why it cannot be read."""

    path: str | None
    size: tuple[int, int]  # (height, width)
    tiles: tuple[Tile, ...]
    pixels: NDArray[np.uint8] | None  # (n, 3, height, width)
    error: str | None
    preparations: tuple[Preparation, ...] = ()  # of each tile; different ones if categories have different regions
    placements: tuple[Placement | None, ...] = ()  # of each tile; None: its region does not follow the part

    def part(self, start: int, stop: int) -> PreparedImage:
        """Return the image with the tiles from `start` to before `stop` alone."""
        return self._replace(
            tiles=self.tiles[start:stop],
            pixels=None if self.pixels is None else self.pixels[start:stop],
            preparations=self.preparations[start:stop],
            placements=self.placements[start:stop],
        )

    @property
    def placement(self) -> Placement | None:
        """Where the image shows the part of the region of the first tile; None: the region does not follow it."""
        return self.placements[0] if self.placements else None

    @property
    def parts_inside(self) -> list[TileRegion | None]:
        """How each tile is scored under its region; None: all of it is inside."""
        return [
            preparation.part_inside(self.size, tile)
            for preparation, tile in zip(self.preparations, self.tiles, strict=True)
        ]

    @property
    def inside(self) -> NDArray[np.bool_] | None:
        """(height, width) whether each pixel lies in the region of the first tile, before it is moved; None: none."""
        region = self.preparations[0].region
        return None if region is None else regions.mask(region, *self.size)


class TileScores(NamedTuple):
    """Scores of n tiles."""

    raw: RawOutput
    scores: NDArray[np.float64]  # (n,) image score of each tile
    peaks: NDArray[np.float64]  # (n,) maximum of the smoothed map

    @classmethod
    def of(cls, raw: RawOutput, config: Config, parts: Sequence[TileRegion | None] | None = None) -> TileScores:
        """Compute the image score of each tile from the raw outputs.

        Args:
            parts: how each tile is scored under its region. Cells outside take the score of the nearest cell inside,
                and the peak is that of the map inside. None: all tiles are inside.
        """
        under = {number: part for number, part in enumerate(parts or ()) if part is not None}
        if under:
            raw = raw._replace(scores=raw.scores.copy())
            for number, part in under.items():
                raw.scores[number] = part.fill_cells(raw.scores[number])
        smooth = maps.upsample(raw.scores, config.prepare.height, config.prepare.width, smoothing=config.smoothing)
        for number, part in under.items():
            smooth[number, ~part.scored] = -np.inf
        peaks = image_score.from_maps(smooth).astype(np.float64)
        scores = peaks if raw.image_scores is None else raw.image_scores.astype(np.float64)
        return cls(raw, scores, peaks)

    @classmethod
    def compute(
        cls,
        network: Callable[[NDArray[np.uint8], NDArray[np.int64] | None], RawOutput],
        pixels: NDArray[np.uint8],
        config: Config,
        *,
        excluded: NDArray[np.int64] | None = None,
        size: int | None = None,
        parts: Sequence[TileRegion | None] | None = None,
    ) -> TileScores:
        """Score (n, 3, height, width) prepared pixels in passes of at most `size` tiles.

        Args:
            parts: as of `of`.
            excluded: (n,) the subclass of each tile whose expert is left out.
            size: default: `batch_images` of the features.
        """
        size = size or config.features.batch_images
        passes = [slice(start, start + size) for start in range(0, len(pixels), size)]
        return cls.concatenate(
            [
                cls.of(
                    network(pixels[some], None if excluded is None else excluded[some]),
                    config,
                    None if parts is None else parts[some],
                )
                for some in passes
            ]
        )

    @classmethod
    def concatenate(cls, parts: Sequence[TileScores]) -> TileScores:
        """Join the scores of several batches."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            RawOutput.concatenate([part.raw for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.peaks for part in parts]),
        )

    def part(self, start: int, stop: int) -> TileScores:
        """Return the tiles from `start` to before `stop`."""
        return self.take(slice(start, stop))

    def take(self, tiles: slice | NDArray[np.int64]) -> TileScores:
        """Return some tiles."""
        return TileScores(self.raw.take(tiles), self.scores[tiles], self.peaks[tiles])


class ImageScore(NamedTuple):
    """The scores of the tiles of one image, combined."""

    score: float
    peak: float
    weights: NDArray[np.float32] | None  # (K,)
    subclass: int | None
    distance: float | None
    adapted: bool

    @classmethod
    def of(cls, tiles: TileScores) -> ImageScore:
        """Take the largest score, the most frequent subclass and the median distance of the tiles."""
        raw, score, peak = tiles.raw, float(tiles.scores.max()), float(tiles.peaks.max())
        if raw.subclass is None or raw.weights is None or raw.distance is None or raw.adapted is None:
            return cls(score, peak, None, None, None, False)
        return cls(
            score=score,
            peak=peak,
            weights=raw.weights.mean(axis=0),
            subclass=int(np.bincount(raw.subclass).argmax()),
            distance=float(np.median(raw.distance.astype(np.float64))),
            adapted=bool(raw.adapted.any()),
        )


class HeldOut(NamedTuple):
    """The scores of a held-out normal image."""

    number: int  # of the image in `Rows.samples`
    group: int  # equal for images that are not independent
    own: ImageScore
    unseen: ImageScore | None  # without the expert of its own subclass; None: the network cannot leave one out
    varied: tuple[ImageScore, ...] = ()  # of the image under harmless variations
    described: Described | None = None  # its statistics, for `normweave drift`
    placed: tuple[Region, Placement] | None = None  # region that follows the part, and where that is


def drift_record(
    held_out: Sequence[HeldOut], product: Callable[[int | None], reference.Product], *, cross_validated: bool
) -> dict[str, Any]:
    """Return the statistics of held-out images as the record of a bundle holds them, for `normweave drift`.

    Args:
        product: category and subclass of an image that was routed to this subclass.
    """
    images = (
        reference.CalibrationImage(
            product(each.own.subclass), each.group, each.own.score, each.own.distance, each.described
        )
        for each in held_out
    )
    return reference.record(images, cross_validated=cross_validated)


def anomaly_map(
    grids: NDArray[np.float32],
    tiles: Sequence[Tile],
    size: tuple[int, int],
    *,
    smoothing: float,
    inside: NDArray[np.bool_] | None = None,
    threshold: float = 0.0,
    placement: Placement | None = None,
) -> NDArray[np.float32]:
    """Return the map (height, width) of an image of this size from the patch scores (n, h, w) of its tiles.

    Args:
        inside: (height, width) pixels in the region; the others get a value below `threshold` and below all inside.
            None: all.
        placement: where the image shows the part that the region follows; tiles and `inside` are those of the
            reference, and the map is that of the image.
    """
    parts = (  # one at a time, since together they are larger than the map
        maps.upsample(grid[None], tile.height, tile.width, smoothing=smoothing)[0]
        for grid, tile in zip(grids, tiles, strict=True)
    )
    whole = len(tiles) == 1 and tiles[0] == Tile(0, 0, *size)
    result = next(parts) if whole else maps.stitch(parts, tiles, *size, complete=inside is None)
    if inside is None or (placement is None and inside.all()):
        return result
    lowest = float(result[inside].min(initial=np.inf))
    outside = min(lowest, threshold - BELOW * max(1.0, abs(threshold)))
    result[~inside] = outside
    if placement is not None:
        result = alignment.to_image(result, placement)
        result[~alignment.to_image(inside, placement)] = outside
    return result


FEWEST_UNSEEN = 5
"""Groups from which a threshold for unseen subclasses is computed, though the rate needs more; with fewer, an image
beyond the known subclasses is `unknown`."""


class OperatingPoints(NamedTuple):
    """The thresholds of a detector, computed from held-out normal images."""

    calibration: Calibration
    map_threshold: float | None  # of boxes; None: the threshold of the image score is used
    unseen_map_threshold: float | None = None  # of boxes in images of unseen subclasses; None: as for the others

    def box_threshold(self, *, threshold: float, unseen: bool) -> float:
        """Return the threshold of boxes, in units of the map.

        Args:
            threshold: of the image score.
            unseen: whether the image was compared with scores of unseen subclasses.
        """
        if self.map_threshold is None:
            return threshold
        if unseen and self.unseen_map_threshold is not None:
            return self.unseen_map_threshold
        return self.map_threshold

    @classmethod
    def draw(
        cls,
        held_out: Sequence[HeldOut],
        *,
        subclass_names: tuple[str, ...],
        subclasses: Mapping[str, tuple[str, str | None]],
        outcome: OutcomeConfig,
        cross_validated: bool = False,
        attainable: bool = False,
    ) -> OperatingPoints:
        """Compute the thresholds for a false-alarm rate.

        Args:
            subclasses: category and subclass of each of the names.
            cross_validated, attainable: as in `Calibration`.

        Raises:
            CheckError: there are too few groups for the rate, without `attainable`.
        """
        categories = tuple(subclasses[name][0] for name in subclass_names)

        def calibration(
            of: Sequence[tuple[int, ImageScore]], unseen: Calibration | None, *, attainable: bool = False
        ) -> Calibration:
            routed = [each.subclass for _, each in of if each.subclass is not None]
            distances = [each.distance for _, each in of if each.distance is not None]
            return Calibration(
                scores=np.array([each.score for _, each in of]),
                distances=np.array(distances) if routed else None,
                subclasses=np.array(routed, dtype=np.int64) if routed else None,
                subclass_names=subclass_names,
                subclass_categories=categories,
                groups=[group for group, _ in of],
                cross_validated=cross_validated,
                attainable=attainable,
                false_alarm_rate=outcome.false_alarm_rate,
                unknown_rate=outcome.unknown_rate,
                unseen=unseen,
            )

        def category(image: ImageScore) -> str | None:
            return None if image.subclass is None else categories[image.subclass]

        # Without its own expert, an image that is routed to another category is a foreign material there. A category
        # of one subclass has no such scores; there, harmless variations of its images stand for unseen subclasses.
        single = {name for name, count in Counter(categories).items() if count == 1}
        same_category = [
            (each.group, score)
            for each in held_out
            for score in (each.varied if category(each.own) in single else (each.unseen,))
            if score is not None and category(each.own) == category(score)
        ]
        needed = groups_needed(outcome.false_alarm_rate)
        needed = min(FEWEST_UNSEEN, needed) if attainable else needed
        enough = len({group for group, _ in same_category}) >= needed
        drawn = calibration(
            [(each.group, each.own) for each in held_out],
            calibration(same_category, None, attainable=attainable) if enough else None,
            attainable=attainable,
        )
        # If the head has an image score of its own, its units differ from the map's: boxes need another threshold.
        if all(each.own.score == each.own.peak for each in held_out):
            return cls(drawn, None)

        def boxes(of: Sequence[tuple[int, ImageScore]], point: OperatingPoint) -> float:
            peaks, groups = [each.peak for _, each in of], [group for group, _ in of]
            return draw_threshold(peaks, false_alarm_rate=point.false_alarm_rate, groups=groups).threshold

        return cls(
            drawn,
            boxes([(each.group, each.own) for each in held_out], drawn.point()),
            None if drawn.unseen is None else boxes(same_category, drawn.unseen.point()),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return both as the record of a bundle holds them."""
        return {
            "calibration": self.calibration.as_dict(),
            "map_threshold": self.map_threshold,
            "unseen_map_threshold": self.unseen_map_threshold,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> OperatingPoints:
        """Read what `as_dict` returned; a missing key or a wrong type raises KeyError, TypeError or ValueError."""
        calibration = Calibration.from_dict(record["calibration"])
        thresholds = [record["map_threshold"], record.get("unseen_map_threshold")]
        return cls(calibration, *(None if each is None else float(each) for each in thresholds))
