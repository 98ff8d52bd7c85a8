"""Manifests: tables with one row per image. Read them, write them, and check the images."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from normweave.atomic import write_atomically
from normweave.data.images import decode, read_mask
from normweave.data.published import differences
from normweave.data.splits import SPLITS, shared
from normweave.data.tables import NumberedRows, read_csv, refuse_repeated
from normweave.errors import DataError, ImageError, MissingError, unknown
from normweave.types import Label, Sample, Split

COLUMNS = ("image_path", "category", "subclass", "group", "split", "label", "defect", "mask_path")
"""Only image_path is required. Paths are relative to the table's own folder."""
NOTES = ("name", "verdict", "decided_at", "reviewer", "comment", "boxes")
"""Further columns, for people: they are written for reviewed images, and not read."""
ENDINGS = (".csv", ".parquet")
NORMAL_LABELS = ("good", "ok", "normal", "0")
ANOMALOUS_LABELS = ("anomalous", "bad", "defect", "1")

FaultType = Literal[
    "missing image",
    "unreadable image",
    "missing mask",
    "unreadable mask",
    "wrong mask",
    "empty mask",
    "marked normal",
    "duplicate path",
    "shared file",
    "shared group",
    "anomalous in train",
    "no good training image",
    "wrong count",
]


class Fault(NamedTuple):
    """An error in a data set that stops a run, or makes its metrics wrong."""

    type: FaultType
    path: Path | None
    """The image; None if the fault concerns the data set."""
    text: str


def read_manifest(path: str | os.PathLike[str]) -> list[Sample]:
    """Return the samples of a .csv or .parquet table, in its order.

    Labels are good, ok, normal, 0 or anomalous, bad, defect, 1. A row without label is anomalous if it has a defect,
    else normal. Errors count rows as a spreadsheet does: the header is row 1.

    Raises:
        DataError: a column is missing or given twice, or a value is invalid.
        ConfigError: a column is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such manifest. Write one with: normweave data manifest DATA -o {path.name}")
    readers = {".csv": read_csv, ".parquet": _parquet_rows}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: a manifest ends in {' or '.join(ENDINGS)}. Save the table as one of them.")
    columns, rows = readers[path.suffix.lower()](path)
    for column in columns:
        if column not in COLUMNS + NOTES:
            cure = "Rename it, or remove it; CSV is separated by commas."
            raise unknown(f"column in {path}", column, COLUMNS, cure)
    if "image_path" not in columns:
        raise DataError(f"{path}: no column image_path. Columns: {', '.join(COLUMNS)}; only image_path is required.")
    samples = [_sample(row, path.parent, f"{path}, row {number}") for number, row in rows]
    if not samples:
        raise DataError(f"{path}: no rows. Add one row per image below the header.")
    return samples


def check_ending(path: Path) -> None:
    """Check that `write_manifest` knows the ending; call it before long work.

    Raises:
        DataError: it does not.
    """
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path}: a manifest ends in {' or '.join(ENDINGS)}. Name the file so.")


def write_manifest(
    samples: Iterable[Sample],
    path: str | os.PathLike[str],
    *,
    notes: Sequence[Mapping[str, str]] | None = None,
) -> None:
    """Write the table that `read_manifest` reads back, .csv or .parquet, with paths relative to its folder.

    Args:
        notes: values of the columns `NOTES` of each sample; None: without these columns.

    Raises:
        DataError: the path has another ending, or the name of a file is not UTF-8.
    """
    path = Path(path)
    check_ending(path)
    rows = [_row(sample, path.parent) for sample in samples]
    columns = COLUMNS if notes is None else COLUMNS + NOTES
    if notes is not None:
        rows = [row | dict(note) for row, note in zip(rows, notes, strict=True)]
    for row in rows:
        for column, value in row.items():
            if not _is_text(value):
                raise DataError(
                    f"{path}: {column} {value!a} is not UTF-8, so no table can hold it. Rename the file or folder."
                )

    def write(unfinished: Path) -> None:
        if path.suffix.lower() == ".csv":
            with unfinished.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        else:
            pyarrow, parquet = _pyarrow(path)
            schema = pyarrow.schema([(column, "string") for column in columns])
            parquet.write_table(pyarrow.Table.from_pylist(rows, schema), unfinished)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def check(samples: Sequence[Sample], *, layout: str | None = None) -> list[Fault]:
    """Return all faults of the images, masks and splits. Every image is decoded, one at a time.

    Args:
        layout: name of a published data set; its categories are compared with the published numbers of images.
    """
    faults = []
    seen: set[Path] = set()
    for sample in samples:
        if sample.image_path in seen:
            text = f"{sample.image_path} has more than one row. Keep one of them."
            faults.append(Fault("duplicate path", sample.image_path, text))
            continue
        seen.add(sample.image_path)
        faults += _image_faults(sample)
        if sample.label == "anomalous" and sample.split in ("train", "calibration"):
            text = f"{sample.image_path} is anomalous and marked {sample.split}. Mark it test."
            faults.append(Fault("anomalous in train", sample.image_path, text))
    sets = {split: [sample for sample in samples if sample.split == split] for split in SPLITS}
    for found in shared(sets):
        fault: FaultType = "shared file" if found.what == "file" else "shared group"
        faults.append(Fault(fault, found.there.image_path, str(found)))
    if not any(sample.label == "normal" and sample.split in ("train", None) for sample in samples):
        text = "No row is normal and in train or without split, so training is impossible. Add good images."
        faults.append(Fault("no good training image", None, text))
    faults += [Fault("wrong count", None, text) for text in differences(samples, layout)]
    return faults


def counts(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return the numbers of good and anomalous images per category, subclass and split, sorted by name."""
    found = Counter((sample.category, sample.subclass, sample.split, sample.label) for sample in samples)
    rows = sorted({key[:3] for key in found}, key=lambda row: tuple(name or "" for name in row))
    return [
        {
            "category": category,
            "subclass": subclass,
            "split": split,
            "good": found[category, subclass, split, "normal"],
            "anomalous": found[category, subclass, split, "anomalous"],
        }
        for category, subclass, split in rows
    ]


def _image_faults(sample: Sample) -> Iterator[Fault]:
    path = sample.image_path
    try:
        height, width = decode(path).shape[:2]
    except ImageError as error:
        yield Fault("unreadable image" if path.exists() else "missing image", path, str(error))
        return
    if sample.mask_path is None:
        return
    if not sample.mask_path.exists():
        yield Fault("missing mask", path, f"{path}: its mask {sample.mask_path} does not exist. Correct the path.")
        return
    try:
        mask = read_mask(sample.mask_path, height=height, width=width)
    except DataError as error:
        yield Fault("unreadable mask" if isinstance(error, ImageError) else "wrong mask", path, str(error))
        return
    if sample.label == "anomalous" and not mask.any():
        text = f"{path} is anomalous, but no pixel of its mask {sample.mask_path} is marked. Correct the mask."
        yield Fault("empty mask", path, text)
    if sample.label == "normal" and mask.any():
        text = f"{path} is normal, but pixels of its mask {sample.mask_path} are marked. Correct the label or the mask."
        yield Fault("marked normal", path, text)


def _parquet_rows(path: Path) -> tuple[list[str], NumberedRows]:
    pyarrow, parquet = _pyarrow(path)
    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}). Write the table again.") from error
    refuse_repeated(table.column_names, path)
    return table.column_names, list(enumerate(table.to_pylist(), start=2))


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingError(
            f"{path}: Parquet needs pyarrow, which is not installed. Install it with pip install 'normweave[train]', "
            "or use a .csv manifest."
        ) from error
    return pyarrow, pyarrow.parquet


def _sample(row: Mapping[str, Any], folder: Path, where: str) -> Sample:
    values = {column: _text(row.get(column)) for column in COLUMNS}
    if not values["image_path"]:
        raise DataError(f"{where}: image_path is empty. Give the path of the image, or remove the row.")
    defect = "" if values["defect"].lower() in NORMAL_LABELS else values["defect"]
    label = _label(values["label"], defect, where)
    split = values["split"].lower()
    if split and split not in SPLITS:
        raise DataError(
            f"{where}: split is {values['split']!r}. Allowed: {', '.join(SPLITS)}, or empty to have it drawn."
        )
    return Sample(
        image_path=folder / values["image_path"],
        category=values["category"] or "default",
        subclass=values["subclass"] or None,
        group=values["group"] or None,
        split=cast(Split, split) if split else None,
        label=label,
        defect=defect or None,
        mask_path=folder / values["mask_path"] if values["mask_path"] else None,
    )


def _label(label: str, defect: str, where: str) -> Label:
    if label.lower() in ANOMALOUS_LABELS or (not label and defect):
        return "anomalous"
    if label and label.lower() not in NORMAL_LABELS:
        raise DataError(
            f"{where}: label is {label!r}. Allowed: {', '.join(NORMAL_LABELS)} for normal, "
            f"{', '.join(ANOMALOUS_LABELS)} for anomalous."
        )
    if defect:
        raise DataError(
            f"{where}: label is {label!r}, but the defect is {defect!r}. Empty one of them, or label it anomalous."
        )
    return "normal"


def _text(value: Any) -> str:
    """Return a cell as text; Parquet tables also have numbers, booleans and missing values."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    return str(value).strip()


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # Python represents other bytes of file names by surrogates
        return False
    return True


def _row(sample: Sample, folder: Path) -> dict[str, str]:
    values = {column: getattr(sample, column) or "" for column in COLUMNS}
    for column in ("image_path", "mask_path"):  # relative, with forward slashes on every system
        if values[column]:
            values[column] = Path(os.path.relpath(values[column], folder)).as_posix()
    return values
