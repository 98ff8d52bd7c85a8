"""Parts of `normweave predict`: which images show a part, and one verdict for each part at the end of a run."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from normweave.atomic import write_atomically
from normweave.data.tables import encoding_of, read_csv
from normweave.errors import DataError
from normweave.outcome.parts import PartRule, PartView, judge
from normweave.outcome.table import FORMATS
from normweave.types import Outcome, PartOutcome, PartReason

COLUMNS = ("image_path", "part_id")
"""Columns that make a list a table; `view` is optional."""


class Listed(NamedTuple):
    """The part of an image in a list."""

    part: str | None
    view: str | None


class Parts:
    """The images of each part of a run, about a kilobyte for each part. A part may come in any order.

    Args:
        listed: the part of each path of a list.

    Attributes:
        are_named: whether images can show a part.
        without: number of images that show none.
    """

    def __init__(self, rule: PartRule, listed: dict[str, Listed]) -> None:
        self._rule = rule
        self._listed = listed
        self.are_named = bool(rule.part) or any(one.part for one in listed.values())
        self.without = 0
        self._views: dict[str, list[PartView]] = {}

    def identified(self, outcome: Outcome) -> Outcome:
        """Return the outcome with the part and the view of its image."""
        path = outcome.image_path or ""
        part, view = self._listed.get(path, Listed(None, None))
        id, name = self._rule.identify(path, part=part, view=view)
        return replace(outcome, part_id=id, view=name)

    def add(self, row: dict[str, Any]) -> None:
        """Count the row of an image."""
        if row.get("part_id") is not None:
            view = PartView(row["view"] or row["image_path"], row["verdict"])
            self._views.setdefault(row["part_id"], []).append(view)
        else:
            self.without += 1

    def outcomes(self) -> Iterator[PartOutcome]:
        """Yield the result for each part, in the order of their first images."""
        for part, views in self._views.items():
            verdict, reasons = judge(views, self._rule.views)
            yield PartOutcome(part_id=part, verdict=verdict, images=len(views), reasons=reasons)


def is_table(path: Path) -> bool:
    """Return whether a list is a CSV table with parts: its first line has the names of the columns."""
    with path.open(encoding=encoding_of(path), errors="replace") as file:
        header = [name.strip().strip('"') for name in file.readline(10_000).split(",")]
    return all(column in header for column in COLUMNS)


def read_list(path: Path) -> dict[str, Listed]:
    """Return the part of each image of a table; paths are relative to its folder.

    Raises:
        DataError: the table cannot be read, or an image has more than one row.
    """
    found: dict[str, Listed] = {}
    for number, row in read_csv(path, required=COLUMNS)[1]:
        image = os.path.join(path.parent, row["image_path"] or "")
        if not row["image_path"] or image in found:
            raise DataError(
                f"{path}, row {number}: image_path is {row['image_path']!r}. Each image needs one row with its path."
            )
        found[image] = Listed(row["part_id"] or None, row.get("view") or None)
    return found


def summary(part: PartOutcome) -> str:
    """Return one line of text. A verdict that is not normal is in capital letters."""
    shown = part.verdict if part.verdict == "normal" else part.verdict.upper()
    return f"{shown:<12}part {part.part_id}, {part.images} images{': ' if part.reasons else ''}{reasons(part.reasons)}"


def reasons(given: tuple[PartReason, ...]) -> str:
    """Return the reasons as text."""
    return ", ".join(f"{one.view or 'a view'} {one.reason}" for one in given)


def save(table: Path, parts: list[PartOutcome]) -> None:
    """Write the parts to a table beside that of the images, in the same format: NAME_parts.SUFFIX."""
    rows = (part.as_dict() for part in parts)
    write = FORMATS[table.suffix]

    def write_lines(path: Path) -> None:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")

    def write_table(path: Path) -> None:
        assert write is not None  # else these are lines
        write(rows, path, PartOutcome.columns())

    path = table.with_name(f"{table.stem}_parts{table.suffix}")
    write_atomically(path, write_lines if write is None else write_table)
