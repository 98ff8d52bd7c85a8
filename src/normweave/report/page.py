"""The report: one HTML file that needs nothing else, for the screen beside the line, a tablet or paper.

No script and no request to anywhere: style and pictures stand in the file, and its content security policy forbids
the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave.errors import NormweaveError
from normweave.report.figures import data_uri, panels, score_histogram

PICTURES = 6
"""Images in each of the gallery's four parts."""
LISTED = 50
"""Unreadable images that are listed by name."""
DASH = "–"

Row = Mapping[str, Any]

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
"""Shares in metrics.json, and their name in a table's head."""


class Rendered(NamedTuple):
    """What the gallery shows of one image."""

    image: NDArray[np.uint8]  # (H, W, 3)
    anomaly_map: NDArray[np.float32]  # (H, W)
    mask: NDArray[np.bool_] | None  # (H, W) True where defective


def write_page(
    path: Path,
    *,
    title: str,
    metrics: Mapping[str, Any],
    predictions: Sequence[Row],
    render: Callable[[int], Rendered],
    provenance: Mapping[str, Any],
) -> None:
    """Write the report of one evaluation.

    Args:
        metrics: what metrics.json holds; tables that it lacks, or that are empty, are left out.
        predictions: one row an image, as in predictions.csv.
        render: the pictures of prediction i; asked for at most 24 of them.
        provenance: where the numbers come from; `trained_on` names the subclasses, `false_alarm_rate` the promise.
    """
    read = [row for row in predictions if row["error"] is None]
    pooled = metrics["pooled"]
    body = [
        _header(title, read, provenance),
        _cards(pooled, provenance),
        _training(provenance),
        _scores(read),
        _subclasses(metrics, read),
        _categories(metrics),
        _over_generalisation(metrics, provenance),
        _table_section(
            "Defects",
            "Each kind of defect against all good images. False alarms do not depend on the defect.",
            metrics.get("by_defect", {}),
            leave_out=("false_alarm_rate", "unknown_rate"),
        ),
        _routing(read),
        _gallery(predictions, render),
        _unreadable([row for row in predictions if row["error"] is not None]),
        _words(),
        _provenance(provenance),
    ]
    page = document(title, "".join(body), made_by=f"normweave {provenance.get('normweave', '')}")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def document(title: str, body: str, *, made_by: str) -> str:
    """A whole page around a body of HTML: our style, no script, no request to anywhere."""
    css = resources.files("normweave.report").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>
{css}</style>
</head>
<body>
<main>
{body}
<footer>Made by {escape(made_by)}.
This file holds everything it shows and asks no other computer for anything.</footer>
</main>
</body>
</html>
"""


def _header(title: str, read: Sequence[Row], provenance: Mapping[str, Any]) -> str:
    good = [row for row in read if row["label"] == "normal"]
    bad = [row for row in read if row["label"] == "anomalous"]
    sentences = []
    if bad:
        caught = sum(row["verdict"] != "normal" for row in bad)
        sentences.append(f"Of {_many(len(bad), 'defective image')}, <b>{caught} were stopped</b>.")
    if good:
        stopped = sum(row["verdict"] != "normal" for row in good)
        sentences.append(f"Of {_many(len(good), 'good image')}, <b>{stopped} were stopped</b>.")
    if read:
        sentences.append("Stopped means called anomalous or unknown.")
    else:
        sentences.append("No test images: this page says what the detector was made from.")
    about = " · ".join(
        escape(str(provenance[key])) for key in ("model", "data") if provenance.get(key) is not None
    )
    return (
        f'<header><h1>{escape(title)}</h1><div class="soft">{about}</div>'
        f'<p class="lead">{" ".join(sentences)}</p></header>'
    )


def _cards(pooled: Row, provenance: Mapping[str, Any]) -> str:
    reasons = pooled.get("reasons", {})

    def card(key: str, name: str, note: str) -> str:
        value = pooled.get(key)
        shown = f"{100 * value:.1f}<small> %</small>" if value is not None else DASH
        told = note if value is not None else reasons.get(key, "not measured")
        return (
            f'<div class="card"><div class="name">{name}</div><div class="value">{shown}</div>'
            f'<div class="note">{escape(told)}</div></div>'
        )

    promised = provenance.get("false_alarm_rate")
    promise = "" if promised is None else f"promised: at most {100 * promised:g}\u00a0%; "
    low, high = pooled.get("false_alarm_interval") or (None, None)
    interval = (
        ""
        if low is None or high is None
        else f"measured, with 95\u00a0% confidence: {_percent(low)} to {_percent(high)}\u00a0%"
    )
    return (
        '<div class="cards">'
        + card("image_auroc", "Image AUROC", "how often a defective image scores higher than a good one")
        + card("pixel_auroc", "Pixel AUROC", "how often a defective pixel scores higher than a good one")
        + card("aupro", "AUPRO at 0.3", "how much of each defect is covered")
        + card("false_alarm_rate", "False alarms", promise + interval)
        + card("unknown_rate", "Unknown", "good images that belong to no kind the model knows")
        + "</div>"
    )


def _training(provenance: Mapping[str, Any]) -> str:
    if not provenance.get("trained_on"):
        return ""
    kinds = provenance["trained_on"]
    counts = "".join(
        f" {_many(provenance[key], 'good image')} {use}."
        for key, use in (
            ("fit_images", "taught it what is normal"),
            ("calibration_images", "set the operating point"),
        )
        if provenance.get(key) is not None
    )
    names = " ".join(f'<span class="tag seen">{escape(str(kind))}</span>' for kind in kinds)
    return (
        f"<section><h2>What it was trained on</h2><p>Good images of {_many(len(kinds), 'kind')}.{counts}</p>"
        f"<div>{names}</div></section>"
    )


def _scores(read: Sequence[Row]) -> str:
    rows = [row for row in read if row["pred_score"] is not None and row["threshold"] is not None]
    if not rows:
        return ""
    thresholds = {row["threshold"] for row in rows}
    shared = len(thresholds) == 1
    line = thresholds.pop() if shared else 0.0
    scores = {
        label: [
            row["pred_score"] - (0 if shared else row["threshold"]) for row in rows if row["label"] == label
        ]
        for label in ("normal", "anomalous")
    }
    axis = "score" if shared else "score above the operating point of the image's own subclass"
    chart = score_histogram(scores["normal"], scores["anomalous"], line=line, axis=axis)
    verdicts = ("normal", "anomalous", "unknown")
    lines = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(
            f"<td>{sum(row['label'] == label and row['verdict'] == verdict for row in rows)}</td>"
            for verdict in verdicts
        )
        + "</tr>"
        for label, name in (("normal", "good images"), ("anomalous", "defective images"))
    )
    head = "".join(f'<th scope="col"><span class="tag {name}">{name}</span></th>' for name in verdicts)
    return (
        "<section><h2>Scores and verdicts</h2>"
        '<p class="soft">Good images above the axis, defective ones below it. Bars in full colour are on the wrong '
        f'side of the operating point.</p><div class="scroll">{chart}</div>'
        '<div class="scroll"><table class="matrix"><caption>Verdicts, numbers of images</caption>'
        f'<thead><tr><th class="text"></th>{head}</tr></thead><tbody>{lines}</tbody></table></div></section>'
    )


def _subclasses(metrics: Mapping[str, Any], read: Sequence[Row]) -> str:
    tables = metrics.get("by_subclass", {})
    if not tables:
        return ""
    seen = {_kind(row): row["seen"] for row in read if row.get("seen") is not None}
    totals = {
        name: metrics[key]
        for key, name in (
            ("seen", "all seen"),
            ("unseen", "all unseen"),
            ("mean_of_subclasses", "mean of subclasses"),
            ("mean", "mean of categories"),
            ("pooled", "all images together"),
        )
        if metrics.get(key) and (metrics[key]["n_normal"] or metrics[key]["n_anomalous"])
    }
    if len(set(seen.values())) < 2:
        totals = {name: table for name, table in totals.items() if name not in ("all seen", "all unseen")}
    order = sorted(tables, key=lambda kind: (not seen.get(kind, True), kind))
    tags = {
        kind: f' <span class="tag {word}">{word}</span>'
        for kind in order
        if kind in seen
        for word in ["seen" if seen[kind] else "unseen"]
    }
    return (
        "<section><h2>Subclasses</h2>"
        '<p class="soft">Seen: good images of this kind were in training. Unseen: the model meets it here for the '
        f"first time.</p>{_table({kind: tables[kind] for kind in order}, totals, tags=tags)}</section>"
    )


def _categories(metrics: Mapping[str, Any]) -> str:
    tables = metrics.get("by_category", {})
    if len(tables) < 2:
        return ""
    totals = {"mean of categories": metrics["mean"], "all images together": metrics["pooled"]}
    named = metrics["pooled"].get("category_accuracy")
    told = "" if named is None else f" The right one was named for {_percent(named)}\u00a0% of the images."
    further = () if named is None else (("category_accuracy", "category named"),)
    return (
        '<section><h2>Categories</h2><p class="soft">One row a product or material; all images together are ranked '
        f"under one threshold.{told}</p>{_table(tables, totals, further=further)}</section>"
    )


def _over_generalisation(metrics: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    if not metrics["pooled"].get("over_generalisation"):
        return ""
    rows = list(metrics["by_category"].items())
    kept = len(rows)
    if kept > 1:
        rows += [("mean of categories", metrics["mean"]), ("all images together", metrics["pooled"])]
    against = provenance.get("against")
    heads = ["d normal", "d abnormal", "ratio", "cell AUROC"]
    if against:
        heads += ["change of ratio", "change of cell AUROC"]
    lines = []
    for name, table in rows:
        values = table["over_generalisation"] or {}
        shown = [
            _number(values.get("d_normal"), ".3f"),
            _number(values.get("d_abnormal"), ".3f"),
            _number(values.get("ratio"), ".2f"),
            _number(values.get("cell_auroc"), ".1f", scale=100),
        ]
        if against:
            change = values.get("change", {})
            shown += [
                _number(change.get("ratio"), "+.2f"),
                _number(change.get("cell_auroc"), "+.1f", scale=100),
            ]
        cells = "".join(
            f'<td class="nothing">{DASH}</td>' if one == DASH else f"<td>{one}</td>" for one in shown
        )
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    total = "".join(lines[kept:])
    compared = (
        f" Change: against {escape(str(against['model']))}, bundle {escape(str(against['bundle_hash'])[:12])}."
        if against
        else ""
    )
    return (
        '<section><h2>Over-generalisation</h2><p class="soft">How far patches lie from what the decoder makes of them: '
        "a decoder that over-generalises reconstructs damaged patches as well as good ones, so that the ratio falls "
        f"towards 1 and the cell AUROC towards 50.{compared}</p>"
        '<div class="scroll"><table><caption>Mean distances of good (d normal) and damaged patches (d abnormal), their '
        "ratio, and per cent of the pairs in which the damaged patch lies farther (cell AUROC)</caption>"
        f'<thead><tr><th class="text"></th>{columns}</tr></thead>'
        f"<tbody>{''.join(lines[:kept])}</tbody>"
        + (f'<tbody class="total">{total}</tbody>' if total else "")
        + "</table></div></section>"
    )


def _table_section(
    heading: str, text: str, tables: Mapping[str, Row], *, leave_out: Sequence[str] = ()
) -> str:
    if not tables:
        return ""
    table = _table(tables, {}, leave_out=leave_out)
    return f'<section><h2>{heading}</h2><p class="soft">{text}</p>{table}</section>'


def _table(
    tables: Mapping[str, Row],
    totals: Mapping[str, Row],
    *,
    tags: Mapping[str, str] | None = None,
    leave_out: Sequence[str] = (),
    further: Sequence[tuple[str, str]] = (),
) -> str:
    columns = [(key, name) for key, name in (*COLUMNS, *further) if key not in leave_out]

    def line(name: str, table: Row) -> str:
        cells = "".join(f"<td>{table[key]}</td>" for key in ("n_normal", "n_anomalous"))
        for key, _ in columns:
            value = table.get(key)
            interval = table.get("false_alarm_interval") if key == "false_alarm_rate" else None
            if value is None:
                cells += f'<td class="nothing">{DASH}</td>'
            elif interval and interval[0] is not None:
                cells += f"<td>{_percent(value)} <small>({_percent(interval[0])}-{_percent(interval[1])})</small></td>"
            else:
                cells += f"<td>{_percent(value)}</td>"
        return f'<tr><th scope="row">{escape(name)}{(tags or {}).get(name, "")}</th>{cells}</tr>'

    heads = "".join(
        f'<th scope="col">{name}</th>' for name in ("good", "defective", *(n for _, n in columns))
    )
    body = "".join(line(name, table) for name, table in tables.items())
    total = "".join(line(name, table) for name, table in totals.items())
    return (
        '<div class="scroll"><table><caption>Numbers of images; then per cent, in brackets the 95 % interval'
        f'</caption><thead><tr><th class="text"></th>{heads}</tr></thead><tbody>{body}</tbody>'
        + (f'<tbody class="total">{total}</tbody>' if total else "")
        + f"</table></div>{_notes({**tables, **totals}, columns)}"
    )


def _notes(tables: Mapping[str, Row], columns: Sequence[tuple[str, str]]) -> str:
    """Why numbers are missing: each reason once, with the columns and rows that it holds for."""
    missing: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, table in tables.items():
        reasons = table.get("reasons", {})
        absent = [
            (reasons.get(key, "not measured"), title) for key, title in columns if table.get(key) is None
        ]
        for reason, group in groupby(sorted(absent, key=_reason), key=_reason):
            missing.setdefault((reason, tuple(title for _, title in group)), []).append(name)
    if not missing:
        return ""
    items = "".join(
        f"<li>{DASH} {escape(', '.join(rows))}: no {escape(', '.join(titles))}, because: {escape(reason)}</li>"
        for (reason, titles), rows in missing.items()
    )
    return f'<ul class="notes">{items}</ul>'


def _routing(read: Sequence[Row]) -> str:
    rows = [row for row in read if row.get("routed_subclass") is not None]
    if not rows:
        return ""
    true = sorted(
        {_kind(row) for row in rows}, key=lambda kind: (kind not in {_routed(r) for r in rows}, kind)
    )
    routed = sorted({_routed(row) for row in rows})
    counts = {(t, r): 0 for t in true for r in routed}
    for row in rows:
        counts[_kind(row), _routed(row)] += 1
    lines = ""
    for t in true:
        total = sum(counts[t, r] for r in routed)
        cells = "".join(
            f'<td class="share" style="--share:{counts[t, r] / total:.3f}">{100 * counts[t, r] / total:.0f}</td>'
            if counts[t, r]
            else f'<td class="nothing">{DASH}</td>'
            for r in routed
        )
        lines += f'<tr><th scope="row">{escape(t)}</th>{cells}<td class="nothing">{total}</td></tr>'
    heads = "".join(f'<th scope="col">{escape(r)}</th>' for r in routed)
    return (
        "<section><h2>Routing</h2>"
        '<p class="soft">For each kind of image (rows) the subclass that the model took it for (columns), per cent. '
        "An unseen kind has no column of its own: it goes to what it resembles.</p>"
        '<div class="scroll"><table class="matrix"><thead><tr><th class="text">is ↓ · taken for →</th>'
        f'{heads}<th scope="col">images</th></tr></thead><tbody>{lines}</tbody></table></div></section>'
    )


def _gallery(predictions: Sequence[Row], render: Callable[[int], Rendered]) -> str:
    def chosen(label: str | None, verdict: str, *, highest: bool) -> list[int]:
        fitting = [
            i
            for i, row in enumerate(predictions)
            if row["error"] is None and row["verdict"] == verdict and label in (None, row["label"])
        ]
        fitting.sort(key=lambda i: _margin(predictions[i]), reverse=highest)
        return _varied(fitting, [(_kind(predictions[i]), predictions[i]["defect"]) for i in fitting])[
            :PICTURES
        ]

    parts = (
        (
            "Clearest hits",
            "Defects that lie farthest above the operating point.",
            "anomalous",
            "anomalous",
            True,
        ),
        (
            "Missed defects",
            "Defective images called normal, the lowest scores first.",
            "anomalous",
            "normal",
            False,
        ),
        (
            "False alarms",
            "Good images called anomalous, the highest scores first.",
            "normal",
            "anomalous",
            True,
        ),
        ("Unknown", "Images that belong to no kind the model knows.", None, "unknown", True),
    )
    shown = ""
    for heading, text, label, verdict, highest in parts:
        picked = chosen(label, verdict, highest=highest)
        figures = "".join(_figure(predictions[i], i, render) for i in picked) if picked else ""
        content = f'<div class="gallery">{figures}</div>' if picked else '<p class="soft">None.</p>'
        shown += f'<h3>{heading}</h3><p class="soft">{text}</p>{content}'
    if not any(row["error"] is None for row in predictions):
        return ""
    return (
        '<section class="long"><h2>Images</h2><p class="soft">Heat-map from low '
        f'<img class="scale" alt="dark violet, red, yellow" src="{_scale()}"> to high; it ends at the operating point '
        "or, if that is higher, at the image's highest value. White outline: above the operating point. Cyan outline: "
        f"the defect as marked by people.</p>{shown}</section>"
    )


def _figure(row: Row, number: int, render: Callable[[int], Rendered]) -> str:
    name = escape(PurePath(str(row["image_path"])).name)
    kind = escape(_kind(row))
    truth = "good" if row["label"] == "normal" else escape(str(row["defect"] or "defective"))
    try:
        rendered = render(number)
    except NormweaveError as error:
        pictures = f"<p>{escape(str(error))}</p>"
    else:
        made = panels(
            rendered.image,
            rendered.anomaly_map,
            rendered.mask,
            lowest=float(rendered.anomaly_map.min()),
            highest=max(float(rendered.anomaly_map.max()), row["threshold"]),
            threshold=row["threshold"],
        )
        pictures = "".join(
            f'<div><img src="{data_uri(picture)}" alt="{name}: {what}">{what}</div>'
            for picture, what in zip(made, ("image", "heat-map", "marked defect"), strict=True)
            if picture is not None
        )
    routed = f" · taken for {escape(_routed(row))}" if row.get("routed_subclass") is not None else ""
    p_value = f" · p = {row['p_value']:.3g}" if row.get("p_value") is not None else ""
    return (
        f'<figure><div class="pictures">{pictures}</div><figcaption><b title="{escape(str(row["image_path"]))}">{name}'
        f'</b> <span class="tag {row["verdict"]}">{row["verdict"]}</span><br>{kind} · {truth}{routed}<br>'
        f"score {row['pred_score']:.4g} · operating point {row['threshold']:.4g}{p_value}</figcaption></figure>"
    )


def _unreadable(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    items = "".join(
        f"<li><b>{escape(str(row['image_path']))}</b>: {escape(str(row['error']))}</li>"
        for row in rows[:LISTED]
    )
    more = f"<p>and {len(rows) - LISTED} more: see predictions.csv</p>" if len(rows) > LISTED else ""
    return (
        f"<section><h2>Not read</h2><p>{_many(len(rows), 'image')} could not be judged and are in none of the "
        f'numbers.</p><ul class="plain">{items}</ul>{more}</section>'
    )


def _words() -> str:
    words = (
        ("image AUROC", "chance that a defective image scores higher than a good one; 50 % is guessing"),
        ("pixel AUROC", "the same for pixels; large defects count more than small ones"),
        (
            "AUPRO",
            "how much of each defect is covered while up to 30 % of good pixels are flagged; all defects count alike",
        ),
        ("AP, F1max", "average precision; the best F1 over all thresholds, which nobody knows beforehand"),
        (
            "operating point",
            "the score above which an image is anomalous, drawn from good images kept out of training",
        ),
        ("false alarms", "good test images above the operating point"),
        ("p", "share of held-out good images that score at least as high; small = odd"),
    )
    items = "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in words)
    return f"<section><h2>Words</h2><dl>{items}</dl></section>"


def _provenance(provenance: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{_told(value)}</dd>"
        for key, value in provenance.items()
    )
    return f"<section><h2>Where the numbers come from</h2><dl>{items}</dl></section>"


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return escape(" · ".join(f"{key} {part}" for key, part in value.items()))
    if isinstance(value, list | tuple):
        return escape(", ".join(str(part) for part in value))
    return escape(value if isinstance(value, str) else json.dumps(value))


def _scale() -> str:
    """The colours of the heat-map from low to high."""
    ramp = np.linspace(0, 1, 84, dtype=np.float32)[None].repeat(10, axis=0)
    grey = np.full((10, 84, 3), 128, dtype=np.uint8)
    return data_uri(panels(grey, ramp, None, lowest=0.0, highest=1.0, threshold=2.0).heat)


def _reason(absent: tuple[str, str]) -> str:
    return absent[0]


def _varied(items: Sequence[int], groups: Sequence[object]) -> list[int]:
    """The best of every group first, then every second best; else in the order given."""
    met: dict[object, int] = {}
    ranked = []
    for place, (item, group) in enumerate(zip(items, groups, strict=True)):
        met[group] = met.get(group, 0) + 1
        ranked.append((met[group], place, item))
    return [item for _, _, item in sorted(ranked)]


def _margin(row: Row) -> float:
    return float(row["pred_score"] - row["threshold"])


def _kind(row: Row) -> str:
    return _joined(row["category"], row["subclass"])


def _routed(row: Row) -> str:
    return _joined(row.get("routed_category") or row["category"], row["routed_subclass"])


def _joined(category: str, subclass: str | None) -> str:
    return category if subclass is None else f"{category}/{subclass}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _number(value: float | None, style: str, *, scale: int = 1) -> str:
    return DASH if value is None else f"{scale * value:{style}}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
