"""A feature cache on disk: each image passes through the network once.

Layout of the folder:

    FINGERPRINT/SEGMENT.f16   rows of D*h*w float16 (the machine's byte order), one after another
    FINGERPRINT/SEGMENT.keys  the key of each row, one per line

One process writes a segment once, so processes need no locks: they read each other's segments and at worst compute a
row twice. A row is synced to the disk before its key is written. After a kill or a power failure, the complete lines
are the keys of the complete rows.
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
from functools import cached_property
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normweave.caches import cache_folder
from normweave.errors import DataError
from normweave.features.frozen import FrozenFeatures
from normweave.types import FeatureSource, Progress

Load = Callable[[int], NDArray[np.uint8]]
"""Returns the prepared image (3, H, W) of a row."""

GIB = 2**30
WORKERS = 2  # threads that decode and prepare images while the network computes
AHEAD = 16  # the most prepared images that wait for the network


class Segment(NamedTuple):
    """The rows that one process wrote at once."""

    data: Path
    keys: list[str]  # of the complete rows, in their order


class Row(NamedTuple):
    """A row of a segment. The memory map keeps the file readable after another process removes its name."""

    memory: mmap.mmap
    number: int


class Cached:
    """Features on disk."""

    def __init__(self, rows: Sequence[Row], *, shape: tuple[int, int, int]) -> None:
        self.rows = rows
        self.shape = shape

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Return the features of these images, (len(rows), D, h, w) float32."""
        features = np.empty((len(rows), *self.shape), dtype=np.float16)
        row_bytes = features[:1].nbytes
        chosen = [self.rows[row] for row in rows]
        for target, (memory, index) in zip(features, chosen, strict=True):
            stored = np.frombuffer(memory, np.float16, count=target.size, offset=index * row_bytes)
            target[...] = stored.reshape(self.shape)
        if hasattr(mmap, "MADV_DONTNEED"):  # otherwise the pages stay in this process's memory
            for memory in {row.memory for row in chosen}:
                memory.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(features).float()


class Streamed:
    """Features computed again at each read, bit-equal to the cached ones: for a disk that is too small."""

    def __init__(self, extractor: FrozenFeatures, load: Load, count: int) -> None:
        self.extractor = extractor
        self.load = load
        self.count = count
        self.shape = extractor.shape

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Return the features of these images, (len(rows), D, h, w) float32.

        Raises:
            ImageError: raised by `load`.
            DataError: a feature does not fit float16.
        """
        features = torch.empty(len(rows), *self.shape)
        start = 0
        for batch in computed(self.extractor, self.load, [int(row) for row in rows]):
            features[start : start + len(batch)] = torch.from_numpy(batch)
            start += len(batch)
        return features


def default_folder() -> Path:
    """Return the folder of the cache, unless another one is given."""
    return cache_folder("features")


class WhenRead:
    """A source of features that is made when it is first read: not, if a head that reads it is trained elsewhere."""

    def __init__(self, make: Callable[[], FeatureSource], *, shape: tuple[int, int, int], count: int) -> None:
        self.make = make
        self.shape = shape
        self.count = count

    @cached_property
    def source(self) -> FeatureSource:
        """The source."""
        return self.make()

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Return the features of these images, (len(rows), D, h, w) float32."""
        return self.source.read(rows)


def streamed(extractor: FrozenFeatures, load: Load, count: int) -> FeatureSource:
    """Return a source of the features of rows 0..count-1 of `load`, computed again at each read."""
    return Streamed(extractor, load, count)


def source(
    extractor: FrozenFeatures,
    keys: Sequence[str],
    load: Load,
    *,
    folder: Path | None,
    max_gib: float,
    progress: Progress | None = None,
) -> FeatureSource:
    """Return a source of the features of rows 0..len(keys)-1 of `load`: `cached`, or `streamed` without a folder."""
    if folder is None:
        return streamed(extractor, load, len(keys))
    return cached(extractor, keys, load, folder=folder, max_gib=max_gib, progress=progress)


def contains(folder: Path, fingerprint: str, keys: Sequence[str]) -> list[bool]:
    """Return for each key whether the cache contains its row."""
    cached_keys = {key for segment in _segments(folder / fingerprint, row_bytes=1) for key in segment.keys}
    return [key in cached_keys for key in keys]


def cached(
    extractor: FrozenFeatures,
    keys: Sequence[str],
    load: Load,
    *,
    folder: Path,
    max_gib: float,
    progress: Progress | None = None,
) -> FeatureSource:
    """Return a source of the features of rows 0..len(keys)-1 of `load`, each computed once and read from disk.

    Args:
        keys: the key of each row: a hash of content, preparation and tile. Rows with the same key are stored once.
        folder: the folder of the cache, for all extractors.
        max_gib: the largest size of the folder. Segments that this call does not need are removed, those of other
            extractors first, the least recently used first. Checked once, before the first row is computed.
        progress: called with ("features", rows done, rows to compute) after each pass.

    Raises:
        ImageError: raised by `load`.
        DataError: the features do not fit the cache or the disk, or a feature does not fit float16.
    """
    rows, new = _look_up(extractor, keys, folder=folder, max_gib=max_gib)
    if new:
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        computing = {key: first[key] for key in new}
        memory = _write(folder / extractor.fingerprint, computing, extractor, load, progress)
        rows |= {key: Row(memory, index) for index, key in enumerate(new)}
    return Cached([rows[key] for key in keys], shape=extractor.shape)


def missing(extractor: FrozenFeatures, keys: Sequence[str], *, folder: Path, max_gib: float) -> list[str]:
    """Return the keys without a row, in their order, and make room for rows that are computed elsewhere.

    Raises:
        DataError: they do not fit the cache or the disk.
    """
    return _look_up(extractor, keys, folder=folder, max_gib=max_gib)[1]


def _look_up(
    extractor: FrozenFeatures, keys: Sequence[str], *, folder: Path, max_gib: float
) -> tuple[dict[str, Row], list[str]]:
    """Return the rows on disk by key, and the keys without one in their order, for which room is made."""
    home = folder / extractor.fingerprint
    home.mkdir(parents=True, exist_ok=True)
    row_bytes = 2 * int(np.prod(extractor.shape))
    wanted = set(keys)
    rows: dict[str, Row] = {}
    needed = []
    for segment in _segments(home, row_bytes=row_bytes):
        if wanted.isdisjoint(segment.keys):
            continue
        try:
            os.utime(segment.data)  # the time of the last use
            with segment.data.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:  # removed by another process
            continue
        needed.append(segment.data)
        rows |= {key: Row(memory, index) for index, key in enumerate(segment.keys) if key in wanted}
    new = [key for key in dict.fromkeys(keys) if key not in rows]
    if new:
        _make_room(folder, home, needed, rows=len(new), row_bytes=row_bytes, max_bytes=int(max_gib * GIB))
    return rows, new


def add(folder: Path, fingerprint: str, keys: Sequence[str], features: NDArray[np.float16]) -> None:
    """Write a segment of rows (n, D, h, w) that were computed elsewhere."""
    data = folder / fingerprint / f"{uuid.uuid4().hex}.f16"
    data.parent.mkdir(parents=True, exist_ok=True)
    with data.open("wb", buffering=0) as file, data.with_suffix(".keys").open("wb", buffering=0) as index:
        _append_rows(file, index, keys, features)


def _segments(home: Path, *, row_bytes: int) -> Iterator[Segment]:
    """Yield every segment with its complete rows."""
    for index in sorted(home.glob("*.keys")):
        data = index.with_suffix(".f16")
        try:
            lines = index.read_bytes().split(b"\n")[:-1]  # drops an incomplete last line
            rows = data.stat().st_size // row_bytes
        except FileNotFoundError:  # removed by another process
            continue
        yield Segment(data, [line.decode(errors="replace") for line in lines[:rows]])


def _make_room(folder: Path, home: Path, needed: list[Path], *, rows: int, row_bytes: int, max_bytes: int) -> None:
    """Remove segments until `rows` more rows fit.

    Raises:
        DataError: they do not fit after all removable segments are removed.
    """
    stats = {data: data.stat() for data in folder.glob("*/*.f16")}
    used = sum(stat.st_size for stat in stats.values())
    removable = sorted(stats.keys() - needed, key=lambda data: (data.parent == home, stats[data].st_mtime))
    more = rows * row_bytes
    while removable and (used + more > max_bytes or more > shutil.disk_usage(folder).free):
        data = removable.pop(0)
        data.with_suffix(".keys").unlink(missing_ok=True)  # first, so that no key is without its row
        data.unlink(missing_ok=True)
        used -= stats[data].st_size
    if used + more > max_bytes:
        raise DataError(
            f"The features of {rows} more images take {more / GIB:.3g} GiB. The cache {folder} contains "
            f"{used / GIB:.3g} GiB that this run needs, and its limit is {max_bytes / GIB:.3g} GiB. Raise the limit to "
            f"{math.ceil((used + more) / GIB * 1000) / 1000:g} GiB (`cache_gib` in Python), or use no cache "
            "(--no-cache: slower)."
        )
    free = shutil.disk_usage(folder).free
    if more > free:
        raise DataError(
            f"The features of {rows} more images take {more / GIB:.3g} GiB, and the disk of {folder} has "
            f"{free / GIB:.3g} GiB left. Free some, choose a folder on another disk, or use no cache (--no-cache: "
            "slower)."
        )


def _write(
    home: Path, missing: Mapping[str, int], extractor: FrozenFeatures, load: Load, progress: Progress | None
) -> mmap.mmap:
    """Write a segment with the missing rows, in the order of `missing` (key to row of `load`), and map it."""
    data = home / f"{uuid.uuid4().hex}.f16"
    keys = list(missing)
    done = 0
    with data.open("w+b", buffering=0) as file, data.with_suffix(".keys").open("wb", buffering=0) as index:
        for features in computed(extractor, load, missing.values()):
            try:
                _append_rows(file, index, keys[done : done + len(features)], features)
            except OSError as error:
                raise DataError(
                    f"The cache {home.parent} could not be written after {done} of {len(keys)} images "
                    f"({error.strerror}). These are kept. Free some disk, choose another folder, or use no cache "
                    "(--no-cache: slower)."
                ) from error
            done += len(features)
            if progress is not None:
                progress("features", done, len(keys))
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _append_rows(file: FileIO, index: FileIO, keys: Sequence[str], features: NDArray[np.float16]) -> None:
    """Write rows (n, D, h, w) to the disk, then their keys: no key is without its row."""
    _append(file, features.tobytes())
    os.fsync(file.fileno())
    _append(index, "".join(f"{key}\n" for key in keys).encode())


def _append(file: FileIO, content: bytes) -> None:
    """Write all bytes. One call of `write` can write fewer if the disk is nearly full."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def computed(extractor: FrozenFeatures, load: Load, rows: Iterable[int]) -> Iterator[NDArray[np.float16]]:
    """Yield the features of these rows in order, one pass at a time, (up to batch_images, D, h, w)."""
    images = _loaded(load, rows)
    while batch := list(islice(images, extractor.batch_images)):
        exact = extractor.extract(torch.from_numpy(np.stack(batch))).cpu().numpy()
        with np.errstate(over="ignore"):
            features = exact.astype(np.float16)
        if not np.isfinite(features).all():
            raise DataError(
                f"The backbone's features reach {np.abs(exact).max():.3g}, but they are stored as float16, at most "
                "65504. Choose another backbone or shallower stages (features.strides)."
            )
        yield features


def _loaded(load: Load, rows: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
    """Yield the prepared images in order, loaded at most `AHEAD` images ahead."""
    waiting: deque[Future[NDArray[np.uint8]]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for row in rows:
            waiting.append(pool.submit(load, row))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
