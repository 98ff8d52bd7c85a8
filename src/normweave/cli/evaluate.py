"""`normweave evaluate`: measure a bundle on labelled test images."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normweave.cli import options
from normweave.cli.terminal import ALL_NORMAL, UNREADABLE, Terminal

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "I-AUROC": "image_auroc",
    "I-AP": "image_ap",
    "I-F1": "image_f1max",
    "P-AUROC": "pixel_auroc",
    "P-AP": "pixel_ap",
    "AUPRO": "aupro",
}


def evaluate(
    terminal: Terminal,
    bundle: options.Bundle,
    data: options.Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.", show_default=False)],
    category: options.Category = None,
    subclass: options.Subclass = None,
    layout: options.Layout = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="metrics.json of another bundle on the same data. Prints the change in over-generalization.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Measure a bundle on labelled test images. Writes metrics.json, predictions.csv and report.html."""
    from normweave.benchmark.evaluate import evaluate as measure
    from normweave.data import layouts
    from normweave.detector import Detector

    detector = Detector.load(bundle, device=terminal.device)
    images: Any = data
    if category or subclass:
        selection = replace(detector.config.data, category=options.chosen(category), subclass=options.chosen(subclass))
        images = layouts.read(data, selection, layout=layout)
    title = f"{bundle.name} on {data.name}"
    with terminal.progress() as progress:
        metrics = measure(
            detector, images, output=output, layout=layout, against=against, title=title, progress=progress
        )
    return report(terminal, metrics, output)


def report(terminal: Terminal, metrics: dict[str, Any], output: Path) -> int:
    """Print the table and the path of the report, and return the exit code."""
    refused = metrics["pooled"]["n_refused"]
    if terminal.json:
        terminal.record({"output": str(output)} | metrics)
    else:
        terminal.show(table(metrics))
        if metrics["pooled"]["over_generalisation"]:
            terminal.show("", over_generalisation(metrics), "")
        elif "against" in metrics["provenance"]:
            terminal.show("Nothing to compare: this model has no decoder, or no defective patch was tested.")
        terminal.show(metrics["provenance"]["promise"], f"Report: {output / 'report.html'}")
        if refused:
            terminal.show(f"{refused} images could not be read. The reasons are in {output / 'predictions.csv'}.")
        if faults := metrics["mask_faults"]:
            terminal.show(f"{len(faults)} masks could not be used. The reasons are in {output / 'metrics.json'}.")
    return UNREADABLE if refused else ALL_NORMAL


def table(metrics: dict[str, Any]) -> "Table":
    """Return a table in percent: a row for each subclass, for each of several categories, and for all together."""
    from rich.table import Table

    named = metrics["pooled"]["category_accuracy"] is not None
    further = ["category named"] if named else []
    result = Table("subclass", "good", "anomalous", *COLUMNS, "false alarms (95 %)", *further, box=None)

    def add(name: str, values: dict[str, Any]) -> None:
        accuracy = [_percent(values["category_accuracy"])] if named else []
        result.add_row(name, *_cells(values), *accuracy)

    for name, values in metrics["by_subclass"].items():
        add(name, values)
    result.add_section()
    if len(metrics["by_category"]) > 1:
        for name, values in metrics["by_category"].items():
            if name not in metrics["by_subclass"]:  # else it has a row already
                add(name, values)
        result.add_section()
    for name in ("seen", "unseen", "pooled", "mean"):
        values = metrics[name]
        if values["n_normal"] + values["n_anomalous"]:
            add(name, values)
    return result


def over_generalisation(metrics: dict[str, Any]) -> "Table":
    """Return a table of the reconstruction distances of normal and anomalous patches, a row for each category."""
    from rich.table import Table

    compared = "against" in metrics["provenance"]
    further = ["change of ratio", "of cell AUROC"] if compared else []
    result = Table("decoder", "d normal", "d abnormal", "ratio", "cell AUROC", *further, box=None)
    rows = list(metrics["by_category"].items())
    if len(rows) > 1:
        rows += [(name, metrics[name]) for name in ("pooled", "mean")]
    for name, table in rows:
        values = table["over_generalisation"] or {}
        change = values.get("change", {})
        cells = [_number(values.get(key), ".3f") for key in ("d_normal", "d_abnormal")]
        cells += [_number(values.get("ratio"), ".2f"), _percent(values.get("cell_auroc"))]
        if compared:
            cells += [
                _number(change.get("ratio"), "+.2f"),
                _number(change.get("cell_auroc"), "+.1f", scale=100),
            ]
        result.add_row(name, *cells)
    return result


def _cells(values: dict[str, Any]) -> list[str]:
    low, high = values.get("false_alarm_interval") or (None, None)
    alarms = _percent(values["false_alarm_rate"])
    if low is not None:
        alarms += f" ({_percent(low)}–{_percent(high)})"
    counts = [str(values["n_normal"]), str(values["n_anomalous"])]
    return [*counts, *(_percent(values[key]) for key in COLUMNS.values()), alarms]


def _percent(share: float | None) -> str:
    return _number(share, ".1f", scale=100)


def _number(value: float | None, style: str, *, scale: int = 1) -> str:
    return "–" if value is None else f"{scale * value:{style}}"
