"""Parts of `normweave predict`: which images show a part, and one verdict for each part at the end of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from normweave.atomic import write_atomically
from normweave.cli.terminal import one_line
from normweave.data.tables import encoding_of, read_csv
from normweave.errors import ConfigError, DataError, NormweaveError
from normweave.outcome.parts import PartRule, PartView, Views, check_view_bundles, judge
from normweave.outcome.table import FORMATS
from normweave.types import Outcome, PartOutcome, PartReason, ViewBundle
from normweave.validation import joined

if TYPE_CHECKING:
    from normweave.data.stored import ListedImage
    from normweave.detector import Detector

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

    Raises:
        ConfigError: an image of the list has a view and shows no part.

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
        self._bundles: dict[str, list[ViewBundle]] = {}
        for path in listed:
            self.of(path)  # a row with a view and without a part is found before the first image

    def identified(self, outcome: Outcome) -> Outcome:
        """Return the outcome with the part and the view of its image."""
        id, name = self.of(outcome.image_path or "")
        return replace(outcome, part_id=id, view=name)

    def of(self, path: str) -> Listed:
        """Return the part and the view that an image shows."""
        part, view = self._listed.get(path, Listed(None, None))
        return Listed(*self._rule.identify(path, part=part, view=view))

    def add(self, row: dict[str, Any]) -> None:
        """Count the row of an image."""
        if row.get("part_id") is not None:
            view = PartView(row["view"] or row["image_path"], row["verdict"])
            self._views.setdefault(row["part_id"], []).append(view)
            self._bundles.setdefault(row["part_id"], []).append(ViewBundle(view.view, row.get("bundle_hash")))
        else:
            self.without += 1

    def outcomes(self) -> Iterator[PartOutcome]:
        """Yield the result for each part, in the order of their first images."""
        for part, views in self._views.items():
            verdict, reasons = judge(views, self._rule.views)
            bundles = tuple(self._bundles[part])
            yield PartOutcome(part_id=part, verdict=verdict, images=len(views), reasons=reasons, bundles=bundles)


class ViewDetectors:
    """Predicts each image with the detector of its view.

    Args:
        first: of all other views, and of images that show no part.
        of_views: the detectors of views.
        parts: which view an image shows.

    Attributes:
        seen: the views of which an image came.
    """

    def __init__(self, first: Detector, of_views: Mapping[str, Detector], parts: Parts) -> None:
        self._first = first
        self._of_views = of_views
        self._parts = parts
        self.seen: set[str] = set()

    @property
    def bundle_hashes(self) -> set[str | None]:
        """The hashes of all bundles."""
        return {each.bundle_hash for each in (self._first, *self._of_views.values())}

    def of(self, image: ListedImage) -> Detector:
        """Return the detector of the view that an image shows."""
        view = self._parts.of(os.fspath(image)).view if self._of_views else None
        if view is not None and view in self._of_views:
            self.seen.add(view)
            return self._of_views[view]
        return self._first

    def stream(self, images: Iterable[ListedImage], *, maps: bool, batch_images: int) -> Iterator[Outcome]:
        """Score images in order; of `batch_images` images, those of a detector pass through its network together."""
        if not self._of_views:
            yield from self._first.stream(images, maps=maps, batch_images=batch_images)
            return
        rest = iter(images)
        while batch := list(islice(rest, batch_images)):
            chosen = [self.of(image) for image in batch]
            running = {
                id(each): each.stream(
                    [image for image, own in zip(batch, chosen, strict=True) if own is each],
                    maps=maps,
                    batch_images=batch_images,
                )
                for each in chosen
            }
            for each in chosen:
                yield next(running[id(each)])


def parse_view_bundles(texts: Sequence[str], views: Views, *, of: str = "--views") -> dict[str, Path]:
    """Return the bundle of each view from options VIEW=BUNDLE.

    Args:
        views: the expected views.
        of: the setting that has them.

    Raises:
        ConfigError: an option has another form, or names a view twice or one that is not expected.
    """
    found: dict[str, Path] = {}
    for text in texts:
        view, equals, path = text.partition("=")
        if not (view and equals and path) or view in found:
            raise ConfigError(
                f"--view-bundle must be VIEW=BUNDLE, each view once, got {text!r}. For example: "
                "--view-bundle top=top.bundle"
            )
        found[view] = Path(path)
    if wrong := check_view_bundles(found, views, what="--view-bundle", of=of):
        raise joined(wrong, source="the bundles of views")
    return found


def load_views(
    bundles: Mapping[str, Path], load: Callable[[Path], Detector], *, named: Callable[[str], str]
) -> dict[str, Detector]:
    """Return the detector of each view that has a bundle of its own.

    Args:
        named: the setting that has the bundle of a view.

    Raises:
        NormweaveError: a bundle cannot be loaded; the message begins with its setting.
    """
    found = {}
    for view, path in bundles.items():
        try:
            found[view] = load(path)
        except NormweaveError as error:
            raise type(error)(f"{named(view)}: {error}") from error
    return found


def is_table(path: Path) -> bool:
    """Return whether a list is a CSV table with parts: its first line has the names of the columns.

    A file of several columns whose name ends in .csv is a table too, so that a wrong name of a column is an error.
    """
    with path.open(encoding=encoding_of(path), errors="replace") as file:
        header = [name.strip().strip('"') for name in file.readline(10_000).split(",")]
    return all(column in header for column in COLUMNS) or (path.suffix.lower() == ".csv" and len(header) > 1)


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
    why = f": {reasons(part.reasons)}" if part.reasons else ""
    return one_line(f"{shown:<12}part {part.part_id}, {part.images} images{why}")


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
