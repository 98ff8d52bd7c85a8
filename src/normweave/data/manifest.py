"""The table everything becomes, a row an image: reading, writing, and what may be wrong with it."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from normweave.data.images import decode, read_mask
from normweave.data.published import differences
from normweave.data.splits import shared
from normweave.errors import DataError, ImageError, MissingError, unknown
from normweave.types import Label, Sample, Split

COLUMNS = ("image_path", "category", "subclass", "group", "split", "label", "defect", "mask_path")
"""Only image_path is required. Paths are relative to the table's own folder."""
ENDINGS = (".csv", ".parquet")
NORMAL_WORDS = ("good", "ok", "normal", "0")
ANOMALOUS_WORDS = ("anomalous", "bad", "defect", "1")
SPLITS = ("train", "calibration", "test")

FaultKind = Literal[
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
    """Something in a data set that will stop a run, or make its numbers wrong."""

    kind: FaultKind
    path: Path | None
    """The image; None where it is a fault of the whole set."""
    text: str


def read_manifest(path: str | os.PathLike[str]) -> list[Sample]:
    """The samples of a .csv or .parquet table, in its order.

    Labels may be written good, ok, normal, 0 or anomalous, bad, defect, 1. A row without label is anomalous if it names
    a defect, else normal. Rows are counted as a spreadsheet shows them: the header is row 1.

    Raises DataError where a column or a value is not what it must be; ConfigError where a column is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such manifest. Write one with: normweave data manifest DATA -o {path.name}"
        )
    readers = {".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: a manifest ends in {' or '.join(ENDINGS)}. Save the table as one of them.")
    columns, rows = readers[path.suffix.lower()](path)
    for column in columns:
        if column not in COLUMNS:
            raise unknown(
                f"column in {path}",
                column,
                COLUMNS,
                "Rename it, or leave it out; CSV is separated by commas.",
            )
    if "image_path" not in columns:
        raise DataError(
            f"{path}: no column image_path. Columns: {', '.join(COLUMNS)}; only image_path is required."
        )
    samples = [_sample(row, path.parent, f"{path}, row {number}") for number, row in rows]
    if not samples:
        raise DataError(f"{path}: no rows. A manifest has one row an image below its header.")
    return samples


def write_manifest(samples: Iterable[Sample], path: str | os.PathLike[str]) -> None:
    """Write the table that `read_manifest` reads back, .csv or .parquet, with paths relative to its folder."""
    path = Path(path)
    rows = [_row(sample, path.parent) for sample in samples]
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path}: a manifest ends in {' or '.join(ENDINGS)}. Name the file so.")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        if path.suffix.lower() == ".csv":
            with unfinished.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        else:
            pyarrow, parquet = _pyarrow(path)
            parquet.write_table(
                pyarrow.Table.from_pylist(rows, pyarrow.schema([(c, "string") for c in COLUMNS])), unfinished
            )
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check(samples: Sequence[Sample], *, layout: str | None = None) -> list[Fault]:
    """Everything that is wrong with the images, masks and splits; decodes all of them, one at a time.

    Args:
        layout: the data set that it is said to be: its categories are counted against the published numbers.
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
        faults.append(
            Fault(
                "shared file" if found.what == "file" else "shared group", found.there.image_path, str(found)
            )
        )
    if not any(sample.label == "normal" and sample.split in ("train", None) for sample in samples):
        text = "No row is normal and in train (or without split): there is nothing to learn from. Add good images."
        faults.append(Fault("no good training image", None, text))
    faults += [Fault("wrong count", None, text) for text in differences(samples, layout)]
    return faults


def counts(samples: Sequence[Sample]) -> list[dict[str, str | int | None]]:
    """How many good and anomalous images each category and subclass has in each split, in the order of their names."""
    found = Counter((sample.category, sample.subclass, sample.split, sample.label) for sample in samples)
    places = sorted({key[:3] for key in found}, key=lambda place: tuple(name or "" for name in place))
    return [
        {
            "category": category,
            "subclass": subclass,
            "split": split,
            "good": found[category, subclass, split, "normal"],
            "anomalous": found[category, subclass, split, "anomalous"],
        }
        for category, subclass, split in places
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
        yield Fault(
            "missing mask", path, f"{path}: its mask {sample.mask_path} does not exist. Correct the path."
        )
        return
    try:
        mask = read_mask(sample.mask_path, height=height, width=width)
    except DataError as error:
        kind: FaultKind = "unreadable mask" if isinstance(error, ImageError) else "wrong mask"
        yield Fault(kind, path, str(error))
        return
    if sample.label == "anomalous" and not mask.any():
        yield Fault(
            "empty mask", path, f"{path} is anomalous, but no pixel of its mask {sample.mask_path} is marked."
        )
    if sample.label == "normal" and mask.any():
        yield Fault(
            "marked normal", path, f"{path} is normal, but pixels of its mask {sample.mask_path} are marked."
        )


NumberedRows = list[tuple[int, dict[str | Any, Any]]]


def _csv_rows(path: Path) -> tuple[list[str], NumberedRows]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            rows: NumberedRows = [(reader.line_num, row) for row in reader]
            columns = list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: cannot be read as CSV ({error}). Save it as UTF-8, separated by commas."
        ) from error
    for number, row in rows:
        if None in row:
            raise DataError(
                f"{path}, row {number}: more values than the header has columns. Put values with commas in quotes."
            )
    return columns, rows


def _parquet_rows(path: Path) -> tuple[list[str], NumberedRows]:
    pyarrow, parquet = _pyarrow(path)
    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}). Write the table again.") from error
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
        raise DataError(f"{where}: image_path is empty. Every row names an image.")
    defect = "" if values["defect"].lower() in NORMAL_WORDS else values["defect"]
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


def _label(word: str, defect: str, where: str) -> Label:
    if word.lower() in ANOMALOUS_WORDS or (not word and defect):
        return "anomalous"
    if word and word.lower() not in NORMAL_WORDS:
        raise DataError(
            f"{where}: label is {word!r}. Allowed: {', '.join(NORMAL_WORDS)} for normal, {', '.join(ANOMALOUS_WORDS)} "
            "for anomalous."
        )
    if defect:
        raise DataError(
            f"{where}: label is {word!r}, but the defect is {defect!r}. Empty one of them, or label it anomalous."
        )
    return "normal"


def _text(value: Any) -> str:
    """A cell as CSV would hold it; Parquet gives numbers, truth values and missing ones too."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    return str(value).strip()


def _row(sample: Sample, folder: Path) -> dict[str, str]:
    values = {
        "image_path": _relative(sample.image_path, folder),
        "category": sample.category,
        "subclass": sample.subclass,
        "group": sample.group,
        "split": sample.split,
        "label": sample.label,
        "defect": sample.defect,
        "mask_path": _relative(sample.mask_path, folder) if sample.mask_path else None,
    }
    return {column: value or "" for column, value in values.items()}


def _relative(path: Path, folder: Path) -> str:
    """With forward slashes on every system."""
    return Path(os.path.relpath(path, folder)).as_posix()
