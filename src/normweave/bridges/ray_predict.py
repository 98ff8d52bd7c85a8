"""Predict images on many machines with Ray Data: each task scores some consecutive images and writes them as one part.

A task reads, decodes, scores and writes, so that pixels do not pass between processes and as many images are in memory
as tasks run. A part is a whole number of batches: each image is in the same batch as without Ray, and has the same
scores. It is written completely or not at all, under the number of its first image. A part that exists is read instead
of scored, also after the loss of a node or of the cluster: each image has exactly one row. An image that ends the
process that decodes it has its error, as one that cannot be read.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from normweave import __version__, bundle
from normweave.bridges import ray as session
from normweave.bridges import ray_tasks
from normweave.data import images as image_files
from normweave.data import stored
from normweave.data.stored import Folder, ListedImage
from normweave.detector import Detector
from normweave.errors import DataError, ImageError, MissingError, NormweaveError, unknown
from normweave.outcome.table import Row, json_line, readable, write_parquet
from normweave.record import parse_record
from normweave.types import Outcome, Progress

FEWEST_PART_IMAGES, MOST_PART_IMAGES = 64, 256
"""Images of a part, before they are rounded up to whole batches: what the loss of a worker costs, and what one file
contains. A part costs 50 to 80 ms of processor time beside its images, so that larger ones are faster."""
PARTS_EACH = 12
"""A part has fewer than `MOST_PART_IMAGES` images if each processor would otherwise have fewer parts than this: at the
end of a run, processors wait for those that score the last parts."""
WINDOW = 2**17
"""Images whose paths are in memory at once; the parts of one window are finished before those of the next begin."""
RUN = "_run.json"
"""What the parts of a folder belong to."""
COMPLETE = "_complete.json"
"""The counts of a finished run."""
SUFFIXES = (".jsonl", ".parquet")
LOSSES = 2
"""After this many losses of its process on a node, the images of a part are first decoded in a process of their own."""
MOST_LOSSES = 4
"""After this many losses on a node, the run ends. Ray itself repeats a task for ever."""

_detectors: dict[tuple[Any, ...], Detector] = {}  # of this worker process


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many images have each verdict."""

    images: int = 0
    normal: int = 0
    anomalous: int = 0
    unknown: int = 0
    unreadable: int = 0

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Counts:
        """Count rows."""
        result = cls()
        for row in rows:
            name = "unreadable" if row["error"] is not None else row["verdict"]
            result = replace(result, images=result.images + 1, **{name: getattr(result, name) + 1})
        return result

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})


class Job(NamedTuple):
    """What every task is given."""

    run: str  # a name of its own
    files: Any  # reference to the files of the bundle by name
    bundle_hash: str
    output: str
    suffix: str
    current_folder: str
    threads: int
    device: str
    versions: dict[str, str]
    batch: int


def predict(
    folder: Path,
    list_images: Callable[[], Iterator[ListedImage]],
    *,
    output: str,
    address: str,
    resume: bool = False,
    threads: int = 1,
    device: str = "auto",
    part_images: int | None = None,
    progress: Progress | None = None,
) -> Counts:
    """Predict images by a bundle, and write their rows as parts of a folder.

    Args:
        folder: the bundle. It is copied to the workers.
        list_images: returns the images, the same ones at every call. A function of a module, or a partial of one.
        output: path or URL of the folder of the parts. It ends in .jsonl or .parquet, the format of the parts.
        address: of the cluster; see `ray.run`.
        resume: continue an interrupted run.
        threads: processors of a task.
        device: as in `Detector.load`.
        part_images: images of a part, rounded up to whole batches; None: as many as suit the number of images and
            processors. An interrupted run keeps its own.

    Raises:
        DataError: the folder has results and `resume` is false, they are of other images, or there is no image.
        BundleError: they are of another bundle, or the bundle cannot be used.
        MissingError: Ray, a cluster or a package is missing.
    """
    target = Folder(output)
    record = bundle.read(folder)
    bundle_hash = bundle.bundle_hash(folder)
    begun = _begun(target, resume=resume)
    if begun is not None and begun["bundle_hash"] != bundle_hash:
        raise DataError(
            f"{output} was written with another bundle ({begun['bundle_hash']:.12}…, this is {bundle_hash:.12}…). "
            "Resume with that bundle, or give a new folder."
        )
    list_images()  # what is wrong with the arguments is found before a cluster is started
    job = Job(
        run=uuid.uuid4().hex,
        files={name: bundle.read_file(folder, name) for name in bundle.files(folder)}
        | {bundle.RECORD: Path(folder, bundle.RECORD).read_bytes()},
        bundle_hash=bundle_hash,
        output=output if stored.is_url(output) else os.path.abspath(output),
        suffix=suffix_of(output),
        current_folder=os.getcwd(),
        threads=threads,
        device=device,
        versions=versions(),
        batch=parse_record(record, where=folder)["config"].features.batch_images,
    )
    wanted = part_images if begun is None else begun["part_images"]
    return session.run(address, _predict, job, list_images, wanted, progress=progress)


def suitable_part(images: int, at_once: int) -> int:
    """Return how many images a part has.

    Args:
        images: of the run, up to `WINDOW`.
        at_once: tasks that run at the same time.
    """
    return min(max(FEWEST_PART_IMAGES, images // (PARTS_EACH * max(1, at_once))), MOST_PART_IMAGES)


def suffix_of(output: str) -> str:
    """Return the suffix of a folder of parts.

    Raises:
        ConfigError: parts have no such format.
    """
    suffix = os.path.splitext(output.rstrip("/"))[1]
    if suffix not in SUFFIXES:
        raise unknown("suffix of --output", suffix, SUFFIXES, f"Got {output}. With --ray it is a folder of parts.")
    return suffix


def versions() -> dict[str, str]:
    """Return the versions on which scores depend."""
    return {"normweave": __version__} | {name: version(name) for name in ("numpy", "onnxruntime", "pillow")}


def check_versions(wanted: dict[str, str]) -> None:
    """Raise MissingError if a worker has other versions than the machine of the command."""
    if (own := versions()) != wanted:
        raise MissingError(
            f"The worker {socket.gethostname()} has {own}, and the machine of the command {wanted}. Install the same "
            "versions on every node, so that scores do not depend on the node."
        )


def check_visible(file: str) -> None:
    """Raise DataError if a worker does not see a file that the machine of the command sees; empty: no file."""
    if file and not os.path.exists(file):
        raise DataError(
            f"The worker {socket.gethostname()} does not see {file}, which the machine of the command does. Mount the "
            "folder under the same path on every node, or read the images from a store (s3://…)."
        )


def check_losses(losses: int, images: Sequence[ListedImage]) -> None:
    """Raise NormweaveError if a node has lost too many processes with the same part."""
    if losses >= MOST_LOSSES:
        raise NormweaveError(
            f"{losses} processes of {socket.gethostname()} ended while they scored the {len(images)} images from "
            f"{os.fspath(images[0])} on, and each image can be decoded. If memory is short, give each task more "
            "processors (--threads), so that fewer run at once. Then resume."
        )


def _begun(target: Folder, *, resume: bool) -> dict[str, Any] | None:
    """Return what the parts of a folder belong to; None: there are none."""
    if not stored.is_url(target.where) and os.path.isfile(target.where):
        raise DataError(
            f"{target.where} is a file, and with --ray the results are a folder of parts. Give a new folder."
        )
    names = [name for name in target.names() if not name.startswith(".")]
    if COMPLETE in names:
        cure = "Leave out --resume, and give a new folder." if resume else "Give a new folder, or remove this one."
        raise DataError(f"{target.where} is complete. {cure}")
    if names and not resume:
        raise DataError(
            f"{target.where} contains {names[0]}, as of an interrupted run. Resume it (--resume), or give a new folder."
        )
    if not names:
        return None
    try:
        begun: dict[str, Any] = json.loads(target.read(RUN) or b"")
        return {"bundle_hash": str(begun["bundle_hash"]), "part_images": int(begun["part_images"])}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{target.where} contains {names[0]}, but no readable {RUN}. Give a new folder.") from error


# ── in the process that is connected to the cluster ──────────────────────────────────────────────────────────────────


def _predict(
    progress: Progress, job: Job, list_images: Callable[[], Iterator[ListedImage]], part_images: int | None
) -> Counts:
    """Score every part and return the counts of all images.

    Args:
        part_images: as in `predict`.
    """
    import ray

    machines = session.resources()
    session.check_resources(machines, threads=job.threads, device=job.device)
    images = list_images()
    first = list(islice(images, WINDOW))
    at_once = sum(int(each.get("CPU", 0)) // job.threads for each in machines)
    part_images = ray_tasks.whole_batches(part_images or suitable_part(len(first), at_once), job.batch)
    # Written now: without a cluster, no run has begun.
    Folder(job.output).write(RUN, json.dumps({"bundle_hash": job.bundle_hash, "part_images": part_images}).encode())

    # A thread of Ray Data asks for the end of tasks ten times a second; with two nodes, each would wait 70 ms more.
    os.environ.setdefault("RAY_DATA_METADATA_PREFETCH_ON_THREAD", "0")
    warnings.simplefilter("ignore")  # Ray Data warns of itself
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    job = job._replace(files=ray.put(job.files))
    numbered = enumerate(chain(first, images))
    target, counts, expected = Folder(job.output), Counts(), set[str]()
    while window := list(islice(numbered, WINDOW // part_images * part_images)):
        parts = [window[start : start + part_images] for start in range(0, len(window), part_images)]
        expected |= {_name(part[0][0], job.suffix) for part in parts}
        rows = [
            {
                "first": part[0][0],
                "images": json.dumps([stored.as_json(image) for _, image in part]),
                "file": json.dumps(
                    next((image for _, image in part if isinstance(image, str) and os.path.exists(image)), "")
                ),
            }
            for part in parts
        ]
        scored = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            score_part,
            fn_args=(job,),
            batch_size=1,
            batch_format="numpy",
            num_cpus=job.threads,
            num_gpus=1 if job.device.startswith("cuda") else 0,
        )
        for result in scored.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            for error in result["error"]:
                if error:
                    raise _error(json.loads(str(error)))
            counts += Counts(**{each.name: int(result[each.name].sum()) for each in fields(Counts)})
            progress("images", counts.images, window[-1][0] + 1)
    if not counts.images:
        raise DataError("No image was found, so nothing is known to be normal. Give at least one image.")
    _finish(target, counts, expected)
    return counts


def _error(sent: dict[str, str]) -> NormweaveError:
    """Return the exception of a task."""
    known = {each.__name__: each for each in _subclasses(NormweaveError)}
    return known.get(sent["type"], NormweaveError)(sent["text"])


def _subclasses(of: type[NormweaveError]) -> Iterator[type[NormweaveError]]:
    yield of
    for each in of.__subclasses__():
        yield from _subclasses(each)


def _finish(target: Folder, counts: Counts, expected: set[str]) -> None:
    """Check that the parts are those of the images, and write the counts."""
    names = target.names()
    for name in names:
        if name.startswith(".part-"):  # of a task whose node was lost while it wrote
            target.remove(name)
    found = {name for name in names if name.startswith("part-")}
    if found != expected:
        example = sorted(found ^ expected)[0]
        raise DataError(
            f"{target.where} has {len(found)} parts, and these images are {len(expected)}: {example} differs. Another "
            "run writes there, or wrote there with more images. Give a new folder."
        )
    content = {each.name: getattr(counts, each.name) for each in fields(counts)}
    target.write(COMPLETE, json.dumps(content).encode())


def _name(first: int, suffix: str) -> str:
    return f"part-{first:09d}{suffix}"


# ── in the workers ───────────────────────────────────────────────────────────────────────────────────────────────────


def score_part(batch: dict[str, Any], job: Job) -> dict[str, Any]:
    """Score one part, unless it exists, and return its counts."""
    counts, error = Counts(), ""
    try:
        images = [stored.from_json(value) for value in json.loads(str(batch["images"][0]))]
        counts = _part(int(batch["first"][0]), images, job, file=json.loads(str(batch["file"][0])))
    except NormweaveError as failure:
        error = json.dumps({"type": type(failure).__name__, "text": str(failure)})
    except OSError as failure:  # such as a full disk
        text = (
            f"The worker {socket.gethostname()} could not score the images from {int(batch['first'][0]) + 1} on and "
            f"write them to {job.output}: {failure}. What was finished is kept. Remove the cause, then resume."
        )
        error = json.dumps({"type": DataError.__name__, "text": text})
    return {each.name: [getattr(counts, each.name)] for each in fields(counts)} | {"error": [error]}


def _part(first: int, images: list[ListedImage], job: Job, *, file: str) -> Counts:
    """Score a part, unless it exists.

    Args:
        file: an image that the machine of the command sees; empty: there is none.
    """
    target, name = Folder(job.output), _name(first, job.suffix)
    if content := target.read(name):  # an empty file is that of a machine that lost power while it wrote
        where = f"{job.output.rstrip('/')}/{name}"
        rows = _rows(content, job.suffix, where=where)
        _check_images(rows, images, first, where=where)
        return Counts.of(rows)
    ray_tasks.in_folder(job.current_folder)
    with _counted(Path(tempfile.gettempdir(), f"normweave-{job.run}-{first}")) as losses:
        check_losses(losses, images)
        detector = _detector(job)
        check_visible(file)
        inputs = images
        if losses >= LOSSES:
            refused = ending(images)
            inputs = [
                stored.refused(each, refused[number]) if number in refused else each
                for number, each in enumerate(images)
            ]
        fetched = stored.fetched(inputs) if any(map(_in_store, inputs)) else inputs
        rows = [outcome.as_dict() for outcome in detector.stream(fetched)]
    target.write(name, _content(rows, job.suffix))
    return Counts.of(rows)


@contextmanager
def _counted(file: Path) -> Iterator[int]:
    """Yield how many processes of this node ended here before; the file counts them, and this process."""
    losses = 0
    with suppress(FileNotFoundError):
        losses = file.stat().st_size
    with file.open("ab") as count:
        count.write(b".")
    try:
        yield losses
    finally:
        file.unlink(missing_ok=True)


def ending(images: Sequence[ListedImage]) -> dict[int, str]:
    """Return how each of these images that ends the process that decodes it, twice, does so, by its number."""
    found: dict[int, str] = {}
    ended: Counter[int] = Counter()
    start = 0
    while start < len(images):
        child = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import decode_each; decode_each()"],
            input=json.dumps([stored.as_json(each) for each in images[start:]]),
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
            check=False,
        )
        if child.returncode in (0, 1):  # 1: an exception, which the scoring raises again
            break
        start += child.stdout.count("\n")
        ended[start] += 1
        if ended[start] == 2:
            code = child.returncode
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"code {code}"
            found[start] = f"{readable(os.fspath(images[start]))}: its decoder ended its process with {how}."
            start += 1
    return found


def decode_each() -> None:
    """Decode the images on stdin, and write a line for each."""
    for value in json.load(sys.stdin):
        with suppress(ImageError):
            image_files.decode(stored.from_json(value))
        sys.stdout.write("decoded\n")
        sys.stdout.flush()


def _in_store(image: ListedImage) -> bool:
    return isinstance(image, stored.UrlImage)


def _detector(job: Job) -> Detector:
    """Return the detector of this worker process."""
    import ray

    key = (job.bundle_hash, job.threads, job.device)
    if key not in _detectors:
        check_versions(job.versions)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in ray.get(job.files).items():
                Path(folder, name).write_bytes(content)
            _detectors[key] = Detector.load(folder, threads=job.threads, device=job.device)
    return _detectors[key]


def _check_images(rows: list[Row], images: list[ListedImage], first: int, *, where: str) -> None:
    """Raise DataError if the rows of a part are of other images, or others in number."""
    for number, (row, each) in enumerate(zip(rows, images, strict=False)):
        got, image = row["image_path"], os.fspath(each)
        if got != image and readable(image) != got:  # in Parquet, a name that is not UTF-8 is written so
            raise DataError(
                f"Row {number + 1} of {where} is {got}, but image {first + number + 1} of this run is {image}. Give "
                "the same images in the same order (use --list for a folder that changes), or a new folder."
            )
    if len(rows) != len(images):
        raise DataError(
            f"{where} has {len(rows)} rows, but this run has {len(images)} images from {first + 1} on in this part. If "
            "the images are the same (use --list for a folder that changes), the part was cut: remove it, then resume. "
            "Otherwise give a new folder."
        )


def _content(rows: list[Row], suffix: str) -> bytes:
    """Return rows as a file."""
    if suffix == ".jsonl":
        return b"".join(map(json_line, rows))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "part.parquet")
        write_parquet(iter(rows), path, Outcome.columns())
        return path.read_bytes()


def _rows(content: bytes, suffix: str, *, where: str) -> list[Row]:
    """Return the rows of a file; of Parquet what is compared and counted."""
    try:
        if suffix == ".jsonl":
            rows: list[Row] = [json.loads(line) for line in content.splitlines()]
        else:
            from pyarrow import parquet

            rows = parquet.read_table(io.BytesIO(content), columns=["image_path", "verdict", "error"]).to_pylist()
        Counts.of(rows)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{where} is not a part of results ({error}). Remove it, then resume.") from error
    return rows
