"""`normweave evaluate`: a bundle against labelled test images."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normweave.cli import options
from normweave.cli.terminal import ALL_NORMAL, UNREADABLE, Terminal, command

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


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "evaluate")(evaluate)


def evaluate(
    terminal: Terminal,
    bundle: options.Bundle,
    data: options.Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the results.", show_default=False)
    ],
    category: options.Category = None,
    subclass: options.Subclass = None,
    layout: options.Layout = None,
) -> int:
    """Measure how well a bundle detects: metrics.json, predictions.csv and report.html."""
    from normweave.benchmark.evaluate import evaluate as measure
    from normweave.data import layouts
    from normweave.detector import Detector

    detector = Detector.load(bundle, device=terminal.device)
    images: Any = data
    if category or subclass:
        selection = replace(
            detector.config.data, category=options.chosen(category), subclass=options.chosen(subclass)
        )
        images = layouts.read(data, selection, layout=layout)
    title = f"{bundle.name} on {data.name}"
    with terminal.progress() as progress:
        metrics = measure(detector, images, output=output, layout=layout, title=title, progress=progress)
    return report(terminal, metrics, output)


def report(terminal: Terminal, metrics: dict[str, Any], output: Path) -> int:
    """Print the table and where the report lies; the exit code."""
    refused = metrics["pooled"]["n_refused"]
    if terminal.json:
        terminal.record({"output": str(output)} | metrics)
    else:
        terminal.show(table(metrics), f"Report: {output / 'report.html'}")
        if refused:
            terminal.show(f"{refused} images could not be read; {output / 'predictions.csv'} says why.")
        if faults := metrics["mask_faults"]:
            terminal.show(f"{len(faults)} masks could not be used; {output / 'metrics.json'} says why.")
    return UNREADABLE if refused else ALL_NORMAL


def table(metrics: dict[str, Any]) -> "Table":
    """A row a subclass, then seen and unseen ones together, then the mean; in percent."""
    from rich.table import Table

    result = Table("subclass", "good", "anomalous", *COLUMNS, "false alarms (95 %)", box=None)
    for name, values in metrics["by_subclass"].items():
        result.add_row(name, *_cells(values))
    result.add_section()
    for name in ("seen", "unseen", "pooled", "mean"):
        values = metrics[name]
        if values["n_normal"] + values["n_anomalous"]:
            result.add_row(name, *_cells(values))
    return result


def _cells(values: dict[str, Any]) -> list[str]:
    low, high = values.get("false_alarm_interval") or (None, None)
    alarms = _percent(values["false_alarm_rate"])
    if low is not None:
        alarms += f" ({_percent(low)}–{_percent(high)})"
    counts = [str(values["n_normal"]), str(values["n_anomalous"])]
    return [*counts, *(_percent(values[key]) for key in COLUMNS.values()), alarms]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
