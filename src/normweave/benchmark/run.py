"""Run a plan: every method on every fold with every seed; each result goes to disk at once, the table comes last."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

from normweave import __version__, settings
from normweave.benchmark.evaluate import measure, write_whole
from normweave.benchmark.plan import DataPlan, MethodPlan, PartPlan, Plan, read_plan
from normweave.benchmark.protocols import Fold, Protocol
from normweave.config import Config
from normweave.data import layouts
from normweave.data.joined import join
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
OVER_GENERALISATION = ("d_normal", "d_abnormal", "ratio", "cell_auroc")
CHANGES = ("ratio", "cell_auroc")
"""Those whose change against a method's baseline is shown."""
POOLED, MEAN = "(pooled)", "(mean)"
"""Beside the names of the categories: all their test images together, and the mean over them."""


class Column(NamedTuple):
    """One number of each row, as it is written."""

    heading: str
    name: str
    scale: int = 100
    style: str = ".1f"


POOLED_COLUMNS = (
    Column("I-AUROC", "image_auroc"),
    Column("P-AUROC", "pixel_auroc"),
    Column("AUPRO", "aupro"),
    Column("AP (image)", "image_ap"),
    Column("FAR", "false_alarm_rate"),
    Column("unknown", "unknown_rate"),
    Column("train s", "train_s", 1, ".0f"),
    Column("test ms/image", "test_ms", 1, ".0f"),
)
CATEGORY_COLUMNS = (
    Column("I-AUROC", "image_auroc"),
    Column("P-AUROC", "pixel_auroc"),
    Column("AUPRO", "aupro"),
    Column("FAR", "false_alarm_rate"),
    Column("d normal", "d_normal", 1, ".3f"),
    Column("d abnormal", "d_abnormal", 1, ".3f"),
    Column("ratio", "ratio", 1, ".2f"),
    Column("cell AUROC", "cell_auroc"),
)
CHANGE_COLUMNS = (
    Column("Δ ratio", "ratio_change", 1, "+.2f"),
    Column("Δ cell AUROC", "cell_auroc_change", 100, "+.1f"),
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
        decides = replace(self, method=replace(self.method, baseline=""))
        text = json.dumps(asdict(decides) | {"config": settings.as_dict(self.config)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def config(self) -> Config:
        """Every setting of this run."""
        config = settings.with_model(replace(Config(), seed=self.seed), self.method.model)
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
        One row a method, data set, protocol and side; of data of several categories one for all test images together,
        one for the mean over the categories and one a category. A run that failed counts in no row and is listed with
        its reason.
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
    made = output / "data" / item.name
    if not item.parts:
        return _read(item, item.set, root, made)
    return join(
        [
            (
                part.path or f"the textures of part {number}",
                _read(part, item.set + part.set, root, made / str(number)),
            )
            for number, part in enumerate(item.parts, start=1)
        ]
    )


def _read(item: PartPlan, chosen: tuple[str, ...], root: Path, made: Path) -> list[Sample]:
    config = settings.override(Config(), list(chosen))
    if not item.textures:
        return layouts.read(root / item.path, config.data, layout=item.layout)
    manifest = make_textures(  # a complete folder of the same settings is left alone
        made,
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
                    for fold in item.folds(data[item.name], protocol, seed=seed):
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
    made = item.data.folds(samples, item.protocol, seed=item.seed)
    (fold,) = (fold for fold in made if fold.name == item.fold)
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
        further = ("by_category", "by_subclass", "mean_of_subclasses")
        sides[side] = metrics["pooled"] | {key: metrics[key] for key in further}
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
            by_method = {
                method.name: [
                    result
                    for result in results
                    if (result["data"], result["protocol"], result["method"])
                    == (item.name, protocol, method.name)
                    and "error" not in result
                ]
                for method in plan.methods
            }
            for method in plan.methods:
                own, base = by_method[method.name], by_method.get(method.baseline, [])
                for side in sorted({side for result in own for side in result["sides"]}):
                    start = {"data": item.name, "protocol": protocol, "side": side, "method": method.name}
                    categories = _categories(own, side)
                    if len(categories) < 2:
                        rows.append(start | _row(own, side))
                        continue
                    for category in (POOLED, MEAN, *categories):
                        numbers = _row(own, side, category) | _over_generalisation(own, base, side, category)
                        rows.append(start | {"category": category} | numbers)
    return rows


def _categories(results: Sequence[dict[str, Any]], side: str) -> list[str]:
    return sorted({name for result in results for name in result["sides"][side]["by_category"]})


def _row(results: Sequence[dict[str, Any]], side: str, category: str = POOLED) -> dict[str, Any]:
    row: dict[str, Any] = {"seeds": len({result["seed"] for result in results})}
    for name in MEASURES:
        row |= _summary(name, _by_seed(results, side, category, name))
    row["train_s"] = mean(result["train_s"] for result in results)
    row["test_ms"] = mean(result["test_ms"] for result in results)
    return row


def _over_generalisation(
    results: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], side: str, category: str
) -> dict[str, Any]:
    """Its numbers, and by how much two of them differ from those of the baseline's runs with the same seeds."""
    row: dict[str, Any] = {}
    for name in OVER_GENERALISATION:
        row |= _summary(name, _by_seed(results, side, category, name))
    for name in CHANGES:
        own, base = (_by_seed(of, side, category, name) for of in (results, baseline))
        row |= _summary(f"{name}_change", {seed: own[seed] - base[seed] for seed in own if seed in base})
    return row


def _by_seed(results: Sequence[dict[str, Any]], side: str, category: str, name: str) -> dict[int, float]:
    """Mean over the folds in which the number is defined, for each seed that has one."""
    if category == MEAN:
        parts = [_by_seed(results, side, one, name) for one in _categories(results, side)]
        return {
            seed: mean(part[seed] for part in parts if seed in part)
            for seed in sorted({seed for part in parts for seed in part})
        }
    found = defaultdict(list)
    for result in results:
        table = result["sides"][side]
        if category != POOLED:
            table = table["by_category"].get(category, {})
        if name in OVER_GENERALISATION:
            table = table.get("over_generalisation") or {}
        if (value := table.get(name)) is not None:
            found[result["seed"]].append(value)
    return {seed: mean(values) for seed, values in sorted(found.items())}


def _summary(name: str, by_seed: Mapping[int, float]) -> dict[str, float | None]:
    values = list(by_seed.values())
    return {
        name: mean(values) if values else None,
        f"{name}_sd": stdev(values) if len(values) > 1 else None,
    }


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
    if any("category" in row for row in rows):
        lines += [_legend(plan), ""]
    further = CATEGORY_COLUMNS + (CHANGE_COLUMNS if any(m.baseline for m in plan.methods) else ())
    for data, protocol, side in dict.fromkeys((row["data"], row["protocol"], row["side"]) for row in rows):
        lines += [f"## {data}: {protocol}, {side} subclasses", ""]
        own = [row for row in rows if (row["data"], row["protocol"], row["side"]) == (data, protocol, side)]
        for category in dict.fromkeys(row.get("category") for row in own):
            if category is not None:
                lines += [f"### {category}", ""]
            columns = POOLED_COLUMNS if category in (None, POOLED) else further
            lines += _table([row for row in own if row.get("category") == category], columns)
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


def _legend(plan: Plan) -> str:
    """What the tables of several categories show."""
    compared: dict[str, list[str]] = defaultdict(list)
    for method in plan.methods:
        if method.baseline:
            compared[method.baseline].append(method.name)
    changes = "; ".join(f"of {', '.join(names)} against {baseline}" for baseline, names in compared.items())
    return (
        "(pooled): the test images of all categories together, ranked under one threshold. (mean): over the "
        "categories. d normal, d abnormal: mean distance to the reconstruction on good and on damaged patches; ratio: "
        "the second over the first; cell AUROC: how well the distance tells such patches apart."
        + (f" Δ: change, seed by seed, {changes}." if changes else "")
    )


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> list[str]:
    return [
        f"| method | {' | '.join(column.heading for column in columns)} |",
        f"| {' | '.join(['---'] * (len(columns) + 1))} |",
        *(f"| {row['method']} | {' | '.join(_written(row, column) for column in columns)} |" for row in rows),
        "",
    ]


def _written(row: dict[str, Any], column: Column) -> str:
    value, deviation = row[column.name], row.get(f"{column.name}_sd")
    if value is None:
        return "–"
    text = f"{column.scale * value:{column.style}}"
    return text if deviation is None else f"{text} ± {column.scale * deviation:{column.style.lstrip('+')}}"


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        raise DataError(f"Every run failed; their reasons stand in {path.stem}.runs/.")

    def table(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, table)


def _replace(path: Path, text: str) -> None:
    write_whole(path, lambda partial: partial.write_text(text))
