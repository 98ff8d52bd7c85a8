"""Score images under the region of interest of their own category, which is known only after the routing. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave.config import Config, RegionConfig
from normweave.config.regions import EVERY
from normweave.data import alignment, regions, rows
from normweave.data.alignment import Limits, Placement
from normweave.data.prepare import Preparation, Preparations
from normweave.data.regions import Region
from normweave.data.rows import Rows
from normweave.errors import ConfigError, ImageError
from normweave.scoring import HeldOut, ImageScore, PreparedImage, TileScores
from normweave.types import Outcome, Progress, Sample, Tile

if TYPE_CHECKING:
    from normweave.network.base import Network


class Scored(NamedTuple):
    """The scores of an image of a data set under its region."""

    number: int  # of the image in `Rows.samples`
    rows: Rows  # under its region
    own: TileScores
    unseen: TileScores | None  # without the expert of its own subclass; None: not asked for

    @property
    def image(self) -> PreparedImage:
        """The image without its pixels."""
        sample, tiles = self.rows.samples[self.number], self.rows.tiles_of(self.number)
        preparations = (self.rows.preparation.of(sample.category),) * len(tiles)
        placements = (self.rows.placements[self.number],) * len(tiles)
        size = self.rows.sizes[self.number]
        return PreparedImage(str(sample.image_path), size, tiles, None, None, preparations, placements)

    @property
    def placed(self) -> tuple[Region, Placement] | None:
        """The region and where its part is; None: the region does not follow the part."""
        placement = self.rows.placements[self.number]
        region = self.rows.preparation.of(self.rows.samples[self.number].category).region
        return None if placement is None or region is None else (region, placement)


def check_routing(scanned: Rows, *, routes: bool) -> None:
    """Check that images of categories with different regions are routed to a category.

    Raises:
        ConfigError: they are not.
    """
    categories = sorted({sample.category for sample in scanned.samples})
    if not routes and len({scanned.preparation.of(each) for each in categories}) > 1:
        raise ConfigError(
            f"The categories {', '.join(categories)} have different regions, and this model does not route images to a "
            f"category, so that it cannot know the region of a new image. Give one region for all ({EVERY!r}), train a "
            "model for each category, or train the default model."
        )


class ByRegion(NamedTuple):
    """The regions of the categories of a detector.

    An image is scored under each of them: one pass for each distinct region, so that one region for all categories
    costs nothing more. Its result is that of the region under which the image is routed to a category that has it, with
    the smallest distance; if there is none, that with the smallest distance.
    """

    owned: Mapping[Preparation, Collection[str]]
    """The categories that have each region."""
    routed: Sequence[str]
    """The category of each subclass that images are routed to."""

    @classmethod
    def of(cls, preparation: Preparations, categories: Collection[str], routed: Sequence[str]) -> ByRegion:
        """Return the regions of these categories."""
        owned: dict[Preparation, set[str]] = {}
        for category in sorted(categories) or [""]:
            owned.setdefault(preparation.of(category), set()).add(category)
        return cls(owned, routed)

    @property
    def first(self) -> Preparation:
        """The preparation under one of the regions: the only one, for most detectors."""
        return next(iter(self.owned))

    def prepare(self, path: str | None, pixels: NDArray[np.uint8]) -> PreparedImage:
        """Return an image (H, W, 3) with its tiles under each region; regions whose part it does not show are left out.

        Raises:
            ImageError: it shows the part of no region, or cannot be cut into tiles.
        """
        height, width = pixels.shape[:2]
        cut: list[tuple[Preparation, Placement | None, Tile]] = []
        prepared: list[NDArray[np.uint8]] = []
        reasons = []
        for each in self.owned:
            tiles = each.checked_tiles(height, width)
            try:
                placement = each.place(pixels)
            except ImageError as error:
                reasons.append(str(error))
                continue
            moved = alignment.to_reference(pixels, placement)
            cut += [(each, placement, tile) for tile in tiles]
            prepared += [each.apply(moved, tile) for tile in tiles]
        if not cut:
            raise ImageError(" ".join(dict.fromkeys(reasons)))
        preparations, placements, of = zip(*cut, strict=True)
        return PreparedImage(path, (height, width), of, np.stack(prepared), None, preparations, placements)

    def scan(
        self,
        samples: Sequence[Sample],
        *,
        known: Callable[[Sequence[str]], Sequence[bool]] | None = None,
        progress: Progress | None = None,
    ) -> Rows:
        """Read every image once; one that shows the part of no region is refused.

        Args:
            known: as of `rows.scan`.
        """
        first = self.first
        if len(self.owned) == 1 or not any(each.follows for each in self.owned):
            return rows.scan(samples, first, known=known, progress=progress)
        scanned = rows.scan(samples, Preparation(first.config), progress=progress)
        unfit = [scanned.under(each).unfit for each in self.owned]
        nowhere = {number: reason for number, reason in unfit[0].items() if all(number in each for each in unfit)}
        return scanned.without(nowhere)

    def scores(
        self, network: Network, batch: Sequence[PreparedImage], config: Config, *, size: int | None = None
    ) -> list[TileScores | None]:
        """Compute the scores of the tiles of each image, in passes of at most `size` tiles; None if unreadable.

        Each region has passes of its own, so that the last bits of a score do not depend on the other regions.
        """
        readable = [image for image in batch if image.pixels is not None]
        if not readable:
            return [None] * len(batch)
        pixels = np.concatenate([image.pixels for image in readable if image.pixels is not None])
        parts = [part for image in readable for part in image.parts_inside]
        under = [preparation for image in readable for preparation in image.preparations]
        own = [[number for number, each in enumerate(under) if each == region] for region in self.owned]
        scored = TileScores.concatenate(
            [
                TileScores.compute(network, pixels[some], config, size=size, parts=[parts[number] for number in some])
                for some in own
                if some
            ]
        )
        if len(self.owned) > 1:
            scored = scored.take(np.argsort([number for some in own for number in some]))
        ends = np.cumsum([0 if image.pixels is None else len(image.tiles) for image in batch])
        return [
            None if image.pixels is None else scored.part(int(end) - len(image.tiles), int(end))
            for image, end in zip(batch, ends, strict=True)
        ]

    def choose(self, image: PreparedImage, tiles: TileScores | None) -> tuple[PreparedImage, TileScores | None]:
        """Return an image and its scores under one region, of an image that was scored under several.

        Args:
            tiles: None: the image could not be read; it is returned as it is.
        """
        if tiles is None or len(self.owned) == 1:
            return image, tiles
        ranks: list[tuple[bool, float, int, int]] = []
        start = 0
        for preparation, run in groupby(image.preparations):
            stop = start + len(list(run))
            score = ImageScore.of(tiles.part(start, stop))
            assert score.subclass is not None  # a head without routing has one region for all categories
            assert score.distance is not None
            ranks.append((self.routed[score.subclass] not in self.owned[preparation], score.distance, start, stop))
            start = stop
        _, _, start, stop = min(ranks)
        return image.part(start, stop), tiles.part(start, stop)

    def inside(self, outcome: Outcome) -> NDArray[np.bool_] | None:
        """Return whether each pixel of an inspected image lies in the region of its category; None: no region."""
        own = [each for each, categories in self.owned.items() if outcome.category in categories]
        region = (own[0] if own else self.first).region
        assert outcome.height is not None
        assert outcome.width is not None
        if region is None:
            return None
        inside = regions.mask(region, outcome.height, outcome.width)
        return np.asarray(alignment.to_image(inside, placement_of(outcome)))

    def score_rows(
        self,
        network: Network,
        scanned: Rows,
        chosen: NDArray[np.int64],
        config: Config,
        *,
        unseen: bool,
        cache: Path | None,
        progress: Progress | None,
    ) -> Iterator[Scored]:
        """Score the chosen rows, which must hold whole images, each image under the region that `choose` returns.

        Args:
            unseen: also without the expert of each image's own subclass (leave-one-subclass-out).
        """
        prepared = {scanned.preparation.of(name) for name in {sample.category for sample in scanned.samples}}
        views = [(scanned, chosen)]
        if prepared != set(self.owned) or len(prepared) > 1:
            images = np.unique(scanned.owner[chosen])
            under = [scanned.under(each) for each in self.owned]
            views = [(each, np.flatnonzero(np.isin(each.owner, images))) for each in under]
        scores = (
            _score_rows(network, rows, some, config, unseen=unseen, cache=cache, progress=progress)
            for rows, some in views
        )
        for each in zip(*scores, strict=True):
            yield each[0] if len(each) == 1 else self._chosen(each)

    def _chosen(self, scores: Sequence[Scored]) -> Scored:
        shown = [each for each in scores if each.number not in each.rows.unfit]
        images = [each.image for each in shown]
        joined = images[0]._replace(
            tiles=tuple(chain.from_iterable(each.tiles for each in images)),
            preparations=tuple(chain.from_iterable(each.preparations for each in images)),
        )
        image, _ = self.choose(joined, TileScores.concatenate([each.own for each in shown]))
        return next(each for each in shown if each.rows.preparation == image.preparations[0])


def placement_of(outcome: Outcome) -> Placement | None:
    """Return where an inspected image shows the part that its region follows; None: the region does not follow it."""
    if outcome.shift_x is None or outcome.shift_y is None or outcome.rotation is None:
        return None
    return Placement(outcome.shift_x, outcome.shift_y, outcome.rotation, outcome.correlation or 0.0, 1.0)


def extended(config: Config, given: Sequence[RegionConfig], category: str, known: Collection[str]) -> Config:
    """Return the settings with the region of a category that is added; regions of known categories cannot change.

    Args:
        given: regions of any categories; empty: the settings stay as they are.
        known: the categories of the detector.

    Raises:
        ConfigError: a region of a known category, or of all, differs from the stored one, or a region cannot be used.
    """
    regions.check(given, categories={*known, category})
    new: tuple[RegionConfig, ...] = ()
    for each in given:
        own = regions.of(config.regions, None if each.category == EVERY else each.category)
        if each.category == category and category not in known:
            new = (each,)
        elif own != Region.of(each):
            name = "all categories" if each.category == EVERY else repr(each.category)
            raise ConfigError(
                f"The region of {name} differs from that of the detector{'' if own else ', which has none'}: its "
                f"scores and thresholds are those of its own region. Leave it out of the regions of {category!r}, or "
                "train again with it."
            )
    return replace(config, regions=(*config.regions, *new))


def limits_of(listed: Sequence[RegionConfig], held_out: Sequence[HeldOut]) -> dict[str, Limits]:
    """Return what images must reach, by the category of each region that follows the part; see `Limits`.

    Args:
        held_out: normal images. A region without any gets no limits.
    """
    found: dict[Region, list[Placement]] = {}
    for each in held_out:
        if each.placed is not None:
            found.setdefault(each.placed[0], []).append(each.placed[1])
    return {each.category: Limits.of(found[region]) for each in listed if (region := Region.of(each)) in found}


def _score_rows(
    network: Network,
    scanned: Rows,
    chosen: NDArray[np.int64],
    config: Config,
    *,
    unseen: bool,
    cache: Path | None,
    progress: Progress | None,
) -> Iterator[Scored]:
    """Score the chosen rows under the region that they are prepared under."""
    reader = network.reader(scanned, cache=cache, progress=progress)
    size = config.features.batch_images
    owners = scanned.owner[chosen]
    starts = np.append(np.flatnonzero(np.diff(owners, prepend=-1)), len(chosen))
    for first in range(0, len(starts) - 1, size):
        bounds = starts[first : first + size + 1]
        own: list[TileScores] = []
        excluding: list[TileScores] = []
        for start in range(bounds[0], bounds[-1], size):
            some = chosen[start : min(start + size, bounds[-1])]
            inputs, parts = reader.read(some), [scanned.part_inside(int(row)) for row in some]
            own.append(TileScores.of(reader.score(inputs), config, parts))
            if unseen:
                others = reader.score(inputs, own[-1].raw.subclass)
                excluding.append(TileScores.of(others, config, parts))
        scored = TileScores.concatenate(own)
        as_unseen = TileScores.concatenate(excluding) if unseen else None
        for start, end in zip(bounds[:-1] - bounds[0], bounds[1:] - bounds[0], strict=True):
            yield Scored(
                int(owners[bounds[0] + start]),
                scanned,
                scored.part(start, end),
                None if as_unseen is None else as_unseen.part(start, end),
            )
        if progress is not None:
            progress("scoring", min(first + size, len(starts) - 1), len(starts) - 1)
