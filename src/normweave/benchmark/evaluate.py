"""Evaluate a detector on labelled test images: metrics.json, predictions.csv and the report."""

from __future__ import annotations

import csv
import json
import os
import tempfile
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
from normweave.errors import DataError, NormweaveError
from normweave.maps.overlay import thumbnails
from normweave.references import seen
from normweave.report.metrics import OverGeneralisation, PixelMetrics, binomial_interval, image_metrics
from normweave.report.page import Comparison, Suspect, write_page
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
"""Keys of over-generalisation whose change `compare` computes."""
COMPARED_BOXES = 2
"""Boxes of an image that the report shows beside good images, those with the highest peaks."""


class Stratum(NamedTuple):
    """The test images with these properties are accumulated together; every table is a sum of strata."""

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
    """Score every test image of `data` and write `metrics.json`, `predictions.csv` and `report.html` to `output`.

    Args:
        against: metrics.json of another detector on the same images, to compute the change in over-generalisation.

    Raises:
        DataError: there is no test image, or a test image was used in training; `against` has nothing to compare.
    """
    samples = test_samples(detector.config, data, layout)
    other = None if against is None else read_metrics(against, samples)
    _check_writable(output)
    metrics, predictions = measure(detector, samples, progress=progress)
    output.mkdir(parents=True, exist_ok=True)
    metrics["provenance"] = provenance(detector, data)
    if other is not None:
        compare(metrics, other)
    write_atomically(output / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=2) + "\n"))
    write_atomically(output / "predictions.csv", lambda path: _write_rows(path, predictions))
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
            suspects=[_suspect(detector, *each) for each in detector.record.get("suspects", ())],
        ),
    )
    return metrics


def _check_writable(folder: Path) -> None:
    """Raise OSError before the first image if the results cannot be written; a new folder is not kept yet."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    if new:
        folder.rmdir()


def test_samples(config: Config, data: str | os.PathLike[str] | Sequence[Sample], layout: str | None) -> list[Sample]:
    """Return the test rows of all subclasses; missing splits are drawn with the seed of the training."""
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
    detector: Detector, samples: Sequence[Sample], *, cache: Path | None = None, progress: Progress | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the metrics (metrics.json without provenance) and one row for each image.

    An image whose mask cannot be used is not in the pixel metrics and is listed under `mask_faults`. An image-level
    head has no pixel metrics.
    """
    known = set(detector.subclasses.values())
    categories = {detector.subclasses[name][0] for name in detector.subclass_names}
    pixels: dict[Stratum, PixelMetrics] = {}
    decoded: dict[Stratum, OverGeneralisation] = {}
    predictions: list[dict[str, Any]] = []
    strata: list[Stratum] = []
    mask_faults: list[dict[str, str]] = []
    for sample, outcome, tiles, reconstruction in detector.stream_samples(samples, cache=cache, progress=progress):
        stratum = Stratum(
            sample.category,
            sample.subclass,
            (sample.category, sample.subclass) in known,
            (sample.defect or "defect") if sample.label == "anomalous" else None,
        )
        predictions.append(_row(sample, outcome, stratum))
        strata.append(stratum)
        if outcome.anomaly_map is not None and not detector.image_level:
            accumulated = pixels.setdefault(stratum, PixelMetrics())
            mask = None
            try:
                mask = _mask(sample, outcome.anomaly_map.shape)
            except DataError as error:
                mask_faults.append({"image_path": str(sample.image_path), "reason": str(error)})
            if mask is None:
                accumulated.skip()
            else:
                accumulated.update(outcome.anomaly_map, mask, detector.regions.inside(outcome))
                for tile, distance in zip(tiles, reconstruction, strict=True) if reconstruction is not None else ():
                    decoded.setdefault(stratum, OverGeneralisation()).update(
                        distance, tile_coverage(mask, tile, distance.shape) if stratum.defect else None
                    )
    metrics = make_tables(strata, predictions, pixels, decoded, categories, detector.image_level)
    return metrics | {"mask_faults": mask_faults}, predictions


def tile_coverage(mask: NDArray[np.bool_], tile: Tile, grid: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the share of each cell of a tile that the mask covers, (h, w)."""
    rows, columns = slice(tile.top, tile.top + tile.height), slice(tile.left, tile.left + tile.width)
    return coverage(mask[rows, columns], (grid[0], grid[1]))


def make_tables(
    strata: list[Stratum],
    predictions: list[dict[str, Any]],
    pixels: dict[Stratum, PixelMetrics],
    decoded: dict[Stratum, OverGeneralisation],
    known_categories: set[str],
    image_level: bool = False,
) -> dict[str, Any]:
    """Return the metrics of all test images, of each category, subclass and defect, and of seen and unseen ones.

    Args:
        strata: the stratum of each prediction.
        known_categories: those that the detector was trained on.
        image_level: whether maps have one cell, so that no pixel metrics are computed.
    """

    def table(keep: Callable[[Stratum], bool]) -> dict[str, Any]:
        return _summary(
            [row for row, stratum in zip(predictions, strata, strict=True) if keep(stratum)],
            [accumulated for stratum, accumulated in pixels.items() if keep(stratum)],
            [accumulated for stratum, accumulated in decoded.items() if keep(stratum)],
            known_categories,
            image_level,
        )

    def subclass_name(stratum: Stratum) -> str:
        return stratum.category if stratum.subclass is None else f"{stratum.category}/{stratum.subclass}"

    categories = sorted({stratum.category for stratum in strata})
    subclasses = sorted({subclass_name(stratum) for stratum in strata})
    defects = sorted({stratum.defect for stratum in strata if stratum.defect is not None})
    by_category = {name: table(lambda stratum, name=name: stratum.category == name) for name in categories}  # type: ignore[misc]
    by_subclass = {
        name: table(lambda stratum, name=name: subclass_name(stratum) == name)  # type: ignore[misc]
        for name in subclasses
    }
    return {
        "pooled": table(lambda stratum: True),
        "mean": _mean(by_category.values()),
        "mean_of_subclasses": _mean(by_subclass.values()),
        "seen": table(lambda stratum: stratum.seen),
        "unseen": table(lambda stratum: not stratum.seen),
        "by_category": by_category,
        "by_subclass": by_subclass,
        "by_defect": {
            name: table(lambda stratum, name=name: stratum.defect in (None, name))  # type: ignore[misc]
            for name in defects
        },
    }


def _summary(
    rows: list[dict[str, Any]],
    pixels: list[PixelMetrics],
    decoded: list[OverGeneralisation],
    known_categories: set[str],
    image_level: bool,
) -> dict[str, Any]:
    """Return one table.

    `category_accuracy` is the share of the test images of known categories that were routed to their category; None if
    the detector knows only one category or does not route.
    """
    read = [row for row in rows if row["error"] is None]
    labels = np.array([row["label"] == "anomalous" for row in read], dtype=bool)
    scores = np.array([row["pred_score"] for row in read], dtype=np.float64)
    values, reasons = image_metrics(labels, scores)
    total = sum(pixels, PixelMetrics())
    pixel_values, pixel_reasons = total.compute()
    if image_level:
        pixel_reasons = dict.fromkeys(pixel_values, "the model scores whole images and has no map")
    normal = [row for row in read if row["label"] == "normal"]
    alarms = sum(row["pred_score"] > row["threshold"] for row in normal)
    unknown = sum(row["verdict"] == "unknown" for row in normal)
    low, high = binomial_interval(alarms, len(normal)) if normal else (None, None)
    if not normal:
        reasons["false_alarm_rate"] = "no normal test image"
    correct = [row["routed_category"] == row["category"] for row in read if row["category"] in known_categories]
    if len(known_categories) < 2:
        correct = []
        reasons["category_accuracy"] = "the detector does not distinguish categories"
    elif not correct:
        reasons["category_accuracy"] = "no test image of a known category"
    return {
        **values,
        **pixel_values,
        "over_generalisation": sum(decoded, OverGeneralisation()).compute(),
        "false_alarm_rate": alarms / len(normal) if normal else None,
        "false_alarm_interval": [low, high],
        "unknown_rate": unknown / len(normal) if normal else None,
        "category_accuracy": sum(correct) / len(correct) if correct else None,
        "n_normal": len(normal),
        "n_anomalous": len(read) - len(normal),
        "n_refused": len(rows) - len(read),
        "n_without_mask": total.skipped,
        "reasons": reasons | pixel_reasons,
    }


def _mean(tables: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of each metric over the tables in which it is defined, and the sum of each count."""
    rows = list(tables)
    result: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for key in rows[0]:
        if key in ("reasons", "false_alarm_interval"):
            continue
        values = [row[key] for row in rows if row[key] is not None]
        if key == "over_generalisation":
            result[key] = {name: _mean_of(value[name] for value in values) for name in values[0]} if values else None
        elif key.startswith("n_"):
            result[key] = sum(values)
        else:
            result[key] = float(np.mean(values)) if values else None
            if not values:
                reasons[key] = "undefined in every table"
    return result | {"reasons": reasons}


def read_metrics(path: Path, samples: Sequence[Sample]) -> dict[str, Any]:
    """Read the metrics.json of another detector on the same test images, to compare over-generalisation.

    Raises:
        DataError: the file is not a metrics.json, has no over-generalisation (for example because the detector has no
            decoder), or was measured on other images.
    """
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = metrics["pooled"].get("over_generalisation")
        counts = ("n_normal", "n_anomalous", "n_refused")
        tested = {
            category: sum(table[key] for key in counts) for category, table in sorted(metrics["by_category"].items())
        }
        made_by = {key: metrics["provenance"][key] for key in ("model", "bundle_hash")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a metrics.json of normweave: {type(error).__name__}: {error}. "
            "Give the file that 'normweave evaluate BUNDLE DATA -o DIR' wrote to DIR."
        ) from error
    if not found:
        raise DataError(
            f"{path} holds no over-generalisation: its detector does not decode, no anomalous or no normal patch was "
            "tested, or it is of an older version. Evaluate a bundle of --model cnc on data with masks."
        )
    given = dict(sorted(Counter(sample.category for sample in samples).items()))
    if given != tested:
        raise DataError(
            f"{path} was measured on other test images: {_listed(tested)} instead of {_listed(given)}. "
            "Evaluate both bundles on the same data."
        )
    return metrics | {"provenance": made_by}


def _listed(images: dict[str, int]) -> str:
    return ", ".join(f"{count} of {category}" for category, count in images.items())


def compare(metrics: dict[str, Any], other: dict[str, Any]) -> None:
    """Add the change in over-generalisation (this minus other) to each category, the mean and the pooled table."""
    pairs = [(metrics[part], other[part]) for part in ("pooled", "mean")]
    pairs += [(table, other["by_category"][category]) for category, table in metrics["by_category"].items()]
    for own, base in pairs:
        values, others = own["over_generalisation"], base["over_generalisation"]
        if values is not None:
            values["change"] = {
                key: None if not others or None in (values[key], others[key]) else values[key] - others[key]
                for key in COMPARED
            }
    metrics["provenance"]["against"] = other["provenance"]


def _mean_of(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _row(sample: Sample, outcome: Outcome, stratum: Stratum) -> dict[str, Any]:
    return {
        "image_path": str(sample.image_path),
        "category": sample.category,
        "subclass": sample.subclass,
        "seen": stratum.seen,
        "label": sample.label,
        "defect": stratum.defect,
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
    """Return True where defective; None for an anomalous image whose mask is missing or empty."""
    if sample.label == "normal":
        return np.zeros(shape, dtype=bool)
    if sample.mask_path is None:
        return None
    mask = images.read_mask(sample.mask_path, height=shape[0], width=shape[1])
    return mask if mask.any() else None


def _render(detector: Detector, sample: Sample) -> tuple[dict[str, NDArray[np.uint8]], list[Comparison]]:
    outcome = detector.score(str(sample.image_path))
    assert outcome.anomaly_map is not None
    try:
        mask = _mask(sample, outcome.anomaly_map.shape)
    except DataError:  # listed by `measure`
        mask = None
    image = images.decode(sample.image_path)
    compared = []
    if (references := detector.network.references) is not None:
        boxes = [box for box in outcome.boxes if references.shows(box)][:COMPARED_BOXES]
        compared = [Comparison(seen(image, box), references.expected(box), str(box.reference)) for box in boxes]
    threshold, inside = detector.box_threshold(outcome), detector.regions.inside(outcome)
    return thumbnails(image, outcome.anomaly_map, mask, threshold=threshold, inside=inside), compared


def _suspect(detector: Detector, image_path: str, score: float) -> Suspect:
    """Return a suspect with its pictures; the training images may be elsewhere by now."""
    try:
        return Suspect(image_path, score, _render(detector, Sample(image_path=Path(image_path)))[0], "")
    except NormweaveError as error:
        return Suspect(image_path, score, {}, str(error))


def provenance(detector: Detector, data: object) -> dict[str, Any]:
    """Return what a table was made from."""
    record, calibration = detector.record, detector.calibration
    assert calibration is not None  # else there is no verdict to measure
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
        "cross_validated": calibration.cross_validated,
        "trained_on": list(detector.subclasses),
        "budget": record.get("budget"),
        "fusion": record.get("notes", {}).get("fusion"),
        "false_alarm_rate": calibration.point().false_alarm_rate,
        "guarantee": calibration.guarantee,
        "independent_groups": calibration.independent_groups,
        "promise": calibration.promise,
        "software": record["software"],
    }


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
