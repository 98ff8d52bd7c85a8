"""Run a plan: every method on every fold with every seed. Each result is written at once, the table at the end."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cached_property
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from normweave import __version__, settings
from normweave.atomic import write_atomically
from normweave.benchmark import artifacts, figures, table
from normweave.benchmark.evaluate import measure
from normweave.benchmark.plan import DataPlan, MethodPlan, PartPlan, Plan, read_plan
from normweave.benchmark.protocols import Divisions, Fold
from normweave.benchmark.summary import summarise
from normweave.bridges import peers, ray_tasks
from normweave.config import Config
from normweave.data import layouts
from normweave.data.joined import join
from normweave.detector import Detector
from normweave.errors import DataError, MissingError, NormweaveError
from normweave.features import cache as feature_cache
from normweave.fitting import fit
from normweave.textiles import make_textures
from normweave.types import Progress, Sample

EVERY_METHOD = "(every method)"
"""In the place of the method, for a data set that cannot be read or divided."""
TIMED = 16
"""How many test images the inference time is measured on."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training and its test."""

    method: MethodPlan
    data: DataPlan
    root: str
    protocol: str
    fold: str
    seed: int

    @cached_property
    def key(self) -> str:
        """A hash of everything that determines the result except the code.

        Other seeds and protocols of the plan are not part of it, so that adding one repeats no finished run.
        """
        relevant = replace(
            self, method=replace(self.method, baseline="", seeds=()), data=replace(self.data, protocols=())
        )
        parts = asdict(relevant) | {"config": settings.as_dict(self.config)}
        if self.peer is not None:
            parts |= {"peer": dict(self.peer.values)}
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def peer(self) -> peers.PeerPlan | None:
        """The peer with its settings; None for our own models."""
        if not peers.is_peer(self.method.model):
            return None
        return peers.read(self.method.model, [*self.data.set, *self.method.set], seed=self.seed)

    @property
    def config(self) -> Config:
        """Every setting of this run that our models share."""
        if self.peer is not None:
            return self.peer.config
        config = settings.with_model(replace(Config(), seed=self.seed), self.method.model)
        return settings.override(config, [*self.data.set, *self.method.set])


class Work(NamedTuple):
    """What the process of a run is given."""

    run: Run
    fold: Fold
    done: Path
    """Folder of the results."""
    cache: Path
    threads: int
    timed: bool
    """Whether the inference time is measured."""


def run(
    plan_path: Path,
    *,
    output: Path,
    root: Path | None = None,
    jobs: int = 1,
    cache: Path | None = None,
    ray: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Make the table of a plan, `output/NAME` as `.md`, `.html`, `.csv` and `.parquet`, and its figures.

    Finished runs (`output/NAME.runs/`) are not repeated when an interrupted plan is run again.

    Args:
        root: the folder against which the plan's data paths are read; NORMWEAVE_DATA, or ../shared/data.
        jobs: runs in parallel; each gets its share of the cores.
        ray: address of a Ray cluster that the runs are distributed over, as in `bridges.ray.run`.
        threads: of each run; default: its share of the cores, with `ray` 1.

    Returns:
        One row for each method, data set, protocol and side; for several categories one for all test images together,
        one for the mean over the categories and one for each category. Failed runs are not in these rows; each reason
        for which runs of a method failed is a row with `error`, and so is each reason for which a data set cannot be
        read or divided. With two or more data sets, protocols or sides, a row for each method over all of them
        (`summary.summarise`).

    Raises:
        ConfigError: the plan is wrong.
        DataError: no run succeeded; the reasons are in the tables.
    """
    plan = read_plan(plan_path)
    root = root or Path(os.environ.get("NORMWEAVE_DATA", "../shared/data"))
    done = output / f"{plan_path.stem}.runs"
    done.mkdir(parents=True, exist_ok=True)
    divisions, unusable = divide(plan, root, output)
    runs = list(list_runs(plan, divisions, root))
    cache = cache or feature_cache.default_folder()
    threads = threads or (1 if ray is not None else max(1, (os.cpu_count() or 1) // jobs))
    work = [
        Work(item, fold, done, cache, threads, timed)
        for item, fold, timed in runs
        if not (done / f"{item.key}.json").exists()
    ]
    ended = _in_processes(work, jobs, progress) if ray is None else _on_cluster(work, ray, threads, progress)
    results = [
        json.loads(file.read_text())
        if (file := done / f"{item.key}.json").exists()
        else _identity(item) | {"error": f"The process of the run ended with {ended[item.key]}."}
        for item, *_ in runs
    ]
    provenance = _provenance(plan_path, plan, results)
    results += unusable
    rows, failed = table.make_rows(plan, results), table.failures(results)
    summary = summarise(plan, results)
    overall = [] if summary is None else summary.rows
    target = output / plan_path.stem
    table.write_csv(target.with_suffix(".csv"), rows + overall + failed)
    table.write_parquet(target.with_suffix(".parquet"), rows + overall + failed, provenance)
    drawn = figures.draw(plan, results, rows, divisions, runs=done, folder=output / f"{plan_path.stem}.figures")
    _replace(target.with_suffix(".md"), table.markdown(plan, rows, results, provenance, drawn))
    _replace(target.with_suffix(".html"), table.html(plan, rows, results, provenance, drawn))
    if not rows:
        raise DataError(f"Every run failed; the reasons are in {target.with_suffix('.md')}.")
    return rows + overall + failed


def _in_processes(work: Sequence[Work], jobs: int, progress: Progress | None) -> dict[str, str]:
    """Run each in a new process, `jobs` at a time; return the exit of those that failed by key.

    With one process for each run, memory is released after it, and a run that the system kills stops no other. On
    Linux they are forks of a process that has imported torch and done nothing else, which saves each run the seconds of
    the import.
    """
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload([__name__])
    ended: dict[str, str] = {}
    queue = list(reversed(work))
    running: dict[Any, tuple[Any, Run]] = {}  # by the sentinel of the process
    try:
        while queue or running:
            while queue and len(running) < jobs:
                one = queue.pop()
                process = context.Process(target=_run_one, args=(one,), daemon=True)
                process.start()
                running[process.sentinel] = (process, one.run)
            for sentinel in wait(list(running)):
                process, item = running.pop(sentinel)
                process.join()
                code = process.exitcode
                if code:
                    ended[item.key] = f"exit code {code}" if code > 0 else f"signal {-code}"
                if progress is not None:
                    progress("runs", len(work) - len(queue) - len(running), len(work))
    finally:
        for process, _ in running.values():
            process.terminate()
    return ended


def _on_cluster(work: Sequence[Work], address: str, threads: int, progress: Progress | None) -> dict[str, str]:
    """Run each as a task of a Ray cluster; return the reasons of those that failed by key.

    Every node must have the images and the package. Results and artifacts are written here.
    """
    if not work:
        return {}
    failed = ray_tasks.run(address, run_elsewhere, work, save=save_run, processors=threads, progress=progress)
    return {work[number].run.key: reason for number, reason in failed}


def run_elsewhere(work: Work) -> tuple[str, bytes | None]:
    """Return the result of a run as JSON, and its artifact."""
    with tempfile.TemporaryDirectory() as folder:
        _run_one(work._replace(done=Path(folder)))
        artifact = Path(folder, f"{work.run.key}.safetensors")
        return Path(folder, f"{work.run.key}.json").read_text("utf-8"), _content(artifact)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def save_run(work: Work, result: tuple[str, bytes | None]) -> None:
    """Write the result of a run that was computed elsewhere."""
    text, artifact = result
    if artifact is not None:
        write_atomically(work.done / f"{work.run.key}.safetensors", lambda path: path.write_bytes(artifact))
    _replace(work.done / f"{work.run.key}.json", text)


def read_samples(item: DataPlan, root: Path, output: Path) -> list[Sample]:
    """Return the samples of a data set of the plan; textiles are rendered into `output/data`.

    Args:
        root: the folder against which paths are read.
    """
    folder = output / "data" / item.name
    if not item.parts:
        return _read(item, item.set, root, folder)
    return join(
        [
            (
                part.path or f"the textures of part {number}",
                _read(part, item.set + part.set, root, folder / str(number)),
            )
            for number, part in enumerate(item.parts, start=1)
        ]
    )


def _read(item: PartPlan, chosen: tuple[str, ...], root: Path, folder: Path) -> list[Sample]:
    config = settings.override(Config(), list(chosen))
    if not item.textures:
        return layouts.read(root / item.path, config.data, layout=item.layout)
    manifest = make_textures(  # keeps a complete folder of the same settings
        folder,
        seed=item.textures.get("seed", 0),
        train_images=item.textures["train_images"],
        test_images=item.textures["test_images"],
        defect_images=item.textures["defect_images"],
    )
    return layouts.read(manifest, config.data)


def divide(plan: Plan, root: Path, output: Path) -> tuple[Divisions, list[table.Result]]:
    """Read and divide every data set of a plan.

    Returns:
        The folds by data set, protocol and seed; and a failed result for each protocol and seed whose folds cannot be
        made, because the data set cannot be read or does not allow the protocol.

    Raises:
        ConfigError: a setting of the plan is wrong.
    """
    for item in plan.data:
        for method in plan.methods:  # before a data set is read, so that no error of the plan is taken for one of it
            Run(method=method, data=item, root=root.name, protocol="", fold="", seed=0).config  # noqa: B018
    divisions: Divisions = {}
    unusable = []
    seeds = list(dict.fromkeys(seed for method in plan.methods for seed in method.seeds or plan.seeds))
    for item in plan.data:
        wanted = list(itertools.product(item.protocols, seeds))
        try:
            samples = read_samples(item, root, output)
        except NormweaveError as error:
            unusable += [_unusable(item, protocol, seed, error) for protocol, seed in wanted]
            continue
        for protocol, seed in wanted:
            try:
                divisions[item.name, protocol, seed] = item.folds(samples, protocol, seed=seed)
            except NormweaveError as error:
                unusable.append(_unusable(item, protocol, seed, error))
    return divisions, unusable


def _unusable(item: DataPlan, protocol: str, seed: int, error: NormweaveError) -> table.Result:
    where = {"method": EVERY_METHOD, "data": item.name, "protocol": protocol, "fold": "all", "seed": seed}
    return where | {"error": f"{type(error).__name__}: {error}"}


def list_runs(plan: Plan, divisions: Divisions, root: Path) -> Iterator[tuple[Run, Fold, bool]]:
    """Yield every run of a plan with its fold, in the order of the plan, and whether its inference is timed.

    The first run of a method on a data set and protocol is timed: the time hardly differs between folds and seeds.
    """
    for item in plan.data:
        for protocol in item.protocols:
            for method in plan.methods:
                timed = True
                for seed in method.seeds or plan.seeds:
                    for fold in divisions.get((item.name, protocol, seed), ()):
                        one = Run(
                            method=method, data=item, root=root.name, protocol=protocol, fold=fold.name, seed=seed
                        )
                        yield one, fold, timed
                        timed = False


def _identity(item: Run) -> dict[str, Any]:
    """Return the fields of a result that identify its run."""
    return {
        "method": item.method.name,
        "data": item.data.name,
        "protocol": item.protocol,
        "fold": item.fold,
        "seed": item.seed,
    }


def _run_one(work: Work) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(work.threads)
    item, done = work.run, work.done
    row = _identity(item)
    try:
        row |= _result(work, artifact=done / f"{item.key}.safetensors")
    except NormweaveError as error:
        row["error"] = f"{type(error).__name__}: {error}"
    except Exception as error:  # a peer may raise anything; the plan continues
        row |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    _replace(done / f"{item.key}.json", json.dumps(row, indent=1) + "\n")


def _exit_with_parent() -> None:
    """End this process when the process of the plan has ended."""
    if (plan := multiprocessing.parent_process()) is not None:
        plan.join()
        os._exit(1)


def _result(work: Work, *, artifact: Path) -> dict[str, Any]:
    item, fold, cache = work.run, work.fold, work.cache
    images = [sample.image_path for tests in fold.tests.values() for sample in tests]
    if not images:
        raise DataError(
            f"Fold {item.fold!r} has no test images. Add test images of its subclasses, or use another protocol."
        )
    start = time.perf_counter()
    if item.peer is not None:
        detector = fit_peer(item.peer, fold.samples)
    else:
        detector = fit(fold.samples, config=item.config, cache=cache)
    trained = time.perf_counter()
    calibration = detector.calibration
    assert calibration is not None  # it gives the verdicts
    sides: dict[str, Any] = {}
    predictions: dict[str, list[dict[str, Any]]] = {}
    for side, tests in fold.tests.items():
        metrics, predictions[side] = measure(detector, tests, cache=cache)
        further = ("by_category", "by_subclass", "mean_of_subclasses")
        sides[side] = metrics["pooled"] | {key: metrics[key] for key in further}
        sides[side]["good_groups"] = _good_groups(tests, predictions[side])
        unseen = calibration.unseen if side == "unseen" else None
        sides[side]["promised"] = (unseen or calibration).point().false_alarm_rate
    tested = time.perf_counter()
    artifacts.save(artifact, detector, fold, predictions, cache=cache)
    return {
        "sides": sides,
        "artifact": artifact.name,
        "train_s": trained - start,
        "test_ms": (tested - trained) * 1000 / len(images),
        "inference_ms": _inference_ms(detector, images[:TIMED]) if work.timed else None,
        "peak_mib": _peak_mib(),
        "parameters": detector.network.parameters,
        "promised": calibration.point().false_alarm_rate,
        "differs": item.peer.differs if item.peer is not None else None,
        "fit_images": detector.record["fit_images"],
        "calibration_images": detector.record["calibration_images"],
        "data_fingerprint": detector.record["data_fingerprint"],
    }


def _good_groups(tests: Sequence[Sample], predictions: Sequence[dict[str, Any]]) -> list[str]:
    """Return the groups of the good images with a score; an image without group is one of its own."""
    scored = {row["image_path"] for row in predictions if row["error"] is None}
    good = [each for each in tests if each.label == "normal" and str(each.image_path) in scored]
    return sorted({each.group or str(each.image_path) for each in good})


def fit_peer(plan: peers.PeerPlan, samples: Sequence[Sample]) -> Detector:
    """Fit a model of anomalib.

    Raises:
        MissingError: anomalib is not installed.
    """
    try:
        from normweave.bridges.peer_network import fit as fit_anomalib
    except ImportError as error:
        raise MissingError(
            f"{peers.PREFIX}{plan.name} needs anomalib and FrEIA, which are not installed ({error}). "
            "Install them with: pip install 'normweave[bench]'"
        ) from error
    return fit_anomalib(plan, samples)


def _inference_ms(detector: Detector, paths: Sequence[Path]) -> float:
    """Return the mean time of an image from file to map, of a second pass after a warm-up pass."""
    for _ in range(2):
        start = time.perf_counter()
        count = sum(1 for _ in detector.stream(paths))
        elapsed = time.perf_counter() - start
    return elapsed * 1000 / count


def _peak_mib() -> float | None:
    """Return the peak memory of this process; None where the system does not report it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _provenance(plan_path: Path, plan: Plan, results: Sequence[dict[str, Any]]) -> list[str]:
    done = [result for result in results if "error" not in result]
    fingerprints = " ".join(sorted({result["data_fingerprint"] for result in done}))
    minutes = sum(result["train_s"] + result["test_ms"] * _tested(result) / 1000 for result in done) / 60
    packages = f", anomalib {version('anomalib')}" if any(result.get("differs") for result in done) else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return [
        f"Command: `normweave benchmark {plan_path.parent.name}/{plan_path.name}`; seeds {list(plan.seeds)}.",
        f"normweave {__version__}{packages}, torch {version('torch')}, Python {platform.python_version()}, "
        f"{platform.machine()}, {os.cpu_count()} cores, {gpu}; {date.today().isoformat()}; {len(results)} runs, "
        f"{minutes:.0f} minutes of training and testing in all, features cached.",
        f"Fingerprint of the training sets: {hashlib.sha256(fingerprints.encode()).hexdigest()[:16]}.",
    ]


def _tested(result: dict[str, Any]) -> int:
    return sum(side["n_normal"] + side["n_anomalous"] for side in result["sides"].values())


def _replace(path: Path, text: str) -> None:
    write_atomically(path, lambda partial: partial.write_text(text, "utf-8"))
