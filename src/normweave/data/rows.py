"""Rows of network input: the tiles of every readable image, each with a key of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave.data import alignment
from normweave.data.alignment import Placement
from normweave.data.images import content_hash, decode, reading_version, size
from normweave.data.prepare import Preparation
from normweave.data.regions import TileRegion
from normweave.errors import DataError, ImageError, with_path
from normweave.types import Progress, Sample, Tile

HASH_LETTERS = 16  # of a SHA-256 in the record of a detector: 64 bits distinguish a factory's images


@dataclass(frozen=True)
class Refusal:
    """An image that could not be read."""

    image_path: str
    reason: str

    def __str__(self) -> str:
        """Return the reason with the path, once."""
        return with_path(self.image_path, self.reason)


@dataclass(frozen=True, eq=False)
class Rows:
    """n rows of m readable images."""

    samples: tuple[Sample, ...]
    """m samples of the readable images."""
    hashes: tuple[str, ...]
    """m content hashes (SHA-256 of the file)."""
    sizes: tuple[tuple[int, int], ...]
    """m (height, width) of the images on disk."""
    owner: NDArray[np.int64]
    """(n,) index of the sample of each row, ascending."""
    tiles: tuple[Tile, ...]
    """n tiles."""
    keys: tuple[str, ...]
    """n keys of content, preparation and tile."""
    refused: tuple[Refusal, ...]
    preparation: Preparation
    """Of images of each category."""
    placements: tuple[Placement | None, ...]
    """m places of the parts that the regions of the images follow; None: the region does not follow it."""
    unfit: Mapping[int, str] = field(default_factory=dict)
    """Why an image does not show the part of its region, by its number; see `under`."""
    _decode: Callable[[int], NDArray[np.uint8]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # The tiles of an image are consecutive rows: decode it once.
        samples, placements = self.samples, self.placements
        cached = lru_cache(maxsize=2)(
            lambda number: alignment.to_reference(decode(samples[number].image_path), placements[number])
        )
        object.__setattr__(self, "_decode", cached)

    def __len__(self) -> int:
        """n."""
        return len(self.tiles)

    def load(self, row: int) -> NDArray[np.uint8]:
        """Return the prepared pixels of a row, (3, height, width)."""
        owner = int(self.owner[row])
        return self.preparation.of(self.samples[owner].category).apply(self._decode(owner), self.tiles[row])

    def image(self, number: int) -> NDArray[np.uint8]:
        """Return an image (H, W, 3), moved as its region is; its tiles and its region refer to it."""
        return self._decode(number)

    def part_inside(self, row: int) -> TileRegion | None:
        """Return how a row is prepared and scored under its region; None: all of it is inside."""
        owner = int(self.owner[row])
        preparation = self.preparation.of(self.samples[owner].category)
        return preparation.part_inside(self.sizes[owner], self.tiles[row])

    def parts_inside(self, number: int) -> list[TileRegion | None]:
        """Return how each tile of an image is prepared and scored under its region."""
        return [self.part_inside(int(row)) for row in np.flatnonzero(self.owner == number)]

    def under(self, preparation: Preparation) -> Rows:
        """Return the rows of the same images under one preparation; images are read only if its region follows them.

        An image that does not show the part of the region is in `unfit`, and prepared as if it were not moved.

        Raises:
            ImageError: an image has no pixel in its region.
        """
        own = [
            _tiles_and_keys(sample, content, preparation, size)
            for sample, content, size in zip(self.samples, self.hashes, self.sizes, strict=True)
        ]
        placements, unfit = list[Placement | None](), dict[int, str]()
        for number, sample in enumerate(self.samples):
            placement, each = None, preparation.of(sample.category)
            try:
                placement = each.place(decode(sample.image_path)) if each.follows else None
            except ImageError as error:
                unfit[number] = str(error)
            placements.append(placement)
        return replace(
            self,
            owner=np.array([number for number, (tiles, _) in enumerate(own) for _ in tiles], dtype=np.int64),
            tiles=tuple(tile for tiles, _ in own for tile in tiles),
            keys=tuple(key for _, keys in own for key in keys),
            preparation=preparation,
            placements=tuple(placements),
            unfit=unfit,
        )

    def without(self, refused: Mapping[int, str]) -> Rows:
        """Return the rows without some images, which are refused for the reasons given."""
        kept = [number for number in range(len(self.samples)) if number not in refused]
        rows = np.flatnonzero(np.isin(self.owner, kept))
        names = (Refusal(str(self.samples[number].image_path), reason) for number, reason in refused.items())
        return replace(
            self,
            samples=tuple(self.samples[number] for number in kept),
            hashes=tuple(self.hashes[number] for number in kept),
            sizes=tuple(self.sizes[number] for number in kept),
            placements=tuple(self.placements[number] for number in kept),
            owner=np.searchsorted(kept, self.owner[rows]),
            tiles=tuple(self.tiles[row] for row in rows),
            keys=tuple(self.keys[row] for row in rows),
            refused=(*self.refused, *names),
        )

    def tiles_of(self, number: int) -> tuple[Tile, ...]:
        """Return the tiles of an image."""
        return tuple(self.tiles[row] for row in np.flatnonzero(self.owner == number))

    def load_image(self, number: int) -> NDArray[np.uint8]:
        """Return the prepared pixels of all tiles of an image, (tiles, 3, height, width)."""
        return np.stack([self.load(int(row)) for row in np.flatnonzero(self.owner == number)])


def scan(
    samples: Sequence[Sample],
    preparation: Preparation,
    *,
    known: Callable[[Sequence[str]], Sequence[bool]] | None = None,
    progress: Progress | None = None,
) -> Rows:
    """Return the rows of all readable images, and the reasons why the others are refused.

    Args:
        known: returns for each key whether its features are stored; called once, with the keys of all images. Images
            with stored features are not decoded again, unless their region follows the part.
    """
    images: list[tuple[Sample, str, tuple[int, int]]] = []  # sample, content hash, size
    placements: list[Placement | None] = []
    rows: list[tuple[int, Tile, str]] = []  # index of the image, tile, key
    refused: list[Refusal] = []
    files = [_read_file(sample, preparation.of(sample.category)) for sample in samples]
    keys = [key for file in files if not isinstance(file, ImageError) for key in file.keys]
    stored = set() if known is None else {key for key, is_known in zip(keys, known(keys), strict=True) if is_known}
    for number, (sample, file) in enumerate(zip(samples, files, strict=True)):
        try:
            if isinstance(file, ImageError):
                raise file
            height, width = file.size
            placement, own = None, preparation.of(sample.category)
            if own.follows or not stored.issuperset(file.keys):
                pixels = decode(sample.image_path)
                height, width = pixels.shape[:2]
                placement = own.place(pixels)
        except ImageError as error:
            refused.append(Refusal(str(sample.image_path), str(error)))
            continue
        rows += [(len(images), tile, key) for tile, key in zip(file.tiles, file.keys, strict=True)]
        images.append((sample, file.content, (height, width)))
        placements.append(placement)
        if progress is not None:
            progress("reading images", number + 1, len(samples))
    return Rows(
        samples=tuple(sample for sample, _, _ in images),
        hashes=tuple(content for _, content, _ in images),
        sizes=tuple(shape for _, _, shape in images),
        owner=np.array([owner for owner, _, _ in rows], dtype=np.int64),
        tiles=tuple(tile for _, tile, _ in rows),
        keys=tuple(key for _, _, key in rows),
        refused=tuple(refused),
        preparation=preparation,
        placements=tuple(placements),
    )


class _File(NamedTuple):
    content: str  # hash
    size: tuple[int, int]
    tiles: tuple[Tile, ...]
    keys: list[str]


def _read_file(sample: Sample, preparation: Preparation) -> _File | ImageError:
    """Return the hash and the header of an image file, and its tiles."""
    try:
        content = content_hash(sample.image_path)
        shape = size(sample.image_path)
        tiles, keys = _tiles_and_keys(sample, content, preparation, shape)
    except ImageError as error:
        return error
    return _File(content, shape, tiles, keys)


def _tiles_and_keys(
    sample: Sample, content: str, preparation: Preparation, shape: tuple[int, int]
) -> tuple[tuple[Tile, ...], list[str]]:
    settings = json.dumps(preparation.as_dict(), sort_keys=True)
    tiles = preparation.checked_tiles(*shape)
    reading = reading_version(sample.image_path)
    texts = [f"{content} {settings} {tuple(tile)}{reading}" for tile in tiles]
    return tiles, [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def refuse_used(scanned: Rows, record: Mapping[str, Any], purpose: str) -> None:
    """Check that no image was used in the fit; for the purpose "test", nor for calibration.

    Raises:
        DataError: one was.
    """
    used = {"training": set(record["fit_hashes"])}
    if purpose == "test":
        used["calibration"] = set(record["calibration_hashes"])
    for sample, content in zip(scanned.samples, scanned.hashes, strict=True):
        for before, hashes in used.items():
            if content[:HASH_LETTERS] in hashes:
                raise DataError(
                    f"{sample.image_path} was used in {before}, so it cannot be used for {purpose}: the result would "
                    f"be too good. Give images that {before} has not seen (the same content counts as the same file)."
                )


def fingerprint(hashes: Iterable[str]) -> str:
    """Return one SHA-256 of the hashes of a set of images, independent of their order."""
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()
