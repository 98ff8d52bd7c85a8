"""The report: one HTML file with its style and images inside, without scripts.

Its content security policy forbids requests to other computers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from normweave.atomic import write_atomically
from normweave.errors import NormweaveError
from normweave.report.figures import Series, score_histogram
from normweave.report.html import percent, render

EXAMPLES = 6
"""Images in each of the four parts of the gallery."""
LISTED = 50
"""Unreadable images that are listed by name."""
VERDICTS = ("normal", "anomalous", "unknown")

Row = Mapping[str, Any]
Cell = str | tuple[str, str] | None
"""A text, a text with a second one below it, or None for a missing number."""
Line = tuple[str, str | None, list[Cell]]
"""Name, tag and cells of a table row."""


class Comparison(NamedTuple):
    """A box beside the region of a good image that it was compared with, (h, w, 3) each."""

    seen: NDArray[np.uint8]
    expected: NDArray[np.uint8]
    reference: str  # name of the good image


Render = Callable[[int], tuple[Mapping[str, NDArray[np.uint8]], Sequence[Comparison]]]

COLUMNS = (
    ("image_auroc", "image AUROC"),
    ("image_ap", "image AP"),
    ("image_f1max", "image F1max"),
    ("pixel_auroc", "pixel AUROC"),
    ("pixel_ap", "pixel AP"),
    ("pixel_f1max", "pixel F1max"),
    ("aupro", "AUPRO"),
    ("false_alarm_rate", "false alarms"),
    ("unknown_rate", "unknown"),
)
"""Keys of metrics.json and their column titles."""


class Section(NamedTuple):
    """A heading with a table."""

    heading: str
    text: str
    heads: Sequence[str]
    rows: Sequence[Line]
    totals: Sequence[Line] = ()
    notes: Sequence[str] = ()
    """Reasons of missing numbers."""


class Suspect(NamedTuple):
    """A training image that scores far above the others of its subclass."""

    image_path: str
    score: float
    images: Mapping[str, NDArray[np.uint8]]
    """Thumbnails (h, w, 3) by caption."""
    error: str
    """Shown where there are no thumbnails."""


def write_page(
    path: Path,
    *,
    title: str,
    metrics: Mapping[str, Any],
    predictions: Sequence[Row],
    render_images: Render,
    provenance: Mapping[str, Any],
    suspects: Sequence[Suspect] = (),
) -> None:
    """Write the report of one evaluation.

    Args:
        metrics: the content of metrics.json; tables that are missing or empty are left out.
        predictions: one row per image, as in predictions.csv.
        render_images: returns the thumbnails (h, w, 3) of prediction i by caption, and its boxes beside good images;
            called for at most 24 predictions.
            A NormweaveError is shown instead of the thumbnails.
        provenance: origin of the numbers; `trained_on` lists the subclasses, `false_alarm_rate` the target, `promise`
            what it rests on, `fusion` the weights of the experts by category, `budget` the choice of the input size.
        suspects: training images that may be defective.
    """
    read = [row for row in predictions if row["error"] is None]
    by_label = {label: [row for row in read if row["label"] == label] for label in ("anomalous", "normal")}
    page = render(
        "report.html",
        title=title,
        version=provenance.get("normweave", ""),
        about=[str(provenance[key]) for key in ("model", "data") if provenance.get(key) is not None],
        images=bool(read),
        summary=[
            (len(rows), sum(row["verdict"] != "normal" for row in rows), name)
            for rows, name in zip(by_label.values(), ("defective", "good"), strict=True)
        ],
        cards=list(_cards(metrics["pooled"], provenance.get("false_alarm_rate"))),
        trained_on=provenance.get("trained_on", ()),
        promise=provenance.get("promise"),
        suspects=[(PurePath(each.image_path).name, each) for each in suspects],
        training_images=_training_images(provenance),
        budget=_budget(provenance.get("budget")),
        fusion=_fusion(provenance.get("fusion")),
        histogram=_histogram(read),
        verdicts=VERDICTS,
        confusion=[
            (name, [sum(row["verdict"] == verdict for row in by_label[label]) for verdict in VERDICTS])
            for label, name in (("normal", "good images"), ("anomalous", "defective images"))
        ],
        tables=[section for section in (_subclasses(metrics, read), _categories(metrics)) if section],
        over_generalisation=_over_generalisation(metrics, provenance.get("against")),
        defects=_defects(metrics),
        routing=_routing(read),
        gallery=list(_gallery(predictions, render_images)),
        unreadable=[row for row in predictions if row["error"] is not None],
        listed=LISTED,
        provenance=provenance,
    )
    write_atomically(path, lambda temporary: temporary.write_text(page, "utf-8", "backslashreplace"))


def _cards(pooled: Row, target: float | None) -> Iterator[tuple[str, float | None, str]]:
    """Yield title, value and explanation of each number at the top."""
    low, high = pooled.get("false_alarm_interval") or (None, None)
    alarms = [] if target is None else [f"target: at most {100 * target:g}\u00a0%"]
    if low is not None and high is not None:
        alarms.append(f"95\u00a0% confidence interval: {percent(low)} to {percent(high)}\u00a0%")
    for key, title, note in (
        ("image_auroc", "Image AUROC", "probability that a defective image scores higher than a good one"),
        ("pixel_auroc", "Pixel AUROC", "probability that a defective pixel scores higher than a good one"),
        ("aupro", "AUPRO at 0.3", "mean share of each defect that is detected"),
        ("false_alarm_rate", "False alarms", "; ".join(alarms)),
        ("unknown_rate", "Unknown", "good images that match no known subclass"),
    ):
        value = pooled.get(key)
        reason = pooled.get("reasons", {}).get(key, "not measured")
        yield title, value, reason if value is None else note


def _histogram(read: Sequence[Row]) -> Markup | None:
    rows = [row for row in read if row["pred_score"] is not None and row["threshold"] is not None]
    if not rows:
        return None
    thresholds = {row["threshold"] for row in rows}
    shared = len(thresholds) == 1
    normal, anomalous = (
        [row["pred_score"] - (0 if shared else row["threshold"]) for row in rows if row["label"] == label]
        for label in ("normal", "anomalous")
    )
    return score_histogram(
        Series("normal", normal, "good, accepted", "good, false alarms"),
        Series("anomalous", anomalous, "defective, missed", "defective, detected"),
        threshold=thresholds.pop() if shared else 0.0,
        axis="anomaly score" if shared else "anomaly score minus the threshold of the image's subclass",
    )


def _subclasses(metrics: Mapping[str, Any], read: Sequence[Row]) -> Section | None:
    tables = metrics.get("by_subclass", {})
    if not tables:
        return None
    seen = {_subclass(row): row["seen"] for row in read if row.get("seen") is not None}
    totals = [
        ("pooled", "all images together"),
        ("mean", "mean of categories"),
        ("mean_of_subclasses", "mean of subclasses"),
    ]
    if len(set(seen.values())) == 2:
        totals += [("unseen", "all unseen"), ("seen", "all seen")]
    return _section(
        "Subclasses",
        "Seen: good images of this subclass were in the training set. Unseen: none were.",
        {name: tables[name] for name in sorted(tables, key=lambda name: (not seen.get(name, True), name))},
        {
            name: metrics[key]
            for key, name in reversed(totals)
            if metrics.get(key) and (metrics[key]["n_normal"] or metrics[key]["n_anomalous"])
        },
        tags={name: "seen" if known else "unseen" for name, known in seen.items()},
    )


def _categories(metrics: Mapping[str, Any]) -> Section | None:
    tables = metrics.get("by_category", {})
    if len(tables) < 2:
        return None
    accuracy = metrics["pooled"].get("category_accuracy")
    text = "One row a product or material. All images together are ranked under one threshold."
    columns = list(COLUMNS)
    if accuracy is not None:
        text += f" {percent(accuracy)}\u00a0% of the images were routed to their own category."
        columns.append(("category_accuracy", "category accuracy"))
    totals = {"mean of categories": metrics["mean"], "all images together": metrics["pooled"]}
    return _section("Categories", text, tables, totals, columns=columns)


def _defects(metrics: Mapping[str, Any]) -> Section | None:
    if not metrics.get("by_defect"):
        return None
    return _section(
        "Defects",
        "Each defect type against all good images. The false-alarm rate does not depend on the defect type.",
        metrics["by_defect"],
        {},
        columns=[column for column in COLUMNS if column[0] not in ("false_alarm_rate", "unknown_rate")],
    )


def _fusion(categories: Sequence[Row] | None) -> Section | None:
    if not categories:
        return None

    def line(each: Row) -> Line:
        measured = each["synthetic_defects"] > 0
        cells: list[Cell] = [str(each["held_out_images"]) if measured else None, str(each["synthetic_defects"])]
        for expert in each["experts"]:
            weight = f"{expert['weight']:.2f}"
            cells.append((weight, f"({percent(expert['synthetic_auroc'])})") if measured else weight)
        return each["category"], None, cells

    return Section(
        "Weights of the experts",
        "The score is a weighted mean of the scores of these experts. The better an expert finds synthetic defects "
        "in held-out good images, the larger its weight. An expert with the weight 0 is not used. Test images have no "
        "part in this.",
        ["held-out good images", "synthetic defects", *(expert["name"] for expert in categories[0]["experts"])],
        [line(each) for each in categories],
    )


def _training_images(provenance: Mapping[str, Any]) -> list[tuple[int | None, str]]:
    """Return how many images were used for what; those of a cross-validation are counted once."""
    fitted = provenance.get("fit_images")
    if provenance.get("cross_validated"):
        return [(fitted, "fit the model and, by cross-validation, to set the thresholds")]
    return [(fitted, "fit the model"), (provenance.get("calibration_images"), "set the thresholds")]


def _budget(budget: Row | None) -> Section | None:
    compared = [each for each in (budget or {}).get("candidates", ()) if each["auroc"] is not None]
    if not compared:
        return None
    lines: list[Line] = []
    for each in compared:
        cells: list[Cell] = [percent(each["auroc"]), f"{each['cost']:.2f}", f"{each['image_ms']:.1f}"]
        name = f"{each['height']} x {each['width']}, tiles beyond {each['tile_beyond']:g}"
        lines.append((name, None, [*cells, "chosen" if each["chosen"] else None]))
    return Section(
        "Input size and tiles",
        "Held-out good images with and without small synthetic defects, by a head for each input size and tiling. The "
        "cheapest one is chosen whose AUROC is within two standard errors of the highest. Test images have no part in "
        "this.",
        ["AUROC", "relative cost", "ms an image", ""],
        lines,
    )


def _over_generalisation(metrics: Mapping[str, Any], against: Mapping[str, Any] | None) -> Section | None:
    if not metrics["pooled"].get("over_generalisation"):
        return None
    columns = [
        ("d_normal", "d normal", 1, ".3f"),
        ("d_abnormal", "d abnormal", 1, ".3f"),
        ("ratio", "ratio", 1, ".2f"),
        ("cell_auroc", "cell AUROC", 100, ".1f"),
    ]
    changes = [(key, f"change of {title}", scale, f"+{style}") for key, title, scale, style in columns[2:]]
    text = (
        "Distances between patches and their reconstruction. A decoder that over-generalises reconstructs defective "
        "patches as well as good ones: the ratio falls towards 1 and the cell AUROC towards 50."
    )
    if against:
        model, version = against["model"], str(against["bundle_hash"])[:12]
        text += f" Change: difference to {model}, bundle {version}."

    def line(name: str, table: Row) -> Line:
        values = table["over_generalisation"] or {}
        cells = [_number(values.get(key), scale, style) for key, _, scale, style in columns]
        if against:
            change = values.get("change", {})
            cells += [_number(change.get(key), scale, style) for key, _, scale, style in changes]
        return name, None, cells

    categories = metrics["by_category"]
    totals = {"mean of categories": metrics["mean"], "all images together": metrics["pooled"]}
    return Section(
        "Over-generalisation",
        text,
        [title for _, title, _, _ in (columns + changes if against else columns)],
        [line(*item) for item in categories.items()],
        [line(*item) for item in totals.items()] if len(categories) > 1 else (),
    )


def _section(
    heading: str,
    text: str,
    tables: Mapping[str, Row],
    totals: Mapping[str, Row],
    *,
    tags: Mapping[str, str] | None = None,
    columns: Sequence[tuple[str, str]] = COLUMNS,
) -> Section:
    def line(name: str, table: Row) -> Line:
        cells: list[Cell] = [str(table["n_normal"]), str(table["n_anomalous"])]
        for key, _ in columns:
            cell: Cell = _number(table.get(key), 100, ".1f")
            interval = table.get("false_alarm_interval") if key == "false_alarm_rate" else None
            if isinstance(cell, str) and interval and None not in interval:
                cell = cell, f"({percent(interval[0])}-{percent(interval[1])})"
            cells.append(cell)
        return name, (tags or {}).get(name), cells

    return Section(
        heading,
        text,
        ["good", "defective", *(title for _, title in columns)],
        [line(*item) for item in tables.items()],
        [line(*item) for item in totals.items()],
        _notes({**tables, **totals}, columns),
    )


def _notes(tables: Mapping[str, Row], columns: Sequence[tuple[str, str]]) -> list[str]:
    """Return each reason of missing numbers once, with its columns and rows."""
    missing: dict[tuple[str, str], list[str]] = {}
    for name, table in tables.items():
        reasons = table.get("reasons", {})
        absent = [(reasons.get(key, "not measured"), title) for key, title in columns if table.get(key) is None]
        absent.sort(key=lambda pair: pair[0])
        for reason, group in groupby(absent, key=lambda pair: pair[0]):
            titles = ", ".join(title for _, title in group)
            missing.setdefault((reason, titles), []).append(name)
    return [f"{', '.join(rows)}: no {titles}, because: {reason}" for (reason, titles), rows in missing.items()]


def _routing(read: Sequence[Row]) -> dict[str, Any] | None:
    """Return the confusion matrix of subclasses: column names, and rows of name, shares and number of images."""
    rows = [row for row in read if row.get("routed_subclass") is not None]
    if not rows:
        return None
    columns = sorted({_routed(row) for row in rows})
    names = sorted({_subclass(row) for row in rows}, key=lambda name: (name not in columns, name))
    lines = []
    for name in names:
        routed = [_routed(row) for row in rows if _subclass(row) == name]
        lines.append((name, [routed.count(column) / len(routed) for column in columns], len(routed)))
    return {"columns": columns, "rows": lines}


def _gallery(predictions: Sequence[Row], render_images: Render) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield heading, text and figures of each part."""
    for heading, text, labels, verdict, highest_first in (
        ("Clearest detections", "Defects with scores farthest above the threshold.", ["anomalous"], "anomalous", True),
        ("Missed defects", "Defects classified as normal, lowest scores first.", ["anomalous"], "normal", False),
        ("False alarms", "Good images classified as anomalous, highest scores first.", ["normal"], "anomalous", True),
        ("Unknown", "Images that match no known subclass.", ["normal", "anomalous"], "unknown", True),
    ):  # fmt: skip
        chosen = [
            i
            for i, row in enumerate(predictions)
            if row["error"] is None and row["verdict"] == verdict and row["label"] in labels
        ]
        chosen.sort(key=lambda i: predictions[i]["pred_score"] - predictions[i]["threshold"], reverse=highest_first)
        groups = [(_subclass(predictions[i]), predictions[i]["defect"]) for i in chosen]
        yield (
            heading,
            text,
            [_figure(predictions[i], i, render_images) for i in _varied(chosen, groups)[:EXAMPLES]],
        )


def _figure(row: Row, number: int, render_images: Render) -> dict[str, Any]:
    images, comparisons, reason = dict[str, NDArray[np.uint8]](), list[Comparison](), ""
    try:
        thumbnails, compared = render_images(number)
        images, comparisons = dict(thumbnails), list(compared)
    except NormweaveError as error:
        reason = str(error)
    return {
        "name": PurePath(str(row["image_path"])).name,
        "row": row,
        "subclass": _subclass(row),
        "truth": "good" if row["label"] == "normal" else row["defect"] or "defective",
        "routed": None if row.get("routed_subclass") is None else _routed(row),
        "images": images,
        "comparisons": comparisons,
        "error": reason,
    }


def _varied(items: Sequence[int], groups: Sequence[object]) -> list[int]:
    """Return the first item of every group, then every second one, and so on; otherwise in the given order."""
    counts: dict[object, int] = {}
    ranked = []
    for position, (item, group) in enumerate(zip(items, groups, strict=True)):
        counts[group] = counts.get(group, 0) + 1
        ranked.append((counts[group], position, item))
    return [item for _, _, item in sorted(ranked)]


def _subclass(row: Row) -> str:
    return _joined(row["category"], row["subclass"])


def _routed(row: Row) -> str:
    return _joined(row.get("routed_category") or row["category"], row["routed_subclass"])


def _joined(category: str, subclass: str | None) -> str:
    return category if subclass is None else f"{category}/{subclass}"


def _number(value: float | None, scale: int, style: str) -> Cell:
    return None if value is None else f"{scale * value:{style}}"
