"""Read CSV tables as spreadsheets save them: UTF-8 with or without a byte order mark, or UTF-16 with one."""

from __future__ import annotations

import codecs
import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normweave.errors import DataError

NumberedRows = list[tuple[int, dict[str | Any, Any]]]
"""Rows with their line numbers, counted as a spreadsheet does: the header is row 1."""


def encoding_of(path: Path) -> str:
    """Return the encoding of a text file: UTF-16 if it starts with the byte order mark of UTF-16, else UTF-8."""
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def read_csv(path: Path, *, required: Sequence[str] = ()) -> tuple[list[str], NumberedRows]:
    """Return the columns and rows of a table separated by commas. A missing value at the end of a row is None.

    Args:
        required: columns that the table must have.

    Raises:
        DataError: it cannot be read, a required column is missing, a column is given twice, or a row has more values
            than the header.
    """
    try:
        with path.open(newline="", encoding=encoding_of(path)) as file:
            reader = csv.DictReader(file, strict=True)
            rows: NumberedRows = [(reader.line_num, row) for row in reader]
            columns = list(reader.fieldnames or ())
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error}). Save it as UTF-8, separated by commas.") from error
    refuse_repeated(columns, path)
    if any(column not in columns for column in required):
        raise DataError(
            f"{path}: columns are {', '.join(columns) or '(none)'}. It needs {', '.join(required)}, separated by "
            "commas. Correct the header."
        )
    for number, row in rows:
        if None in row:
            raise DataError(
                f"{path}, row {number}: more values than the header has columns. Put values with commas in quotes."
            )
    return columns, rows


def refuse_repeated(columns: Sequence[str], path: Path) -> None:
    """Raise DataError if a column is given twice: only one of its values could be read."""
    if repeated := [column for column, count in Counter(columns).items() if count > 1]:
        raise DataError(f"{path}: column {repeated[0]!r} is given more than once. Keep one of them.")
