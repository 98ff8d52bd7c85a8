"""Tables of outcomes as JSON lines, CSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

if TYPE_CHECKING:
    from normweave.types import OutcomeColumn

Row = dict[str, Any]
ROWS_A_GROUP = 1000


def json_line(row: Row) -> bytes:
    r"""Return a row as a line of JSON. A file name that is not UTF-8 keeps its bytes as JSON escapes (\udcff)."""
    try:
        line = json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # Python represents bytes that are not UTF-8 by surrogates
        line = json.dumps(row, allow_nan=False).encode()
    return line + b"\n"


def readable(value: Any) -> Any:
    r"""Return the value with bytes of file names that are not UTF-8 written as escapes (\udcff), as in JSON."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [readable(item) for item in value]
    return {name: readable(item) for name, item in value.items()} if isinstance(value, dict) else value


def write_csv(rows: Iterator[Row], path: Path, columns: Sequence[OutcomeColumn]) -> None:
    """Write a CSV file with these columns. Lists are JSON in their cells."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in columns])
        writer.writeheader()
        for row in map(readable, rows):
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
        while group := list(islice(map(readable, rows), ROWS_A_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))


FORMATS: dict[str, Callable[[Iterator[Row], Path, Sequence[OutcomeColumn]], None] | None] = {
    ".jsonl": None,  # the lines themselves
    ".csv": write_csv,
    ".parquet": write_parquet,
}
