"""A detector against labelled test images: metrics.json, predictions.csv and the report."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave import __version__
from normweave.atomic import write_atomically
from normweave.config import Config
from normweave.data import images, layouts, splits
from normweave.data.synthetic import coverage
from normweave.detector import Detector
from normweave.errors import DataError
from normweave.maps.overlay import thumbnails
from normweave.report.metrics import OverGeneralisation, PixelMetrics, binomial_interval, image_metrics
from normweave.report.page import write_page
from normweave.types import Outcome, Progress, Sample, Tile

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

COMPARED = ("ratio", "cell_auroc")
"""Of over-generalisation, what `compare` takes the change of."""


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
    against: Path | None = None,
    title: str = "Evaluation",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge every test image of `data` and write `metrics.json`, `predictions.csv` and `report.html` to `output`.

    Args:
        against: metrics.json of another detector on the same images, from which the change in over-generalisation is
            taken.

    Raises:
        DataError: there is no test image, or a test image was used in training; `against` has nothing to compare.
    """
    samples = test_samples(detector.config, data, layout)
    other = (
        None if against is None else read_metrics(against, samples)
    )  # before minutes are spent on measuring
    metrics, predictions = measure(detector, samples, progress=progress)
    metrics["provenance"] = provenance(detector, data)
    if other is not None:
        compare(metrics, other)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(
        output / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=2) + "\n")
    )
    write_atomically(output / "predictions.csv", lambda path: _write_rows(path, predictions))
    # Rows stand in the order of the samples, but for those that could not be read, which have no picture.
    by_path = {str(sample.image_path): sample for sample in samples}
    write_atomically(
        output / "report.html",
        lambda path: write_page(
            path,
            title=title,
            metrics=metrics,
            predictions=predictions,
            render_images=lambda row: _render(detector, by_path[predictions[row]["image_path"]]),
            provenance=metrics["provenance"],
        ),
    )
    return metrics


def test_samples(
    config: Config, data: str | os.PathLike[str] | Sequence[Sample], layout: str | None
) -> list[Sample]:
    """The test rows of a data set, of all its kinds; missing splits are drawn with the seed of the training."""
    if isinstance(data, str | os.PathLike):
        chosen = config.data
        labels = "folder" if chosen.subclass_from == "auto" else chosen.subclass_from
        everything = replace(chosen, category=(), subclass=(), subclass_from=labels)
        samples = layouts.read(Path(data), everything, layout=layout)
    else:
        samples = list(data)
    tests = [s for s in splits.complete(samples, seed=config.seed) if s.split == "test"]
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
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics (the keys of metrics.json but provenance) and one row an image.

    A mask that cannot be used leaves its image out of the pixel metrics and is listed under `mask_faults`. A head that
    judges whole images has no pixel metrics.
    """
    known = set(detector.subclasses.values())
    told_apart = {detector.subclasses[name][0] for name in detector.subclass_names}
    pixels: dict[_Cell, PixelMetrics] = {}
    decoded: dict[_Cell, OverGeneralisation] = {}
    predictions: list[dict[str, Any]] = []
    cells: list[_Cell] = []
    mask_faults: list[dict[str, str]] = []
    for sample, outcome, tiles, reconstruction in detector.stream_samples(
        samples, cache=cache, progress=progress
    ):
        cell = _Cell(
            sample.category,
            sample.subclass,
            (sample.category, sample.subclass) in known,
            (sample.defect or "defect") if sample.label == "anomalous" else None,
        )
        predictions.append(_row(sample, outcome, cell))
        cells.append(cell)
        if outcome.anomaly_map is not None and not detector.image_level:
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
                for tile, distance in (
                    zip(tiles, reconstruction, strict=True) if reconstruction is not None else ()
                ):
                    decoded.setdefault(cell, OverGeneralisation()).update(
                        distance, _coverage(mask, tile, distance.shape) if cell.defect else None
                    )
    tables = _tables(cells, predictions, pixels, decoded, told_apart, detector.image_level)
    return tables | {"mask_faults": mask_faults}, predictions


def _coverage(mask: NDArray[np.bool_], tile: Tile, grid: tuple[int, ...]) -> NDArray[np.float32]:
    """Which share of each of a tile's cells the mask covers, (h, w)."""
    rows, columns = slice(tile.top, tile.top + tile.height), slice(tile.left, tile.left + tile.width)
    return coverage(mask[rows, columns], (grid[0], grid[1]))


def _tables(
    cells: list[_Cell],
    predictions: list[dict[str, Any]],
    pixels: dict[_Cell, PixelMetrics],
    decoded: dict[_Cell, OverGeneralisation],
    told_apart: set[str],
    whole_images: bool = False,
) -> dict[str, Any]:
    def table(keep: Callable[[_Cell], bool]) -> dict[str, Any]:
        return _summary(
            [row for row, cell in zip(predictions, cells, strict=True) if keep(cell)],
            [accumulated for cell, accumulated in pixels.items() if keep(cell)],
            [accumulated for cell, accumulated in decoded.items() if keep(cell)],
            told_apart,
            whole_images,
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


def _summary(
    rows: list[dict[str, Any]],
    pixels: list[PixelMetrics],
    decoded: list[OverGeneralisation],
    told_apart: set[str],
    whole_images: bool,
) -> dict[str, Any]:
    """One table.

    `category_accuracy` is the share of the test images, good or not, for which the right category was named; images of
    categories that training has not seen do not count. None where the detector does not tell categories apart: it
    knows only one, or its head does not route.
    """
    read = [row for row in rows if row["error"] is None]
    labels = np.array([row["label"] == "anomalous" for row in read], dtype=bool)
    scores = np.array([row["pred_score"] for row in read], dtype=np.float64)
    values, reasons = image_metrics(labels, scores)
    total = sum(pixels, PixelMetrics())
    pixel_values, pixel_reasons = total.compute()
    if whole_images:
        pixel_reasons = dict.fromkeys(pixel_values, "the model judges whole images and gives no map")
    normal = [row for row in read if row["label"] == "normal"]
    alarms = sum(row["pred_score"] > row["threshold"] for row in normal)
    strangers = sum(row["verdict"] == "unknown" for row in normal)
    low, high = binomial_interval(alarms, len(normal)) if normal else (None, None)
    if not normal:
        reasons["false_alarm_rate"] = "no normal test image"
    named = [row["routed_category"] == row["category"] for row in read if row["category"] in told_apart]
    if len(told_apart) < 2:
        named = []
        reasons["category_accuracy"] = "the detector does not tell categories apart"
    elif not named:
        reasons["category_accuracy"] = "no test image of a known category"
    return {
        **values,
        **pixel_values,
        "over_generalisation": sum(decoded, OverGeneralisation()).compute(),
        "false_alarm_rate": alarms / len(normal) if normal else None,
        "false_alarm_interval": [low, high],
        "unknown_rate": strangers / len(normal) if normal else None,
        "category_accuracy": sum(named) / len(named) if named else None,
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
        if key == "over_generalisation":
            result[key] = (
                {name: _mean_of(value[name] for value in values) for name in values[0]} if values else None
            )
        elif key.startswith("n_"):
            result[key] = sum(values)
        else:
            result[key] = float(np.mean(values)) if values else None
            if not values:
                reasons[key] = "undefined in every part"
    return result | {"reasons": reasons}


def read_metrics(path: Path, samples: Sequence[Sample]) -> dict[str, Any]:
    """The metrics.json of another detector on these test images, to compare over-generalisation with.

    Raises:
        DataError: it is none, that detector does not decode, or it was tested on other images.
    """
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = metrics["pooled"].get("over_generalisation")
        counts = ("n_normal", "n_anomalous", "n_refused")
        there = {
            category: sum(table[key] for key in counts)
            for category, table in sorted(metrics["by_category"].items())
        }
        made_by = {key: metrics["provenance"][key] for key in ("model", "bundle_hash")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no metrics.json of normweave: {type(error).__name__}: {error}. "
            "Give the one that 'normweave evaluate BUNDLE DATA -o DIR' wrote into DIR."
        ) from error
    if not found:
        raise DataError(
            f"{path} holds no over-generalisation: its detector does not decode, no damaged or no good patch was "
            "tested, or it is of an older version. Evaluate a bundle of --model cnc on data with masks."
        )
    here = dict(sorted(Counter(sample.category for sample in samples).items()))
    if here != there:
        raise DataError(
            f"{path} was measured on other test images: {_listed(there)} there, {_listed(here)} here. "
            "Evaluate both bundles on the same data."
        )
    return metrics | {"provenance": made_by}


def _listed(images: dict[str, int]) -> str:
    return ", ".join(f"{count} of {category}" for category, count in images.items())


def compare(metrics: dict[str, Any], other: dict[str, Any]) -> None:
    """Write how over-generalisation differs into each category, the mean and the pooled table: this minus other."""
    pairs = [(metrics[part], other[part]) for part in ("pooled", "mean")]
    pairs += [(table, other["by_category"][category]) for category, table in metrics["by_category"].items()]
    for own, base in pairs:
        here, there = own["over_generalisation"], base["over_generalisation"]
        if here is not None:
            here["change"] = {
                key: None if not there or None in (here[key], there[key]) else here[key] - there[key]
                for key in COMPARED
            }
    metrics["provenance"]["against"] = other["provenance"]


def _mean_of(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


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


def _render(detector: Detector, sample: Sample) -> dict[str, NDArray[np.uint8]]:
    outcome = detector.score(str(sample.image_path))
    assert outcome.anomaly_map is not None
    assert outcome.threshold is not None
    try:
        mask = _mask(sample, outcome.anomaly_map.shape)
    except DataError:  # listed by `measure`
        mask = None
    image = images.decode(sample.image_path)
    return thumbnails(image, outcome.anomaly_map, mask, threshold=outcome.threshold)


def provenance(detector: Detector, data: object) -> dict[str, Any]:
    """Where a table comes from."""
    record = detector.record
    return {
        "normweave": __version__,
        "model": record["model"],
        "precision": record.get("precision", "float32"),
        "data": str(data) if isinstance(data, str | os.PathLike) else "given as samples",
        "bundle_hash": detector.bundle_hash,
        "data_fingerprint": record["data_fingerprint"],
        "seed": record["seed"],
        "fit_images": record["fit_images"],
        "calibration_images": record["calibration_images"],
        "trained_on": list(detector.subclasses),
        "false_alarm_rate": detector.config.outcome.false_alarm_rate,
        "software": record["software"],
    }


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
