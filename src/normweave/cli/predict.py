"""`normweave predict`: images to verdicts, one after the other, however many there are."""

import csv
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normweave.cli import options
from normweave.cli.terminal import ALL_NORMAL, NOT_NORMAL, UNREADABLE, Terminal, command
from normweave.errors import DataError, unknown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from normweave.types import Outcome

Row = dict[str, Any]
ROWS_A_GROUP = 1000


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "predict")(predict)


def predict(
    terminal: Terminal,
    bundle: options.Bundle,
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, or patterns as '*.png'.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Table to write: .jsonl, .csv or .parquet.", show_default=False),
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(
            help="New folder for the anomaly maps: .npy with the numbers, .png to look at.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Judge images: a line each, in their order. Exit code 1 if one is not normal, 4 if one could not be read."""
    check_places(output, maps)
    paths = find(images)

    from normweave.detector import Detector

    detector = Detector.load(bundle, device=terminal.device)
    full = terminal.json or output is not None or maps is not None
    found = unreadable = 0
    with ExitStack() as stack:
        write = None if output is None else stack.enter_context(table(output))
        for number, outcome in enumerate(detector.stream(paths, maps=full)):
            row = outcome.as_dict()
            if maps is not None and outcome.error is None:
                row["anomaly_map"] = str(save_map(maps, number, outcome))
            if write is not None:
                write(row)
            if terminal.json:
                terminal.record(row)
            else:
                terminal.show(line(outcome))
            unreadable += outcome.error is not None
            found += outcome.verdict in ("anomalous", "unknown")
    # Incomplete results are told apart first: an image that nobody saw may be anomalous too.
    return UNREADABLE if unreadable else NOT_NORMAL if found else ALL_NORMAL


def find(arguments: list[str]) -> Iterator[str]:
    """The images that the arguments name, in their order; those of a folder sorted by path.

    A file is taken whatever its ending; what is no file is passed on too, so that it is reported in its place.

    Raises:
        DataError: a folder without images, or a pattern that nothing matches; before the first image is opened.
    """
    sources: list[Iterable[str]] = []
    for argument in arguments:
        if os.path.isdir(argument):
            if next(in_folder(argument), None) is None:
                raise DataError(
                    f"{argument} holds no image. Name a folder with images, or the files themselves."
                )
            sources.append(in_folder(argument))
        elif glob.has_magic(argument) and not os.path.exists(argument):
            matches = sorted(glob.glob(argument, recursive=True))
            if not matches:
                raise DataError(
                    f"Nothing matches {argument!r}. Check the pattern; ** stands for any folders."
                )
            sources.append(matches)
        else:
            sources.append([argument])
    return chain.from_iterable(sources)


def in_folder(folder: str) -> Iterator[str]:
    """Every image below a folder; what is hidden is left out."""
    from normweave.data.layouts import IMAGES

    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(IMAGES):
                yield os.path.join(place, name)


def line(outcome: "Outcome") -> str:
    """What a person reads of one image; what needs looking at stands in capitals."""
    if outcome.error is not None:
        return f"UNREADABLE  {outcome.image_path}: {outcome.error}"
    verdict = str(outcome.verdict)
    shown = verdict if verdict == "normal" else verdict.upper()
    return (
        f"{shown:<10}{outcome.pred_score:>9.4f}  (threshold {outcome.threshold:.4f})  p {outcome.p_value:.4f}  "
        f"{outcome.image_path}"
    )


def check_places(output: Path | None, maps: Path | None) -> None:
    """Refuse places that cannot be written to before any image is judged."""
    if output is not None and output.suffix not in TABLES:
        raise unknown("ending of a table", output.suffix, TABLES, f"Got {output}.")
    if maps is not None and maps.exists() and (not maps.is_dir() or any(maps.iterdir())):
        raise DataError(f"{maps} is not empty; maps of two runs would mix. Name a new folder for --maps.")


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def table(path: Path) -> Iterator[Callable[[Row], object]]:
    """A function that writes one row; the table has its name when all are written, and none before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with TABLES[path.suffix](partial) as write:
            yield write
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def jsonl(path: Path) -> Iterator[Callable[[Row], object]]:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        yield lambda row: file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def comma_separated(path: Path) -> Iterator[Callable[[Row], object]]:
    """Experts and boxes are JSON in their columns."""
    from normweave.types import Outcome

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(Outcome(image_path=None).as_dict()))
        writer.writeheader()
        yield lambda row: writer.writerow(
            {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
        )


@contextmanager
def parquet(path: Path) -> Iterator[Callable[[Row], object]]:
    """Row groups of a thousand, so that a run of any length fits into memory."""
    import pyarrow
    import pyarrow.parquet

    text, number, whole = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    expert = pyarrow.struct([("name", text), ("weight", number)])
    box = pyarrow.struct([("x", whole), ("y", whole), ("width", whole), ("height", whole), ("peak", number)])
    schema = pyarrow.schema(
        [
            ("image_path", text),
            ("verdict", text),
            ("pred_score", number),
            ("p_value", number),
            ("threshold", number),
            ("false_alarm_rate", number),
            ("category", text),
            ("subclass", text),
            ("subclass_distance", number),
            ("subclass_p_value", number),
            ("unseen", pyarrow.bool_()),
            ("experts", pyarrow.list_(expert)),
            ("adapted", pyarrow.bool_()),
            ("boxes", pyarrow.list_(box)),
            ("anomaly_map", text),
            ("height", whole),
            ("width", whole),
            ("latency_ms", number),
            ("model", text),
            ("bundle_hash", text),
            ("error", text),
        ]
    )
    rows: list[Row] = []
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:

        def write(row: Row) -> None:
            rows.append(row)
            if len(rows) == ROWS_A_GROUP:
                flush()

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            rows.clear()

        yield write
        flush()


TABLES = {".jsonl": jsonl, ".csv": comma_separated, ".parquet": parquet}


# ── maps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_map(folder: Path, number: int, outcome: "Outcome") -> Path:
    """Keep a map as numbers, and as a picture laid over the image; the path of the numbers.

    Files are called after the image and numbered in the order of the run, so that no two have the same name.
    """
    import numpy as np
    from PIL import Image

    from normweave.data.images import decode

    assert outcome.anomaly_map is not None  # the stream was asked for maps
    assert outcome.image_path is not None  # images of the command line are files
    assert outcome.threshold is not None
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(outcome.image_path).stem)[:80]
    path = folder / f"{number:06d}-{stem}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(path, outcome.anomaly_map, allow_pickle=False)
    picture = overlay(decode(outcome.image_path), outcome.anomaly_map, threshold=outcome.threshold)
    Image.fromarray(picture).save(path.with_suffix(".png"))
    return path


def overlay(
    image: "NDArray[np.uint8]", anomaly_map: "NDArray[np.float32]", *, threshold: float
) -> "NDArray[np.uint8]":
    """The image (H, W, 3) in grey, and what lies above the threshold in yellow to red over it."""
    import numpy as np

    grey = image.mean(axis=2, keepdims=True)
    span = max(threshold - float(anomaly_map.min()), 1e-12)
    beyond = np.clip((anomaly_map - threshold) / span, 0, 1)[
        ..., None
    ]  # 0 at the threshold, 1 as far above it again
    colour = np.concatenate([np.full_like(beyond, 255), 220 * (1 - beyond), np.zeros_like(beyond)], axis=2)
    mixed = np.where(anomaly_map[..., None] > threshold, 0.5 * grey + 0.5 * colour, grey)
    return np.broadcast_to(mixed, image.shape).round().astype(np.uint8)
