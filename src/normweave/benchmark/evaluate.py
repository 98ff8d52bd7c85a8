"""A detector against labelled test images: metrics.json, predictions.csv and the report."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave import __version__
from normweave.data import images, layouts, splits
from normweave.detector import CACHE_GIB, Detector
from normweave.errors import DataError
from normweave.report.metrics import PixelMetrics, binomial_interval, image_metrics
from normweave.report.page import Rendered, write_page
from normweave.types import Outcome, Progress, Sample

COLUMNS = (
    "image_path",
    "category",
    "subclass",
    "seen",
    "label",
    "defect",
    "verdict",
    "pred_score",
    "p_value",
    "threshold",
    "routed_category",
    "routed_subclass",
    "subclass_distance",
    "subclass_p_value",
    "error",
)


class _Cell(NamedTuple):
    """Test images are counted apart by these, and added up to every table."""

    category: str
    subclass: str | None
    seen: bool
    defect: str | None  # None: good


def evaluate(
    detector: Detector,
    data: str | os.PathLike[str] | Sequence[Sample],
    *,
    output: Path,
    layout: str | None = None,
    title: str = "Evaluation",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge every test image of `data` and write `metrics.json`, `predictions.csv` and `report.html` to `output`.

    Raises:
        DataError: there is no test image, or a test image was used in training.
    """
    samples = test_samples(detector, data, layout)
    metrics, predictions = measure(detector, samples, progress=progress)
    metrics["provenance"] = provenance(detector, data)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=2) + "\n"))
    write_whole(output / "predictions.csv", lambda path: _write_rows(path, predictions))
    # Rows stand in the order of the samples, but for those that could not be read, which have no picture.
    by_path = {str(sample.image_path): sample for sample in samples}
    write_whole(
        output / "report.html",
        lambda path: write_page(
            path,
            title=title,
            metrics=metrics,
            predictions=predictions,
            render=lambda row: _render(detector, by_path[predictions[row]["image_path"]]),
            provenance=metrics["provenance"],
        ),
    )
    return metrics


def test_samples(
    detector: Detector, data: str | os.PathLike[str] | Sequence[Sample], layout: str | None
) -> list[Sample]:
    """The test rows of a data set, of all its kinds; missing splits are drawn with the seed of the training."""
    if isinstance(data, str | os.PathLike):
        chosen = detector.config.data
        labels = "folder" if chosen.subclass_from == "auto" else chosen.subclass_from
        everything = replace(chosen, category=(), subclass=(), subclass_from=labels)
        samples = layouts.read(Path(data), everything, layout=layout)
    else:
        samples = list(data)
    tests = [s for s in splits.complete(samples, seed=detector.config.seed) if s.split == "test"]
    if not tests:
        raise DataError(
            f"No test images among {len(samples)}. Mark rows with split=test in a manifest, or lay them out as "
            "CATEGORY/test/{good,DEFECT}/."
        )
    return tests


def measure(
    detector: Detector,
    samples: Sequence[Sample],
    *,
    cache: Path | None = None,
    cache_gib: float = CACHE_GIB,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics (the keys of metrics.json but provenance) and one row an image.

    A mask that cannot be used leaves its image out of the pixel metrics and is listed under `mask_faults`.
    """
    known = set(detector.kinds.values())
    pixels: dict[_Cell, PixelMetrics] = {}
    predictions: list[dict[str, Any]] = []
    cells: list[_Cell] = []
    mask_faults: list[dict[str, str]] = []
    for sample, outcome in detector.stream_samples(
        samples, cache=cache, cache_gib=cache_gib, progress=progress
    ):
        cell = _Cell(
            sample.category,
            sample.subclass,
            (sample.category, sample.subclass) in known,
            (sample.defect or "defect") if sample.label == "anomalous" else None,
        )
        predictions.append(_row(sample, outcome, cell))
        cells.append(cell)
        if outcome.anomaly_map is not None:
            accumulated = pixels.setdefault(cell, PixelMetrics())
            mask = None
            try:
                mask = _mask(sample, outcome.anomaly_map.shape)
            except DataError as error:
                mask_faults.append({"image_path": str(sample.image_path), "reason": str(error)})
            if mask is None:
                accumulated.skip()
            else:
                accumulated.update(outcome.anomaly_map, mask)
    return _tables(cells, predictions, pixels) | {"mask_faults": mask_faults}, predictions


def _tables(
    cells: list[_Cell], predictions: list[dict[str, Any]], pixels: dict[_Cell, PixelMetrics]
) -> dict[str, Any]:
    def table(keep: Callable[[_Cell], bool]) -> dict[str, Any]:
        return _summary(
            [row for row, cell in zip(predictions, cells, strict=True) if keep(cell)],
            [accumulated for cell, accumulated in pixels.items() if keep(cell)],
        )

    def kind(cell: _Cell) -> str:
        return cell.category if cell.subclass is None else f"{cell.category}/{cell.subclass}"

    categories = sorted({cell.category for cell in cells})
    kinds = sorted({kind(cell) for cell in cells})
    defects = sorted({cell.defect for cell in cells if cell.defect is not None})
    by_category = {name: table(lambda cell, name=name: cell.category == name) for name in categories}  # type: ignore[misc]
    by_subclass = {name: table(lambda cell, name=name: kind(cell) == name) for name in kinds}  # type: ignore[misc]
    return {
        "pooled": table(lambda cell: True),
        "mean": _mean(by_category.values()),
        "mean_of_subclasses": _mean(by_subclass.values()),
        "seen": table(lambda cell: cell.seen),
        "unseen": table(lambda cell: not cell.seen),
        "by_category": by_category,
        "by_subclass": by_subclass,
        "by_defect": {
            name: table(lambda cell, name=name: cell.defect in (None, name))  # type: ignore[misc]
            for name in defects
        },
    }


def _summary(rows: list[dict[str, Any]], pixels: list[PixelMetrics]) -> dict[str, Any]:
    read = [row for row in rows if row["error"] is None]
    labels = np.array([row["label"] == "anomalous" for row in read], dtype=bool)
    scores = np.array([row["pred_score"] for row in read], dtype=np.float64)
    values, reasons = image_metrics(labels, scores)
    total = sum(pixels, PixelMetrics())
    pixel_values, pixel_reasons = total.compute()
    normal = [row for row in read if row["label"] == "normal"]
    alarms = sum(row["pred_score"] > row["threshold"] for row in normal)
    strangers = sum(row["verdict"] == "unknown" for row in normal)
    low, high = binomial_interval(alarms, len(normal)) if normal else (None, None)
    if not normal:
        reasons["false_alarm_rate"] = "no normal test image"
    return {
        **values,
        **pixel_values,
        "false_alarm_rate": alarms / len(normal) if normal else None,
        "false_alarm_interval": [low, high],
        "unknown_rate": strangers / len(normal) if normal else None,
        "n_normal": len(normal),
        "n_anomalous": len(read) - len(normal),
        "n_refused": len(rows) - len(read),
        "n_without_mask": total.skipped,
        "reasons": reasons | pixel_reasons,
    }


def _mean(tables: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Means of the shares over the tables in which they are defined, and sums of the counts."""
    rows = list(tables)
    result: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for key in rows[0]:
        if key in ("reasons", "false_alarm_interval"):
            continue
        values = [row[key] for row in rows if row[key] is not None]
        if key.startswith("n_"):
            result[key] = sum(values)
        else:
            result[key] = float(np.mean(values)) if values else None
            if not values:
                reasons[key] = "undefined in every part"
    return result | {"reasons": reasons}


def _row(sample: Sample, outcome: Outcome, cell: _Cell) -> dict[str, Any]:
    return {
        "image_path": str(sample.image_path),
        "category": sample.category,
        "subclass": sample.subclass,
        "seen": cell.seen,
        "label": sample.label,
        "defect": cell.defect,
        "verdict": outcome.verdict,
        "pred_score": outcome.pred_score,
        "p_value": outcome.p_value,
        "threshold": outcome.threshold,
        "routed_category": outcome.category,
        "routed_subclass": outcome.subclass,
        "subclass_distance": outcome.subclass_distance,
        "subclass_p_value": outcome.subclass_p_value,
        "error": outcome.error,
    }


def _mask(sample: Sample, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """True where defective; None for an anomalous image whose mask is missing or empty: nobody drew it."""
    if sample.label == "normal":
        return np.zeros(shape, dtype=bool)
    if sample.mask_path is None:
        return None
    mask = images.read_mask(sample.mask_path, height=shape[0], width=shape[1])
    return mask if mask.any() else None


def _render(detector: Detector, sample: Sample) -> Rendered:
    outcome = detector.score(str(sample.image_path))
    assert outcome.anomaly_map is not None  # score() was asked for maps
    try:
        mask = _mask(sample, outcome.anomaly_map.shape)
    except DataError:  # listed by `measure`
        mask = None
    return Rendered(image=images.decode(sample.image_path), anomaly_map=outcome.anomaly_map, mask=mask)


def provenance(detector: Detector, data: object) -> dict[str, Any]:
    """Where a table comes from."""
    record = detector.record
    return {
        "normweave": __version__,
        "model": record["model"],
        "data": str(data) if isinstance(data, str | os.PathLike) else "given as samples",
        "bundle_hash": detector.bundle_hash,
        "data_fingerprint": record["data_fingerprint"],
        "seed": record["seed"],
        "fit_images": record["fit_images"],
        "calibration_images": record["calibration_images"],
        "trained_on": list(detector.kinds),
        "false_alarm_rate": detector.config.outcome.false_alarm_rate,
        "software": record["software"],
    }


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Never half-written: to a temporary name, then renamed."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    write(partial)
    os.replace(partial, path)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
