"""Images and results that are no files of this machine: in a store with a URL, or in a Parquet table.

fsspec reads and writes the stores: s3:// (package s3fs), gs:// (gcsfs), abfs:// (adlfs), and its others.
"""

from __future__ import annotations

import asyncio
import glob
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from normweave.atomic import write_atomically
from normweave.data.images import StoredImage, read_ahead
from normweave.data.layouts import IMAGES
from normweave.data.tables import read_csv
from normweave.errors import DataError, ImageError, MissingError

T = TypeVar("T")
ListedImage = str | StoredImage
"""A path of this machine, or an image of a store or a table."""

TABLES = (".csv", ".parquet")
CONTENTS = ("image", "image_bytes", "bytes")
"""Names of the column of a Parquet table with the contents of image files; of a struct (Hugging Face) its `bytes`."""
READERS = 16
"""Images of a store that are read at the same time: each waits for the network."""
AHEAD = 32
"""Images of a store that are read before they are decoded, at most."""
TRIES = 3
WAIT_S = 0.5
"""Time before the second try; each further one waits twice as long."""
OBJECT_S = 60.0
"""Longest time for one object, of any size; a store that hangs is an error after `TRIES` times as long."""
REQUEST_S = 20
"""Longest wait of S3 for a connection or for the next bytes."""
ATTEMPTS = 2
"""Attempts of a request to S3, within each of `TRIES`."""

_group_lock = threading.Lock()


def is_url(text: str) -> bool:
    """Return whether a text is a URL such as s3://bucket/folder, and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def file_system(url: str) -> tuple[Any, str]:
    """Return the file system of fsspec for a URL, and the path in it.

    Raises:
        MissingError: fsspec, or the package of this store, is not installed.
        DataError: fsspec knows no such store.
    """
    try:
        import fsspec  # noqa: F401 - `open_system` imports it
    except ImportError as error:
        raise MissingError(f"{url} needs fsspec, which is not installed: pip install 'normweave[scale]'") from error
    try:
        system, path = open_system(url, seconds=REQUEST_S, attempts=ATTEMPTS)
    except ImportError as error:
        raise MissingError(f"{url} needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise DataError(f"{url}: {error}. Allowed: s3://, gs://, abfs:// and the other stores of fsspec.") from error
    return system, path


def open_system(url: str, *, seconds: int, attempts: int, **options: Any) -> tuple[Any, str]:
    """Return the file system of fsspec for a URL, and the path in it; requests to S3 have limits.

    Args:
        seconds: longest wait for a connection or for the next bytes.
        attempts: of each request.
        options: of the file system.

    Raises:
        ImportError: the package of this store is not installed.
        ValueError: fsspec knows no such store.
    """
    from fsspec.core import url_to_fs

    is_s3 = url.partition("://")[0] in ("s3", "s3a")
    if is_s3:
        limits = {"connect_timeout": seconds, "read_timeout": seconds}
        options["config_kwargs"] = limits | {"retries": {"total_max_attempts": attempts}}
    system, path = url_to_fs(url, **options)
    if is_s3:
        system.retries = 1  # of s3fs, beside those of botocore
    return system, path


def retried(what: str, work: Callable[[], T], *, raised: tuple[type[Exception], ...] = ()) -> T:
    """Call `work` again after an error of the store, which may be a short one of the network.

    Args:
        raised: further exceptions that are not tried again.

    Raises:
        FileNotFoundError, PermissionError: raised by `work`; not tried again.
        DataError: every try failed.
    """
    final: tuple[type[Exception], ...] = (FileNotFoundError, PermissionError, *raised)
    for attempt in range(TRIES):
        try:
            return work()
        except final:
            raise
        except Exception as error:  # the stores' errors have no class in common
            if attempt == TRIES - 1:
                raise DataError(
                    f"{what}: the store does not answer ({type(error).__name__}: {str(error)[:300]}). Check its "
                    "address, the network and the credentials, then run the command again, with --resume if there are "
                    "results."
                ) from error
            time.sleep(WAIT_S * 2**attempt)
    raise AssertionError  # the last try returns or raises


def limited(system: Any, method: str, *arguments: Any, seconds: float | None = None) -> Any:
    """Call a method of a file system of fsspec for one object, and end it after some seconds.

    The limits of a store's package for a connection do not end every request: one can wait to be told to continue.

    Args:
        seconds: None: `OBJECT_S`.

    Raises:
        TimeoutError: the store has not answered.
    """
    if not getattr(system, "async_impl", False):
        return getattr(system, method)(*arguments)
    from fsspec.asyn import sync

    seconds = OBJECT_S if seconds is None else seconds

    async def request() -> Any:
        async with asyncio.timeout(seconds):
            return await getattr(system, f"_{method}")(*arguments)

    try:
        return sync(system.loop, request)
    except TimeoutError as error:
        raise TimeoutError(f"no answer within {seconds:g} s") from error


@dataclass(frozen=True)
class UrlImage(StoredImage):
    """An image of a store."""

    path: str

    def read(self) -> bytes:
        """Return the content of the file."""
        system, inner = file_system(self.path)
        try:
            content: bytes = retried(self.path, lambda: limited(system, "cat_file", inner))
        except FileNotFoundError as error:
            raise ImageError(f"{self.path}: no such file. Check the URL.") from error
        except PermissionError as error:
            raise ImageError(f"{self.path}: cannot be read ({error}). Check the permissions.") from error
        return content


@dataclass(frozen=True)
class ParquetImage(StoredImage):
    """An image in a row of a Parquet table."""

    path: str
    table: str
    row: int

    def read(self) -> bytes:
        """Return the content of the file."""
        content = _contents(self.table, self.row)
        if content is None:
            raise ImageError(f"{self.path}: row {self.row} of {self.table} has no content. Fill it, or remove the row.")
        return content


@dataclass(frozen=True)
class _Fetched(StoredImage):
    """An image of a store that was read ahead."""

    path: str
    content: bytes | ImageError

    def read(self) -> bytes:
        if isinstance(self.content, ImageError):
            raise self.content
        return self.content


def fetched(images: Iterable[ListedImage]) -> Iterator[ListedImage]:
    """Yield the same images in order; those of stores are read ahead by several threads."""
    pool = ThreadPoolExecutor(READERS)
    try:
        yield from read_ahead(pool, _fetch, images, AHEAD)
    finally:  # after an error, images that wait would each fail in their turn
        pool.shutdown(cancel_futures=True)


def _fetch(image: ListedImage) -> ListedImage:
    if not isinstance(image, UrlImage):
        return image
    try:
        return _Fetched(image.path, image.read())
    except ImageError as error:
        return _Fetched(image.path, error)


def refused(image: ListedImage, reason: str) -> StoredImage:
    """Return an image that cannot be read, for this reason."""
    return _Fetched(os.fspath(image), ImageError(reason))


def as_json(image: ListedImage) -> Any:
    """Return an image as a JSON value, for another process."""
    return [image.path, image.table, image.row] if isinstance(image, ParquetImage) else os.fspath(image)


def from_json(value: Any) -> ListedImage:
    """Return the image of which `as_json` returned the value."""
    if isinstance(value, list):
        return ParquetImage(*value)
    return UrlImage(value) if is_url(value) else str(value)


# ── which images ─────────────────────────────────────────────────────────────────────────────────────────────────────


def in_store(url: str) -> Iterator[UrlImage]:
    """Yield the images of a URL: a file, a pattern, or all below a folder, sorted by path and without hidden ones.

    Raises:
        DataError: there are none, or the store does not answer.
    """
    system, path = file_system(url)

    def find() -> list[str]:
        if _is_pattern(system, path):
            return sorted(system.glob(path))
        if not system.isdir(path):
            return [path]
        start = len(path.rstrip("/")) + 1
        return [
            each
            for each in sorted(system.find(path))
            if os.path.splitext(each)[1].lower() in IMAGES
            and not any(name.startswith(".") for name in each[start:].split("/"))
        ]

    try:
        found = retried(url, find)
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"{url} cannot be listed ({error}). Check the URL and the permissions.") from error
    if not found:
        raise DataError(f"{url} contains no image. Give a folder with images, a pattern that matches, or image files.")
    return (UrlImage(system.unstrip_protocol(each)) for each in found)


def _is_pattern(system: Any, path: str) -> bool:
    """Return whether a path of a store is a pattern, and not a name that has the signs of one."""
    return glob.has_magic(path) and not system.exists(path)


def is_table(argument: str) -> bool:
    """Return whether an argument names a table of images: a manifest, or images in Parquet."""
    return argument.lower().endswith(TABLES)


def tables_of(argument: str) -> list[str]:
    """Return the tables that an argument names: itself, those that match a pattern on this machine, or none.

    A file in a folder that matches too is read with the folder. `in_table` reads patterns of stores.
    """
    if is_url(argument) or os.path.exists(argument):
        return [argument]
    matches = set(glob.glob(argument, recursive=True)) if glob.has_magic(argument) else set()
    return sorted(each for each in matches if not any(str(above) in matches for above in Path(each).parents))


def in_table(table: str) -> Iterator[ListedImage]:
    """Yield the images of a manifest (column image_path), or of a Parquet table that contains their files.

    Paths are relative to the folder of the table. An image in a table is named by its column image_path, else by the
    table and its row. A folder whose name ends in .parquet is read file by file.

    Raises:
        DataError: it cannot be read, or has neither paths nor images.
    """
    if not table.lower().endswith(".parquet"):
        if is_url(table):
            raise DataError(f"{table}: a manifest of a store must be .parquet. Save it as Parquet.")
        return iter(
            [_beside(table, row["image_path"] or "") for _, row in read_csv(Path(table), required=["image_path"])[1]]
        )
    return (image for file in _files_of(table) for image in _in_parquet(file))


def _beside(table: str, path: str) -> ListedImage:
    if not path:
        raise DataError(f"{table}: a row has no image_path. Give the path of the image, or remove the row.")
    if is_url(path):
        return UrlImage(path)
    if is_url(table):
        return UrlImage(f"{table.rpartition('/')[0]}/{path}")
    return os.path.join(os.path.dirname(table), path)


def _files_of(table: str) -> list[str]:
    """Return the files of a table: itself, or those of a folder of this name."""
    if not is_url(table):
        if not os.path.isdir(table):
            return [table]
        found = sorted(glob.glob(os.path.join(glob.escape(table), "**", "*.parquet"), recursive=True))
    else:
        system, path = file_system(table)

        def find() -> list[str]:
            files: set[str] = set()
            for each in system.glob(path) if _is_pattern(system, path) else [path]:
                if system.isdir(each):
                    files.update(name for name in system.find(each) if name.endswith(".parquet"))
                else:
                    files.add(each)
            return sorted(files)

        try:
            found = [system.unstrip_protocol(each) for each in retried(table, find)]
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(f"{table} cannot be listed ({error}). Check the URL and the permissions.") from error
    if not found:
        raise DataError(
            f"{table} contains no .parquet file. Give the table, the folder of its files, or a pattern that matches."
        )
    return found


def _in_parquet(table: str) -> Iterator[ListedImage]:
    file = _parquet(table)
    names = file.schema_arrow.names
    if "image_path" not in names and _column(table) is None:
        raise DataError(
            f"{table}: columns are {', '.join(names)}. It needs image_path, or the contents of image files in a column "
            f"of the type binary named {' or '.join(CONTENTS)}."
        )
    row = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        paths = [None] * count
        if "image_path" in names:
            paths = _read_group(table, group, "image_path").to_pylist()
        for path in paths:
            if _column(table) is None:
                yield _beside(table, str(path or ""))
            else:
                yield ParquetImage(str(path or f"{table}#{row}"), table, row)
            row += 1


@lru_cache(maxsize=16)
def _parquet(table: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingError(
            f"{table}: Parquet needs pyarrow, which is not installed: pip install 'normweave[scale]'"
        ) from error

    def read() -> Any:
        if not is_url(table):
            return parquet.ParquetFile(table)
        system, path = file_system(table)
        return parquet.ParquetFile(system.open(path, "rb"))

    return _read_parquet(table, read)


def _read_group(table: str, group: int, column: str) -> Any:
    """Return a column of a row group of a table."""
    file = _parquet(table)
    return _read_parquet(table, lambda: file.read_row_group(group, columns=[column]).column(0))


def _read_parquet(table: str, read: Callable[[], T]) -> T:
    """Call `read`, again after an error of a store; errors name the table."""
    from pyarrow import ArrowException

    try:
        return retried(table, read, raised=(ArrowException,)) if is_url(table) else read()
    except (OSError, ArrowException) as error:
        raise DataError(
            f"{table}: cannot be read as Parquet ({error}). Check the path, or write the table again."
        ) from error


@lru_cache(maxsize=16)
def _column(table: str) -> tuple[str, bool] | None:
    """Return the column with the contents of image files, and whether it is a struct; None: there is none."""
    from pyarrow import types

    def is_binary(given: Any) -> bool:
        return bool(types.is_binary(given) or types.is_large_binary(given) or types.is_binary_view(given))

    for field in _parquet(table).schema_arrow:
        if field.name in CONTENTS and is_binary(field.type):
            return field.name, False
        if field.name in CONTENTS and types.is_struct(field.type):
            index = field.type.get_field_index("bytes")
            if index >= 0 and is_binary(field.type.field(index).type):
                return field.name, True
    return None


def _contents(table: str, row: int) -> bytes | None:
    """Return the content of the image in a row of a table. The row group that was read last is kept."""
    with _group_lock:
        file, first = _parquet(table), 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if row < first + count:
                content: bytes | None = _row_group(table, group)[row - first].as_py()
                return content
            first += count
    raise DataError(f"{table} has {first} rows, and row {row} was asked for. It was changed during the run.")


@lru_cache(maxsize=1)
def _row_group(table: str, group: int) -> Any:
    from pyarrow import compute

    column = _column(table)
    if column is None:
        raise DataError(f"{table} has no images any more. It was changed during the run.")
    name, is_struct = column
    values = _read_group(table, group, name).combine_chunks()
    return compute.struct_field(values, "bytes") if is_struct else values


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Folder:
    """A folder of files that are written completely or not at all: of this machine, or of a store.

    Args:
        where: path or URL.
    """

    def __init__(self, where: str) -> None:
        self.where = where.rstrip("/")
        self._system: Any = None
        self._inner = ""
        if is_url(where):
            self._system, self._inner = file_system(self.where)

    def names(self) -> list[str]:
        """Return the names of the files, sorted; none if there is no such folder."""
        if self._system is None:
            return sorted(os.listdir(self.where)) if os.path.isdir(self.where) else []
        system = self._system
        system.invalidate_cache()  # other machines write here
        try:
            found = retried(self.where, lambda: system.ls(self._inner, detail=False))
        except FileNotFoundError:
            return []
        return sorted(name for each in found if (name := each.rstrip("/").rpartition("/")[2]))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none."""
        try:
            if self._system is None:
                return Path(self.where, name).read_bytes()
            system = self._system
            content: bytes = retried(self.where, lambda: limited(system, "cat_file", f"{self._inner}/{name}"))
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file, completely or not at all."""
        if self._system is None:
            os.makedirs(self.where, exist_ok=True)
            write_atomically(Path(self.where, name), lambda path: path.write_bytes(content))
            return
        system = self._system
        retried(self.where, lambda: limited(system, "pipe_file", f"{self._inner}/{name}", content))

    def remove(self, name: str) -> None:
        """Remove a file."""
        if self._system is None:
            Path(self.where, name).unlink(missing_ok=True)
        else:
            self._system.rm_file(f"{self._inner}/{name}")
