"""Result tables as JSON lines, CSV or Parquet, written row by row, that an interrupted run can resume.

Each row is written to `NAME.partial` as a line of JSON before the next image is predicted. At the end the table is made
from these lines under its own name, and the partial file is removed.
"""

from __future__ import annotations

import csv
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, get_args, get_type_hints

from normweave.atomic import write_atomically
from normweave.errors import DataError

if TYPE_CHECKING:
    from normweave.types import OutcomeColumn

Row = dict[str, Any]
ROWS_A_GROUP = 1000


class ResultWriter:
    """Write a table of outcomes, from which an interrupted run can resume.

    Args:
        table: path of the table, with a suffix of `FORMATS`.
        resume: continue after the rows of an interrupted run.
        bundle_hash: identifies the bundle. Rows of another bundle are refused.

    Attributes:
        done: the number of rows of the interrupted run.
        not_normal, unreadable: how many of these rows are not normal, or are of unreadable images.

    Raises:
        DataError: an interrupted run left rows and `resume` is false, or the rows are not of this bundle.
    """

    def __init__(self, table: Path, *, resume: bool, bundle_hash: str | None) -> None:
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
            self._count(bundle_hash)
        except DataError:
            self._file.close()
            raise

    def _remove_incomplete_line(self) -> None:
        self._file.seek(0)
        complete = sum(len(text) for text in self._file if text.endswith(b"\n"))
        self._file.truncate(complete)
        self._file.seek(complete)

    def _count(self, bundle_hash: str | None) -> None:
        for row in self.rows():
            if row.get("bundle_hash") not in (bundle_hash, None):
                raise DataError(
                    f"{self.path} was written with another bundle ({row['bundle_hash']:.12}…, this is "
                    f"{bundle_hash:.12}…). Resume with that bundle, or remove the file."
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

    def skip(self, paths: Iterator[str], *, keep: int) -> list[str]:
        """Advance `paths` over the images that are done, and return the last `keep` of them.

        Raises:
            DataError: the paths are not those of the rows.
        """
        last: deque[str] = deque(maxlen=keep)
        for number, row in enumerate(self.rows(), 1):
            path = next(paths, None)
            if path != row["image_path"]:
                raise DataError(
                    f"Row {number} of {self.path} is {row['image_path']}, but image {number} of this run is {path}. "
                    "Give the same images in the same order (use --list for a folder that changes), or remove the file."
                )
            last.append(row["image_path"])
        return list(last)

    def write(self, row: Row) -> None:
        r"""Append a row and flush it. A file name that is not UTF-8 keeps its bytes as JSON escapes (\udcff)."""
        try:
            line = json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # Python represents bytes that are not UTF-8 by surrogates
            line = json.dumps(row, allow_nan=False).encode()
        self._file.write(line + b"\n")
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


def _readable(value: Any) -> Any:
    r"""Return the value with bytes of file names that are not UTF-8 written as escapes (\udcff), as in JSON."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_readable(item) for item in value]
    return {name: _readable(item) for name, item in value.items()} if isinstance(value, dict) else value


def write_csv(rows: Iterator[Row], path: Path, columns: Sequence[OutcomeColumn]) -> None:
    """Write a CSV file with these columns. Lists are JSON in their cells."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in columns])
        writer.writeheader()
        for row in map(_readable, rows):
            writer.writerow(
                {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
            )


def write_parquet(rows: Iterator[Row], path: Path, columns: Sequence[OutcomeColumn]) -> None:
    """Write a Parquet file with these columns, in row groups of a thousand, so that memory stays bounded."""
    import pyarrow
    import pyarrow.parquet

    types = {str: pyarrow.string(), float: pyarrow.float64(), int: pyarrow.int64(), bool: pyarrow.bool_()}

    def arrow_type(column: OutcomeColumn) -> Any:
        if not column.is_list:
            return types[column.type]
        items = get_type_hints(column.type)  # of an optional item the first alternative, the other is None
        fields = [(name, types[next(iter(get_args(type_)), type_)]) for name, type_ in items.items()]
        return pyarrow.list_(pyarrow.struct(fields))

    schema = pyarrow.schema([(column.name, arrow_type(column)) for column in columns])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(map(_readable, rows), ROWS_A_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))


FORMATS: dict[str, Callable[[Iterator[Row], Path, Sequence[OutcomeColumn]], None] | None] = {
    ".jsonl": None,  # the partial file itself
    ".csv": write_csv,
    ".parquet": write_parquet,
}
