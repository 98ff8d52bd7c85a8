"""Tables of results, written row by row and whole at the end; an interrupted one can be gone on with.

Every row is a line of JSON in `NAME.partial`, and there before the next image is judged. When all are, the table is
made from them under its own name, and the lines are gone.
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
from typing import TYPE_CHECKING, Any, Self, get_type_hints

from normweave.atomic import write_atomically
from normweave.errors import DataError

if TYPE_CHECKING:
    from normweave.types import OutcomeColumn

Row = dict[str, Any]
ROWS_A_GROUP = 1000


class Journal:
    """The rows of a table while it grows.

    Args:
        table: its name, of an ending in `TABLES`.
        resume: go on behind the rows that an interrupted call left.
        bundle_hash: of the bundle that judges; rows of another one are not gone on with.

    Attributes:
        done: rows that were there already.
        not_normal, unreadable: how many of them.

    Raises:
        DataError: an interrupted call left rows and `resume` is not set, or they are no rows of this bundle.
    """

    def __init__(self, table: Path, *, resume: bool, bundle_hash: str | None) -> None:
        self.table = table
        self.path = table.with_name(f"{table.name}.partial")
        self.done = self.not_normal = self.unreadable = 0
        table.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not resume:
            raise DataError(
                f"{self.path} is left from an interrupted call. Go on with it (--resume), or remove it to begin anew."
            )
        if resume and table.exists() and not self.path.exists():
            raise DataError(f"{table} is whole: its call was not interrupted. Nothing is left to go on with.")
        if table.suffix == ".parquet":
            import pyarrow.parquet  # noqa: F401 - where it is missing, that is said before the first image
        self._file = self.path.open("a+b")
        try:
            self._keep_whole_lines()
            self._count(bundle_hash)
        except DataError:
            self._file.close()
            raise

    def _count(self, bundle_hash: str | None) -> None:
        for row in self.rows():
            if row.get("bundle_hash") not in (bundle_hash, None):
                raise DataError(
                    f"{self.path} was written with another bundle ({row['bundle_hash']:.12}…, this is "
                    f"{bundle_hash:.12}…). Go on with that one, or remove the file to begin anew."
                )
            self.done += 1
            self.unreadable += row["error"] is not None
            self.not_normal += row["verdict"] in ("anomalous", "unknown")

    def _keep_whole_lines(self) -> None:
        """Cut off what a kill left of a line."""
        self._file.seek(0)
        whole = sum(len(text) for text in self._file if text.endswith(b"\n"))
        self._file.truncate(whole)
        self._file.seek(whole)

    def rows(self) -> Iterator[Row]:
        """Every row, in its order.

        Raises:
            DataError: a line is no row.
        """
        with self.path.open(encoding="utf-8", errors="surrogatepass") as file:
            for number, text in enumerate(file, 1):
                try:
                    row = json.loads(text)
                    row["image_path"], row["error"], row["verdict"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"Line {number} of {self.path} is no result ({error}). Remove the file to begin anew."
                    ) from error
                yield row

    def skip(self, paths: Iterator[str], *, keep: int) -> list[str]:
        """Take the images that are done from the paths; the last `keep` of them come back.

        Raises:
            DataError: they are other images than those of the rows.
        """
        last: deque[str] = deque(maxlen=keep)
        for number, row in enumerate(self.rows(), 1):
            path = next(paths, None)
            if path != row["image_path"]:
                raise DataError(
                    f"Row {number} of {self.path} is of {row['image_path']}, but image {number} of this call is "
                    f"{path}. Name the same images in the same order (for a folder that changes: --list), or remove "
                    "the file to begin anew."
                )
            last.append(row["image_path"])
        return list(last)

    def write(self, row: Row) -> None:
        """Add a row; it is there when this returns."""
        self._file.write(
            (json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
        )
        self._file.flush()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Make the table, or leave the rows to be gone on with."""
        self._file.close()
        if kind is not None:
            if self.path.stat().st_size == 0:
                self.path.unlink()
            return
        write = TABLES[self.table.suffix]
        if write is None:
            os.replace(self.path, self.table)
            return
        from normweave.types import Outcome  # imports NumPy, which `--help` does not need

        write_atomically(self.table, lambda path: write(self.rows(), path, Outcome.columns()))
        self.path.unlink(missing_ok=True)


# ── the tables ───────────────────────────────────────────────────────────────────────────────────────────────────────


def comma_separated(rows: Iterator[Row], path: Path, columns: Sequence[OutcomeColumn]) -> None:
    """Write a CSV file with these columns; lists are JSON in their cells."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in columns])
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
            )


def parquet(rows: Iterator[Row], path: Path, columns: Sequence[OutcomeColumn]) -> None:
    """Write a Parquet file with these columns, in row groups of a thousand, so that memory stays bounded."""
    import pyarrow
    import pyarrow.parquet

    types = {str: pyarrow.string(), float: pyarrow.float64(), int: pyarrow.int64(), bool: pyarrow.bool_()}

    def arrow_type(column: OutcomeColumn) -> Any:
        if not column.is_list:
            return types[column.type]
        items = get_type_hints(column.type)
        return pyarrow.list_(pyarrow.struct([(name, types[type_]) for name, type_ in items.items()]))

    schema = pyarrow.schema([(column.name, arrow_type(column)) for column in columns])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, ROWS_A_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))


TABLES: dict[str, Callable[[Iterator[Row], Path, Sequence[OutcomeColumn]], None] | None] = {
    ".jsonl": None,  # the journal itself, one JSON object a line
    ".csv": comma_separated,
    ".parquet": parquet,
}
