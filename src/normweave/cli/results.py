"""Result tables as JSON lines, CSV or Parquet, written row by row, that an interrupted run can resume.

Each row is written to `NAME.partial` as a line of JSON before the next image is predicted. At the end the table is made
from these lines under its own name, and the partial file is removed.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from normweave.atomic import write_atomically
from normweave.errors import DataError
from normweave.outcome.table import FORMATS, Row, json_line

if TYPE_CHECKING:
    from normweave.data.stored import ListedImage


class ResultWriter:
    """Write a table of outcomes, from which an interrupted run can resume.

    Args:
        table: path of the table, with a suffix of `FORMATS`.
        resume: continue after the rows of an interrupted run.
        bundle_hashes: identify the bundles. Rows of other bundles are refused.

    Attributes:
        done: the number of rows of the interrupted run.
        not_normal, unreadable: how many of these rows are not normal, or are of unreadable images.

    Raises:
        DataError: an interrupted run left rows and `resume` is false, or the rows are not of this bundle.
    """

    def __init__(self, table: Path, *, resume: bool, bundle_hashes: Collection[str | None]) -> None:
        self.table = table
        self.path = table.with_name(f"{table.name}.partial")
        self.done = self.not_normal = self.unreadable = 0
        table.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not resume:
            raise DataError(
                f"{self.path} contains results of an interrupted run. Resume it (--resume), or remove the file."
            )
        if resume and table.exists() and not self.path.exists():
            raise DataError(f"{table} is complete: no interrupted run can be resumed. Leave out --resume.")
        if table.suffix == ".parquet":
            import pyarrow.parquet  # noqa: F401 - fails before the first image if it is not installed
        self._file = self.path.open("a+b")
        try:
            self._remove_incomplete_line()
            self._count(bundle_hashes)
        except DataError:
            self._file.close()
            raise

    def _remove_incomplete_line(self) -> None:
        self._file.seek(0)
        complete = sum(len(text) for text in self._file if text.endswith(b"\n"))
        self._file.truncate(complete)
        self._file.seek(complete)

    def _count(self, bundle_hashes: Collection[str | None]) -> None:
        for row in self.rows():
            if row.get("bundle_hash") not in (*bundle_hashes, None):
                given = ", ".join(f"{each:.12}…" for each in bundle_hashes)
                raise DataError(
                    f"{self.path} was written with another bundle ({row['bundle_hash']:.12}…, this is {given}). Resume "
                    "with that bundle, or remove the file."
                )
            self.done += 1
            self.unreadable += row["error"] is not None
            self.not_normal += row["verdict"] in ("anomalous", "unknown")

    def rows(self) -> Iterator[Row]:
        """Yield every row in order.

        Raises:
            DataError: a line is not a result.
        """
        with self.path.open(encoding="utf-8", errors="surrogatepass") as file:
            for number, text in enumerate(file, 1):
                try:
                    row = json.loads(text)
                    row["image_path"], row["error"], row["verdict"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"Line {number} of {self.path} is not a result ({error}). Remove the file."
                    ) from error
                yield row

    def skip(self, paths: Iterator[ListedImage], *, keep: int) -> list[ListedImage]:
        """Advance `paths` over the images that are done, and return the last `keep` of them.

        Raises:
            DataError: the paths are not those of the rows.
        """
        last: deque[ListedImage] = deque(maxlen=keep)
        for number, row in enumerate(self.rows(), 1):
            path = next(paths, None)
            name = None if path is None else os.fspath(path)
            if path is None or name != row["image_path"]:
                raise DataError(
                    f"Row {number} of {self.path} is {row['image_path']}, but image {number} of this run is {name}. "
                    "Give the same images in the same order (use --list for a folder that changes), or remove the file."
                )
            last.append(path)
        return list(last)

    def write(self, row: Row) -> None:
        r"""Append a row and flush it. A file name that is not UTF-8 keeps its bytes as JSON escapes (\udcff)."""
        self._file.write(json_line(row))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if exc_type is not None:
            if self.path.stat().st_size == 0:
                self.path.unlink()
            return
        write = FORMATS[self.table.suffix]
        if write is None:
            os.replace(self.path, self.table)
            return
        from normweave.types import Outcome  # imports NumPy, which `--help` does not need

        write_atomically(self.table, lambda path: write(self.rows(), path, Outcome.columns()))
        self.path.unlink(missing_ok=True)
