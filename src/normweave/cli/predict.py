"""`normweave predict`: images to verdicts, one by one, so that memory does not grow with their number."""

import glob
import io
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normweave.cli import options
from normweave.cli.results import ResultWriter
from normweave.cli.terminal import ALL_NORMAL, NOT_NORMAL, UNREADABLE, Terminal, one_line
from normweave.errors import ConfigError, DataError, unknown, with_path
from normweave.outcome.table import FORMATS

if TYPE_CHECKING:
    from normweave.data.stored import ListedImage
    from normweave.detector import Detector
    from normweave.types import Outcome

STDIN = "-"


def predict(
    terminal: Terminal,
    bundle: options.Bundle,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders, patterns such as '*.png', tables (.csv, .parquet), URLs such as s3://bucket/folder, "
            "or - to read paths from stdin.",
            show_default=False,
        ),
    ] = None,
    list_: Annotated[
        Path | None,
        typer.Option("--list", help="File with paths of more images, one per line.", show_default=False),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Table of the results: .jsonl, .csv or .parquet. With --ray a folder, or its URL, for parts in this "
            "format.",
            show_default=False,
        ),
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(
            help="New folder for the anomaly maps: .npy (values) and .png (overlay).",
            show_default=False,
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="Regular expression, searched in each path: its first group in brackets is the part, a second one the "
            "view, as '([^/]+)_(.+)[.]' in photos/SN-17_front.png. Without a second group the view is the file name.",
            show_default=False,
        ),
    ] = None,
    views: Annotated[
        str | None,
        typer.Option(help="Views of each part: their number, or names such as front,back.", show_default=False),
    ] = None,
    view_bundle: Annotated[
        list[str] | None,
        typer.Option(
            help="VIEW=BUNDLE: the bundle of a view of the parts; BUNDLE is that of all others. Repeatable.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run on the same images.")] = False,
    shard: Annotated[
        str | None,
        typer.Option(help="i/n: predict every n-th image from the i-th on, for n processes.", show_default=False),
    ] = None,
    ray: options.Ray = None,
) -> int:
    """Predict images in order. Exit code 1 if an image is not normal, 4 if an image could not be read.

    Needs no torch. Each path from stdin is predicted before the next is read. With --part, or a --list with the
    columns image_path and part_id, the parts follow after the images; with --output they are in a table of their own,
    NAME_parts.SUFFIX. With --ray the results are files of 64 images or more in the folder --output; only their counts
    are printed.
    """
    if ray is not None:
        refused = {"--maps": maps, "--part": part, "--views": views, "--view-bundle": view_bundle, "--shard": shard}
        return predict_on_ray(terminal, bundle, images or [], list_, output, ray, resume=resume, refused=refused)
    from normweave.data.stored import fetched, is_url

    if output is not None and is_url(output):
        raise ConfigError(f"--output {output} is a URL, which needs --ray. Give a path, or add --ray local.")
    table = None if output is None else Path(output)

    from normweave.cli import parts as parts_of_run
    from normweave.outcome.parts import PartRule, parse_views

    rule = PartRule(part=part or "", views=parse_views(views))
    check_outputs(table, maps, resume=resume)
    if maps is not None and any(each.endswith(".parquet") for each in images or []):
        raise ConfigError("--maps needs image files, not images in a Parquet table. Leave out --maps.")
    first, step = (0, 1) if shard is None else parse_shard(shard)
    paths: Iterator[ListedImage] = islice(find_images(images or [], list_), first, None, step)
    listed = parts_of_run.read_list(list_) if list_ is not None and parts_of_run.is_table(list_) else {}
    parts = parts_of_run.Parts(rule, listed)
    if views is not None and not parts.are_named:
        raise ConfigError("--views is about parts. Name them with --part, or in the column part_id of a --list.")
    of_views = parts_of_run.parse_view_bundles(view_bundle or (), rule.views)
    if of_views and not parts.are_named:
        raise ConfigError(
            "--view-bundle is about the views of parts. Name them with --part, or in the column part_id of a --list."
        )
    if shard is not None and parts.are_named:
        raise ConfigError("--shard would divide the images of a part between runs. Leave out --shard or the parts.")

    from normweave.detector import Detector

    detector = Detector.load(bundle, threads=terminal.threads, device=terminal.device)
    others = parts_of_run.load_views(
        of_views,
        lambda path: Detector.load(path, threads=terminal.threads, device=terminal.device),
        named=lambda view: f"--view-bundle {view}",
    )
    detectors = parts_of_run.ViewDetectors(detector, others, parts)
    if maps is not None:
        maps.mkdir(parents=True, exist_ok=True)  # fails before the first image
    batch = 1 if STDIN in (images or []) else detector.batch_images
    with_maps = terminal.json or table is not None or maps is not None
    not_normal = unreadable = 0
    with ExitStack() as stack:
        writer, done, repeated = None, 0, 0
        if table is not None:
            writer = stack.enter_context(ResultWriter(table, resume=resume, bundle_hashes=detectors.bundle_hashes))
            done, not_normal, unreadable = writer.done, writer.not_normal, writer.unreadable
            # Repeat an unfinished batch, so that every image is in the same batch as without the interruption.
            repeated = done % batch
            paths = chain(writer.skip(paths, keep=repeated), paths)
        read = paths if batch == 1 else fetched(paths)
        outcomes = detectors.stream(read, maps=with_maps, batch_images=batch)
        for row in [] if writer is None else writer.rows():
            parts.add(row)
        for number, outcome in enumerate(islice(outcomes, repeated, None), done):
            outcome = parts.identified(outcome)
            row = outcome.as_dict()
            parts.add(row)
            if maps is not None and outcome.error is None:
                assert outcome.image_path is not None  # the images are files
                row["anomaly_map"] = str(save_map(maps, number, outcome, detectors.of(outcome.image_path)))
            if writer is not None:
                writer.write(row)
            if terminal.json:
                terminal.record(row)
            else:
                terminal.show(summary(outcome))
            unreadable += outcome.error is not None
            not_normal += outcome.verdict in ("anomalous", "unknown")
            done = number + 1
        if not done:
            raise DataError(
                "No image was judged, so nothing is known to be normal: no path came from stdin, or --shard has more "
                "parts than there are images. Give at least one image."
            )
    judged = list(parts.outcomes())
    for one in judged:
        if terminal.json:
            terminal.record(one.as_dict())
        else:
            terminal.show(parts_of_run.summary(one))
    if table is not None and parts.are_named:
        parts_of_run.save(table, judged)
    if parts.are_named and parts.without:
        terminal.remark(
            f"{parts.without} of {done} images show no part: --part does not match their path, or the list names none. "
            "They are in no part below."
        )
    if without := sorted(of_views.keys() - detectors.seen):
        terminal.remark(f"No image shows the view {', '.join(without)} of --view-bundle.")
    if parts.are_named and not judged:
        raise ConfigError(
            f"No image shows a part: --part {part!r} matches no path. It is searched in the path, and its group in "
            "brackets is the part. For example: '(.+)_camera[0-9]'"
        )
    not_normal += sum(one.verdict != "normal" for one in judged)
    # Unreadable images take precedence: each of them could be anomalous.
    return UNREADABLE if unreadable else NOT_NORMAL if not_normal else ALL_NORMAL


def predict_on_ray(
    terminal: Terminal,
    bundle: Path,
    images: list[str],
    list_: Path | None,
    output: str | None,
    address: str,
    *,
    resume: bool,
    refused: Mapping[str, object],
) -> int:
    """Predict images on a Ray cluster, print the counts of the verdicts and return the exit code."""
    given = [name for name, value in refused.items() if value is not None]
    if given:
        raise ConfigError(f"{given[0]} is not possible with --ray. Leave out one of them.")
    if output is None:
        raise ConfigError("--ray needs --output: the folder of the results, such as results.parquet.")
    if STDIN in images:
        raise ConfigError("--ray cannot read paths from stdin, which cannot be read again. Write them to a --list.")

    from normweave.bridges.ray import check_address
    from normweave.bridges.ray_predict import predict as predict_parts
    from normweave.bridges.ray_predict import suffix_of

    check_address(address)
    suffix_of(output)
    if list_ is not None and list_.is_file():
        from normweave.cli.parts import is_table

        if is_table(list_):
            raise ConfigError("A --list of parts is not possible with --ray. Give a list of paths alone.")
    with terminal.progress() as progress:
        counts = predict_parts(
            bundle,
            partial(find_images, images, list_),
            output=output,
            address=address,
            resume=resume,
            threads=terminal.threads or 1,
            device=terminal.device,
            progress=progress,
        )
    values = asdict(counts)
    if terminal.json:
        terminal.record({"output": output} | values)
    else:
        found = ", ".join(f"{count} {name}" for name, count in values.items() if name != "images")
        terminal.show(f"{counts.images} images: {found}. Results: {output}")
    if counts.unreadable:
        return UNREADABLE
    return NOT_NORMAL if counts.anomalous or counts.unknown else ALL_NORMAL


def parse_shard(text: str) -> tuple[int, int]:
    """Return the index of the first image and the step of a shard "i/n".

    Raises:
        ConfigError: the text is not a shard.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard must be i/n with 1 <= i <= n, such as 2/4, got {text!r}.")
    return int(match[1]) - 1, int(match[2])


def find_images(arguments: list[str], listed: Path | None = None) -> "Iterator[ListedImage]":
    """Return the images in the order of the arguments, then those of a list. Folders are sorted by path.

    A file may have any suffix. A path that does not exist is returned too, so that it is reported in its position.

    Raises:
        DataError: no image is given, a folder has no images or a link that leads nowhere, a pattern
            matches nothing, stdin is closed, or the list is no file, has no path or is not text.
    """
    from normweave.data.stored import UrlImage, in_store, in_table, is_table, is_url, tables_of

    sources: list[Iterable[ListedImage]] = []
    for argument in arguments:
        if argument == STDIN:
            sources.append(_from_stdin())
        elif is_table(argument) and (tables := tables_of(argument)):
            if not sum(len(deque(in_table(table), maxlen=1)) for table in tables):  # each is read to its end
                raise DataError(f"The table {argument} has no rows. Add one row for each image.")
            sources += map(in_table, tables)
        elif is_url(argument):
            sources.append(in_store(argument))
        elif os.path.isdir(argument):
            if not any(deque(in_folder(argument), maxlen=1)):  # to its end: a link that leads nowhere is found now
                raise DataError(f"The folder {argument} contains no image. Give a folder with images, or image files.")
            sources.append(in_folder(argument))
        elif glob.has_magic(argument) and not os.path.exists(argument):
            matches = sorted(glob.glob(argument, recursive=True))
            if not matches:
                raise DataError(f"No file matches {argument!r}. Check the pattern. ** matches any folders.")
            sources.append(matches)
        else:
            sources.append([argument])
    if listed is not None:
        if not listed.is_file():
            what = "is no regular file: pipe its paths to -" if listed.exists() else "does not exist"
            raise DataError(f"The list {listed} {what}. Give a file with the path of an image on each line.")
        if not any(deque(_listed(listed), maxlen=1)):  # read to its end, so that nothing is wrong with it later
            raise DataError(f"The list {listed} has no path. Give a file with the path of an image on each line.")
        sources.append(_listed(listed))
    if not sources:
        raise DataError("No image is given. Give files, folders, patterns, - for stdin, or --list FILE.")
    found = chain.from_iterable(sources)
    return (UrlImage(each) if isinstance(each, str) and is_url(each) else each for each in found)


def _from_stdin() -> Iterator[str]:
    if sys.stdin is None:
        raise DataError("- reads paths from stdin, but stdin is closed. Pipe paths to it, or use --list FILE.")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as Python represents file names that are not UTF-8
    return _lines(sys.stdin, "stdin")


def _listed(path: Path) -> Iterator[str]:
    from normweave.cli.parts import is_table, read_list
    from normweave.data.tables import encoding_of

    if is_table(path):
        yield from read_list(path)
        return
    encoding = encoding_of(path)
    errors = "strict" if encoding == "utf-16" else "surrogateescape"
    try:
        with path.open(encoding=encoding, errors=errors) as file:
            yield from _lines(file, str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-16 ({error}). Save the list as UTF-8.") from error


def _lines(file: Iterable[str], name: str) -> Iterator[str]:
    """Yield the path on each line that is not empty."""
    for number, text in enumerate(file, 1):
        path = text.rstrip("\r\n")
        if number == 1:
            path = path.removeprefix("\ufeff")  # the byte order mark of UTF-8
        if "\0" in path:
            raise DataError(
                f"Line {number} of {name} contains a zero byte. Allowed: one path on each line, in UTF-8. A list in "
                "UTF-16 needs a byte order mark. Save it as UTF-8."
            )
        if path:
            yield path


def in_folder(folder: str) -> Iterator[str]:
    """Yield every image below a folder, as training finds them: links are followed, hidden files left out."""
    from normweave.data.layouts import images_below

    for path in images_below(Path(folder)):
        yield os.path.join(folder, path.relative_to(folder))


def summary(outcome: "Outcome") -> str:
    """Return one line of text, for a region that follows the part with its place in pixels and degrees.

    A verdict that is not normal is in capital letters.
    """
    if outcome.error is not None:
        return one_line(f"UNREADABLE  {with_path(str(outcome.image_path), outcome.error)}")
    verdict = str(outcome.verdict)
    shown = verdict if verdict == "normal" else verdict.upper()
    mark = "uncalibrated  " if outcome.guarantee == "uncalibrated" else ""
    if outcome.shift_x is not None and outcome.shift_y is not None and outcome.rotation is not None:
        mark += f"shift {outcome.shift_x:.1f}, {outcome.shift_y:.1f}  rotation {outcome.rotation:.1f}  "
    return one_line(
        f"{shown:<10}{outcome.pred_score:>9.4f}  (threshold {outcome.threshold:.4f})  p {outcome.p_value:.4f}  "
        f"{mark}{outcome.image_path}"
    )


def check_outputs(output: Path | None, maps: Path | None, *, resume: bool = False) -> None:
    """Check the output paths before the first image is predicted."""
    if output is not None and output.suffix not in FORMATS:
        raise unknown("suffix of --output", output.suffix, FORMATS, f"Got {output}.")
    if output is not None and output.is_dir():
        raise DataError(f"{output} is a folder. Give the path of a table with --output.")
    if resume and output is None:
        raise ConfigError("--resume needs a table of an interrupted run. Give its path with --output.")
    if maps is not None and maps.exists() and (not maps.is_dir() or (any(maps.iterdir()) and not resume)):
        raise DataError(f"{maps} is not empty: the maps of two runs would mix. Give a new folder with --maps.")


def save_map(folder: Path, number: int, outcome: "Outcome", detector: "Detector") -> Path:
    """Save an anomaly map as .npy and as a .png overlay on the image, and return the path of the .npy file.

    File names consist of the number of the image in the run and its name, so that they are unique. Pixels above the
    threshold of the boxes are coloured, and the region of interest has a blue edge.
    """
    import numpy as np
    from PIL import Image

    from normweave.data.images import decode
    from normweave.data.stored import from_json
    from normweave.maps.overlay import overlay

    assert outcome.anomaly_map is not None  # `stream` was called with maps=True
    assert outcome.image_path is not None  # the images are files
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(outcome.image_path).stem)[:80]
    path = folder / f"{number:06d}-{stem}.npy"
    np.save(path, outcome.anomaly_map, allow_pickle=False)
    threshold, inside = detector.box_threshold(outcome), detector.regions.inside(outcome)
    image = overlay(decode(from_json(outcome.image_path)), outcome.anomaly_map, threshold=threshold, inside=inside)
    Image.fromarray(image).save(path.with_suffix(".png"))
    return path
