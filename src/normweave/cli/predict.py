"""`normweave predict`: images to verdicts, one after the other, however many there are."""

import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normweave.cli import options
from normweave.cli.journal import TABLES, Journal
from normweave.cli.terminal import ALL_NORMAL, NOT_NORMAL, UNREADABLE, Terminal, command
from normweave.errors import ConfigError, DataError, unknown

if TYPE_CHECKING:
    from normweave.types import Outcome

STDIN = "-"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "predict")(predict)


def predict(
    terminal: Terminal,
    bundle: options.Bundle,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders, patterns as '*.png', or - for paths from stdin.", show_default=False
        ),
    ] = None,
    list_: Annotated[
        Path | None,
        typer.Option("--list", help="File with the paths of more images, one a line.", show_default=False),
    ] = None,
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the table of an interrupted call of the same images.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            help="i/n: every n-th image only, from the i-th on; for n processes.", show_default=False
        ),
    ] = None,
) -> int:
    """Judge images: a line each, in their order. Exit code 1 if one is not normal, 4 if one could not be read.

    Needs no torch. Paths from stdin are answered one by one, before the next is read.
    """
    check_places(output, maps, resume=resume)
    first, step = (0, 1) if shard is None else share(shard)
    paths: Iterator[str] = islice(find(images or [], list_), first, None, step)

    from normweave.detector import Detector

    runtime = Detector.load(bundle, threads=terminal.threads, device=terminal.device)
    batch = 1 if STDIN in (images or []) else runtime.batch_images
    full = terminal.json or output is not None or maps is not None
    found = unreadable = 0
    with ExitStack() as stack:
        journal, done, again = None, 0, 0
        if output is not None:
            journal = stack.enter_context(Journal(output, resume=resume, bundle_hash=runtime.bundle_hash))
            done, found, unreadable = journal.done, journal.not_normal, journal.unreadable
            # Back to where the batch began: so every image is judged in the company that it would have had.
            again = done % batch
            paths = chain(journal.skip(paths, keep=again), paths)
        outcomes = runtime.stream(paths, maps=full, batch_images=batch)
        for number, outcome in enumerate(islice(outcomes, again, None), done):
            row = outcome.as_dict()
            if maps is not None and outcome.error is None:
                row["anomaly_map"] = str(save_map(maps, number, outcome))
            if journal is not None:
                journal.write(row)
            if terminal.json:
                terminal.record(row)
            else:
                terminal.show(line(outcome))
            unreadable += outcome.error is not None
            found += outcome.verdict in ("anomalous", "unknown")
    # Incomplete results are told apart first: an image that nobody saw may be anomalous too.
    return UNREADABLE if unreadable else NOT_NORMAL if found else ALL_NORMAL


def share(text: str) -> tuple[int, int]:
    """The first image and the step of a shard "i/n".

    Raises:
        ConfigError: it is none.
    """
    given = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if given is None or not 1 <= int(given[1]) <= int(given[2]):
        raise ConfigError(f"--shard must be i/n with 1 <= i <= n, as 2/4, got {text!r}.")
    return int(given[1]) - 1, int(given[2])


def find(arguments: list[str], listed: Path | None = None) -> Iterator[str]:
    """The images that the arguments name, in their order, then those of a list; those of a folder sorted by path.

    A file is taken whatever its ending; what is no file is passed on too, so that it is reported in its place.

    Raises:
        DataError: nothing is named, a folder without images, a pattern that nothing matches, or a list that cannot be
            read; before the first image is opened.
    """
    sources: list[Iterable[str]] = []
    for argument in arguments:
        if argument == STDIN:
            sources.append(_lines(sys.stdin))
        elif os.path.isdir(argument):
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
    if listed is not None:
        if not listed.is_file():
            raise DataError(f"There is no list {listed}. Name a file with the path of an image on each line.")
        sources.append(_listed(listed))
    if not sources:
        raise DataError("No image is named. Give files, folders, patterns, - for stdin, or --list FILE.")
    return chain.from_iterable(sources)


def _listed(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        yield from _lines(file)


def _lines(file: Iterable[str]) -> Iterator[str]:
    """One path a line; empty lines are none."""
    for text in file:
        if path := text.rstrip("\r\n"):
            yield path


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


def check_places(output: Path | None, maps: Path | None, *, resume: bool = False) -> None:
    """Refuse places that cannot be written to before any image is judged."""
    if output is not None and output.suffix not in TABLES:
        raise unknown("ending of a table", output.suffix, TABLES, f"Got {output}.")
    if resume and output is None:
        raise ConfigError("--resume goes on with a table. Name it with --output.")
    if maps is not None and maps.exists() and (not maps.is_dir() or (any(maps.iterdir()) and not resume)):
        raise DataError(f"{maps} is not empty; maps of two runs would mix. Name a new folder for --maps.")


# ── maps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_map(folder: Path, number: int, outcome: "Outcome") -> Path:
    """Keep a map as numbers, and as a picture laid over the image; the path of the numbers.

    Files are called after the image and numbered in the order of the run, so that no two have the same name.
    """
    import numpy as np
    from PIL import Image

    from normweave.data.images import decode
    from normweave.maps.overlay import overlay

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
