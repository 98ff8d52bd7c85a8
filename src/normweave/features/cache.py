"""Features on disk, so that no image goes through the network twice.

Layout of the folder:

    FINGERPRINT/SEGMENT.f16   rows of D*h*w float16 (the machine's byte order), one after another
    FINGERPRINT/SEGMENT.keys  one line a row: what identifies it

A segment is written by one process in one go and never again, so that processes need no locks: they read each other's
segments and at worst compute a row twice. A row's bytes are on disk before its line is written; after a kill or a power
cut at any moment the whole lines tell which rows are whole.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normweave.errors import DataError
from normweave.features.frozen import FrozenFeatures
from normweave.types import FeatureSource, Progress

Load = Callable[[int], NDArray[np.uint8]]
"""A row's number to its prepared image, (3, H, W)."""

GIB = 2**30
WORKERS = 2  # decode and prepare while the network computes
AHEAD = 16  # prepared images that may wait for the network; bounds memory


class Segment(NamedTuple):
    """What one process wrote in one go."""

    data: Path
    keys: list[str]  # of the whole rows, in their order


class Place(NamedTuple):
    """Where a row lies. The map holds its file, so that another process may remove the name meanwhile."""

    memory: mmap.mmap
    row: int


class Cached:
    """Features that lie on disk, read a few at a time."""

    def __init__(self, places: Sequence[Place], *, shape: tuple[int, int, int]) -> None:
        self.places = places
        self.shape = shape

    def __len__(self) -> int:
        """How many images."""
        return len(self.places)

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Features of these images, (len(rows), D, h, w) float32."""
        gathered = np.empty((len(rows), *self.shape), dtype=np.float16)
        row_bytes = gathered[:1].nbytes
        places = [self.places[row] for row in rows]
        for target, (memory, row) in zip(gathered, places, strict=True):
            stored = np.frombuffer(memory, np.float16, count=target.size, offset=row * row_bytes)
            target[...] = stored.reshape(self.shape)
        if hasattr(
            mmap, "MADV_DONTNEED"
        ):  # else the pages read pile up in this process until memory is short
            for memory in {place.memory for place in places}:
                memory.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(gathered).float()


class Streamed:
    """The same features to the bit, computed anew at each reading: for when the disk is too small."""

    def __init__(self, extractor: FrozenFeatures, load: Load, count: int) -> None:
        self.extractor = extractor
        self.load = load
        self.count = count
        self.shape = extractor.shape

    def __len__(self) -> int:
        """How many images."""
        return self.count

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Features of these images, (len(rows), D, h, w) float32."""
        read = torch.empty(len(rows), *self.shape)
        start = 0
        for features in _computed(self.extractor, self.load, [int(row) for row in rows]):
            read[start : start + len(features)] = torch.from_numpy(features)
            start += len(features)
        return read


def streamed(extractor: FrozenFeatures, load: Load, count: int) -> FeatureSource:
    """Features of rows 0..count-1 of `load`, computed at each reading and equal to the cached ones.

    Its `read` raises what `load` raises, and DataError when a feature does not fit float16.
    """
    return Streamed(extractor, load, count)


def known(folder: Path, fingerprint: str, keys: Sequence[str]) -> list[bool]:
    """Which of these rows the cache holds."""
    held = {key for segment in _segments(folder / fingerprint, row_bytes=1) for key in segment.keys}
    return [key in held for key in keys]


def cached(
    extractor: FrozenFeatures,
    keys: Sequence[str],
    load: Load,
    *,
    folder: Path,
    max_gib: float,
    progress: Progress | None = None,
) -> FeatureSource:
    """Features of rows 0..len(keys)-1 of `load`, each computed once and then read from disk.

    Args:
        keys: what identifies each row: a hash of content, preparation and tile. Rows of one key are stored once.
        folder: of the whole cache, for all extractors.
        max_gib: what the whole folder may hold. Segments that this call does not need make room, other extractors'
            first, the longest unused first. It is checked once, before the first row is computed.
        progress: told ("features", rows done, rows to compute) after each pass.

    Raises:
        ImageError: from `load`.
        DataError: the features do not fit the cache or the disk, or a feature does not fit float16.
    """
    home = folder / extractor.fingerprint
    home.mkdir(parents=True, exist_ok=True)
    row_bytes = 2 * int(np.prod(extractor.shape))
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    places: dict[str, Place] = {}
    needed = []
    for segment in _segments(home, row_bytes=row_bytes):
        if first.keys().isdisjoint(segment.keys):
            continue
        try:
            os.utime(segment.data)  # says when it was last used
            with segment.data.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:  # another process has just made room
            continue
        needed.append(segment.data)
        places |= {key: Place(memory, row) for row, key in enumerate(segment.keys) if key in first}
    missing = {key: row for key, row in sorted(first.items(), key=lambda item: item[1]) if key not in places}
    if missing:
        _make_room(folder, home, needed, rows=len(missing), row_bytes=row_bytes, max_bytes=int(max_gib * GIB))
        memory = _write(home, missing, extractor, load, progress)
        places |= {key: Place(memory, row) for row, key in enumerate(missing)}
    return Cached([places[key] for key in keys], shape=extractor.shape)


def _segments(home: Path, *, row_bytes: int) -> Iterator[Segment]:
    """Every segment with its whole rows."""
    for index in sorted(home.glob("*.keys")):
        data = index.with_suffix(".f16")
        try:
            lines = index.read_bytes().split(b"\n")[:-1]  # behind the last line end: a torn line, or nothing
            rows = data.stat().st_size // row_bytes
        except FileNotFoundError:  # another process has just made room
            continue
        yield Segment(data, [line.decode(errors="replace") for line in lines[:rows]])


def _make_room(
    folder: Path, home: Path, needed: list[Path], *, rows: int, row_bytes: int, max_bytes: int
) -> None:
    """Remove segments until `rows` more rows fit.

    Raises:
        DataError: they do not fit even then.
    """
    use = {data: data.stat() for data in folder.glob("*/*.f16")}
    held = sum(stat.st_size for stat in use.values())
    removable = sorted(use.keys() - needed, key=lambda data: (data.parent == home, use[data].st_mtime))
    more = rows * row_bytes
    while removable and (held + more > max_bytes or more > shutil.disk_usage(folder).free):
        data = removable.pop(0)
        data.with_suffix(".keys").unlink(missing_ok=True)  # first: a line without its row would be a lie
        data.unlink(missing_ok=True)
        held -= use[data].st_size
    if held + more > max_bytes:
        raise DataError(
            f"The features of {rows} more images take {more / GIB:.3g} GiB. The cache {folder} holds "
            f"{held / GIB:.3g} GiB that this run needs, and may grow to {max_bytes / GIB:.3g} GiB. Allow it at least "
            f"{math.ceil((held + more) / GIB * 1000) / 1000:g} GiB (--cache-gib), or do without it (--no-cache: "
            "slower)."
        )
    free = shutil.disk_usage(folder).free
    if more > free:
        raise DataError(
            f"The features of {rows} more images take {more / GIB:.3g} GiB, and the disk of {folder} has "
            f"{free / GIB:.3g} GiB left. Free some, choose a folder on another disk, or do without a cache "
            "(--no-cache: slower)."
        )


def _write(
    home: Path, missing: Mapping[str, int], extractor: FrozenFeatures, load: Load, progress: Progress | None
) -> mmap.mmap:
    """One new segment with the missing rows, in the order of `missing`: key -> row of `load`."""
    data = home / f"{uuid.uuid4().hex}.f16"
    keys = list(missing)
    done = 0
    with data.open("w+b", buffering=0) as file, data.with_suffix(".keys").open("wb", buffering=0) as index:
        for features in _computed(extractor, load, missing.values()):
            try:
                _append(file, features.tobytes())
                os.fsync(file.fileno())
                _append(index, "".join(f"{key}\n" for key in keys[done : done + len(features)]).encode())
            except OSError as error:
                raise DataError(
                    f"The cache {home.parent} could not be written after {done} of {len(keys)} images "
                    f"({error.strerror}). These are kept. Free some disk, choose another folder, or do without a cache "
                    "(--no-cache: slower)."
                ) from error
            done += len(features)
            if progress is not None:
                progress("features", done, len(keys))
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _append(file: FileIO, content: bytes) -> None:
    """Write all of it: one call may write less when the disk is about to be full."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def _computed(extractor: FrozenFeatures, load: Load, rows: Iterable[int]) -> Iterator[NDArray[np.float16]]:
    """Features of these rows in their order, one pass at a time, (up to batch_images, D, h, w)."""
    images = _loaded(load, rows)
    while batch := list(islice(images, extractor.batch_images)):
        exact = extractor.extract(torch.from_numpy(np.stack(batch))).cpu().numpy()
        with np.errstate(over="ignore"):
            features = exact.astype(np.float16)
        if not np.isfinite(features).all():
            raise DataError(
                f"The backbone's features reach {np.abs(exact).max():.3g}, and they are kept in float16, which ends at "
                "65504. Choose another backbone or shallower stages (features.strides)."
            )
        yield features


def _loaded(load: Load, rows: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
    """Prepared images in order, a few ahead of the network."""
    waiting: deque[Future[NDArray[np.uint8]]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for row in rows:
            waiting.append(pool.submit(load, row))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
