"""Run a plan: every method on every fold with every seed; each result goes to disk at once, the table comes last."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from normweave import __version__, settings
from normweave.benchmark.evaluate import measure, write_whole
from normweave.benchmark.plan import DataPlan, MethodPlan, Plan, read_plan
from normweave.benchmark.protocols import Fold, Protocol, folds
from normweave.config import Config
from normweave.data import layouts
from normweave.data.textures import make_textures
from normweave.detector import Detector, cache_folder
from normweave.errors import DataError, NormweaveError
from normweave.types import Progress, Sample

MEASURES = (
    "image_auroc",
    "pixel_auroc",
    "aupro",
    "image_ap",
    "image_f1max",
    "pixel_ap",
    "false_alarm_rate",
    "unknown_rate",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training and its test."""

    method: MethodPlan
    data: DataPlan
    root: str
    protocol: Protocol
    fold: str
    seed: int

    @property
    def key(self) -> str:
        """Names everything that decides the result, but for the code itself."""
        text = json.dumps(asdict(self) | {"config": settings.as_dict(self.config)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def config(self) -> Config:
        """Every setting of this run."""
        config = replace(Config(), head=settings.model_config(self.method.model), seed=self.seed)
        return settings.override(config, [*self.data.set, *self.method.set])


def run(
    plan_path: Path,
    *,
    output: Path,
    root: Path | None = None,
    jobs: int = 1,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Make the table of a plan: `output/NAME.md` and `.csv`; finished runs (`output/NAME.runs/`) are not repeated.

    Args:
        root: the folder against which the plan's data paths are read; NORMWEAVE_DATA, or ../shared/data.
        jobs: runs at a time; each gets its share of the cores.

    Returns:
        One row a method, data set, protocol and side. A run that failed counts in no row and is listed with its reason.
    """
    plan = read_plan(plan_path)
    root = root or Path(os.environ.get("NORMWEAVE_DATA", "../shared/data"))
    done = output / f"{plan_path.stem}.runs"
    done.mkdir(parents=True, exist_ok=True)
    data = {item.name: _samples(item, root, output) for item in plan.data}
    runs = list(_runs(plan, data, root))
    cache = cache or cache_folder()
    waiting = [item for item in runs if not (done / f"{item.key}.json").exists()]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_one, item, data[item.data.name], done, cache, threads) for item in waiting]
        for number, future in enumerate(futures):
            future.result()
            if progress is not None:
                progress("runs", number + 1, len(futures))
    results = [json.loads((done / f"{item.key}.json").read_text()) for item in runs]
    rows = _rows(plan, results)
    provenance = _provenance(plan_path, plan, results)
    _write_csv(output / f"{plan_path.stem}.csv", rows)
    _replace(output / f"{plan_path.stem}.md", _markdown(plan, rows, results, provenance))
    return rows


def _samples(item: DataPlan, root: Path, output: Path) -> list[Sample]:
    config = settings.override(Config(), list(item.set))
    if not item.textures:
        return layouts.read(root / item.path, config.data, layout=item.layout)
    manifest = make_textures(  # a complete folder of the same settings is left alone
        output / "data" / item.name,
        seed=item.textures.get("seed", 0),
        train_images=item.textures["train_images"],
        test_images=item.textures["test_images"],
        defect_images=item.textures["defect_images"],
    )
    return layouts.read(manifest, config.data)


def _runs(plan: Plan, data: dict[str, list[Sample]], root: Path) -> Iterator[Run]:
    for item in plan.data:
        for protocol in item.protocols:
            for method in plan.methods:
                for seed in method.seeds or plan.seeds:
                    for fold in folds(data[item.name], protocol, seed=seed):
                        yield Run(
                            method=method,
                            data=item,
                            root=root.name,
                            protocol=protocol,
                            fold=fold.name,
                            seed=seed,
                        )


def _one(item: Run, samples: Sequence[Sample], done: Path, cache: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    (fold,) = (fold for fold in folds(samples, item.protocol, seed=item.seed) if fold.name == item.fold)
    row: dict[str, Any] = {
        "method": item.method.name,
        "data": item.data.name,
        "protocol": item.protocol,
        "fold": item.fold,
        "seed": item.seed,
    }
    try:
        row |= _result(item, fold, cache)
    except NormweaveError as error:
        row["error"] = f"{type(error).__name__}: {error}"
    _replace(done / f"{item.key}.json", json.dumps(row, indent=1) + "\n")


def _result(item: Run, fold: Fold, cache: Path) -> dict[str, Any]:
    start = time.perf_counter()
    detector = Detector.fit(fold.samples, config=item.config, cache=cache)
    trained = time.perf_counter()
    sides: dict[str, Any] = {}
    for side, tests in fold.tests.items():
        metrics, _ = measure(detector, tests, cache=cache)
        sides[side] = metrics["pooled"] | {key: metrics[key] for key in ("by_subclass", "mean_of_subclasses")}
    tested = time.perf_counter()
    images = sum(len(tests) for tests in fold.tests.values())
    return {
        "sides": sides,
        "train_s": trained - start,
        "test_ms": (tested - trained) * 1000 / images,
        "fit_images": detector.record["fit_images"],
        "calibration_images": detector.record["calibration_images"],
        "data_fingerprint": detector.record["data_fingerprint"],
    }


def _rows(plan: Plan, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the folds of a seed, then mean and deviation over the seeds."""
    rows = []
    for item in plan.data:
        for protocol in item.protocols:
            for method in plan.methods:
                own = [
                    result
                    for result in results
                    if (result["data"], result["protocol"], result["method"])
                    == (item.name, protocol, method.name)
                    and "error" not in result
                ]
                for side in sorted({side for result in own for side in result["sides"]}):
                    rows.append(_row(method.name, item.name, protocol, side, own))
    return rows


def _row(method: str, data: str, protocol: str, side: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    seeds = sorted({result["seed"] for result in results})
    row: dict[str, Any] = {
        "data": data,
        "protocol": protocol,
        "side": side,
        "method": method,
        "seeds": len(seeds),
    }
    for measure_name in MEASURES:
        by_seed = []
        for seed in seeds:
            values = [result["sides"][side][measure_name] for result in results if result["seed"] == seed]
            if defined := [value for value in values if value is not None]:
                by_seed.append(mean(defined))
        row[measure_name] = mean(by_seed) if by_seed else None
        row[f"{measure_name}_sd"] = stdev(by_seed) if len(by_seed) > 1 else None
    row["train_s"] = mean(result["train_s"] for result in results)
    row["test_ms"] = mean(result["test_ms"] for result in results)
    return row


def _provenance(plan_path: Path, plan: Plan, results: Sequence[dict[str, Any]]) -> list[str]:
    done = [result for result in results if "error" not in result]
    fingerprints = " ".join(sorted({result["data_fingerprint"] for result in done}))
    minutes = sum(result["train_s"] + result["test_ms"] * _tested(result) / 1000 for result in done) / 60
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return [
        f"Command: `normweave benchmark {plan_path.parent.name}/{plan_path.name}`; seeds {list(plan.seeds)}.",
        f"normweave {__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, {gpu}; {date.today().isoformat()}; {len(results)} runs, "
        f"{minutes:.0f} minutes of training and testing in all, features cached.",
        f"Fingerprint of the training sets: {hashlib.sha256(fingerprints.encode()).hexdigest()[:16]}.",
    ]


def _tested(result: dict[str, Any]) -> int:
    return sum(side["n_normal"] + side["n_anomalous"] for side in result["sides"].values())


def _markdown(
    plan: Plan, rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], provenance: Sequence[str]
) -> str:
    lines = [f"# {plan.title}", "", *provenance, ""]
    lines += [
        "Points in percent over all test images of a fold together, mean over folds, then mean ± deviation over "
        "seeds. FAR: share of good test images above the operating point, which was drawn from held-out normals.",
        "",
    ]
    for data, protocol, side in dict.fromkeys((row["data"], row["protocol"], row["side"]) for row in rows):
        lines += [
            f"## {data}: {protocol}, {side} subclasses",
            "",
            "| method | I-AUROC | P-AUROC | AUPRO | AP (image) | FAR | unknown | train s | test ms/image |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            if (row["data"], row["protocol"], row["side"]) == (data, protocol, side):
                shares = [
                    _points(row, name)
                    for name in (
                        "image_auroc",
                        "pixel_auroc",
                        "aupro",
                        "image_ap",
                        "false_alarm_rate",
                        "unknown_rate",
                    )
                ]
                lines.append(
                    f"| {row['method']} | {' | '.join(shares)} | {row['train_s']:.0f} | {row['test_ms']:.0f} |"
                )
        lines.append("")
    if failed := [result for result in results if "error" in result]:
        lines += [
            "## Failed runs",
            "",
            "| method | data | fold | seed | reason |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {result['method']} | {result['data']} | {result['fold']} | {result['seed']} | {result['error']} |"
            for result in failed
        ]
    return "\n".join(lines) + "\n"


def _points(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return "–"
    deviation = row[f"{name}_sd"]
    return f"{100 * row[name]:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        raise DataError(f"Every run failed; their reasons stand in {path.stem}.runs/.")

    def table(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, table)


def _replace(path: Path, text: str) -> None:
    write_whole(path, lambda partial: partial.write_text(text))
