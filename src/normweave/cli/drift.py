"""`normweave drift`: what changed on the line since the calibration, since when, and why."""

from collections.abc import Iterable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normweave.cli import options
from normweave.cli.terminal import ALL_NORMAL, NOT_NORMAL, Terminal
from normweave.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

    from normweave.drift.causes import Finding
    from normweave.drift.monitor import Image, Monitor

WINDOWS = 6
"""Rows of the table of each subclass: the newest windows."""


class By(StrEnum):
    """How windows are cut."""

    hour = "hour"
    shift = "shift"
    camera = "camera"


def drift(
    terminal: Terminal,
    bundle: options.Bundle,
    store: Annotated[
        str | None,
        typer.Option(help="Folder of the inspections of 'normweave serve', or postgresql://…", show_default=False),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Results of 'normweave predict --output FILE.jsonl'.", show_default=False),
    ] = None,
    line: Annotated[
        str | None,
        typer.Option(
            help="Only the inspections of this line of the store (serve --name).", show_default="all lines as one"
        ),
    ] = None,
    by: Annotated[
        By | None,
        typer.Option(
            help="Windows of the table: hour, shift or camera.", show_default="hour; with --results 100 images"
        ),
    ] = None,
) -> int:
    """Compare the images of a line with the calibration images, and name what changed and why. Needs no torch.

    An unchanged line ever raises an alarm with a probability of at most 1 %, however often the command runs.
    """
    from normweave import bundle as bundles
    from normweave.drift import reference, stream
    from normweave.drift.monitor import SEED, Monitor

    if (store is None) == (results is None):
        raise ConfigError("Give either --store or --results.")
    if line is not None and store is None:
        raise ConfigError("--line chooses inspections of a store, and results have no line. Leave it out.")
    references = reference.read(bundles.read(bundle), where=bundle)
    monitor = Monitor(references, seed=SEED if terminal.seed is None else terminal.seed)
    own = bundles.bundle_hash(bundle)
    chosen: stream.By | None = None if by is None else by.value
    if results is not None:
        _feed(monitor, stream.from_results(results, bundle_hash=own, by=chosen))
    else:
        from contextlib import closing

        from normweave.serve import drift as stored

        assert store is not None
        with closing(stored.open_store(store)) as opened:
            _feed(monitor, stored.images(opened, bundle_hash=own, by=chosen or "hour", line=line))
    if not monitor.count:
        raise DataError(f"No image of {bundle} to compare with. Inspect images with this bundle first.")
    return report(terminal, monitor)


def _feed(monitor: "Monitor", images: "Iterable[Image]") -> None:
    for image in images:
        monitor.add(image)


def report(terminal: Terminal, monitor: "Monitor") -> int:
    """Print the findings and the table, and return the exit code: 1 with an alarm."""
    from normweave.drift.causes import findings

    found = findings(monitor)
    if terminal.json:
        terminal.record(as_dict(monitor, found))
    else:
        for each in found:
            terminal.show(described(each, limit=monitor.limit), "")
        if not any(each.alarm for each in found):
            terminal.show(f"No alarm in {monitor.count:,} {'image' if monitor.count == 1 else 'images'}.", "")
        terminal.show(table(monitor))
    return NOT_NORMAL if any(each.alarm for each in found) else ALL_NORMAL


def as_dict(monitor: "Monitor", found: "list[Finding]") -> dict[str, Any]:
    """Return findings, alarms and windows as JSON values."""
    from normweave.drift.monitor import TESTED

    return {
        "images": monitor.count,
        "alarm_rate": monitor.alarm_rate,
        "limit": monitor.limit,
        "findings": [asdict(each) for each in found],
        "alarms": [each._asdict() for each in monitor.alarms],
        "windows": [
            {
                "window": name,
                "category": product[0],
                "subclass": product[1],
                "images": window.n,
                "not_normal": window.not_good,
                "far": window.far,
                "standard_deviations": dict(zip(TESTED, (window.sums / window.n).round(3).tolist(), strict=True)),
            }
            for name, of in monitor.windows.items()
            for product, window in of.items()
        ],
    }


def described(finding: "Finding", *, limit: float) -> str:
    """Return a finding as lines of text.

    Args:
        limit: the e-value at which a test raises an alarm.
    """
    from normweave.drift.evidence import odds

    heading = "ALARM" if finding.alarm else "For information"
    names = ", ".join(name_of(*product) for product in finding.products)
    since = " ".join(filter(None, (finding.since_at, f"({finding.since})" if finding.since else "")))
    lines = [
        f"{heading}: {finding.cause}",
        f"  since     {since}",
        f"  subclass  {names}",
        f"  size      {finding.effect}",
    ]
    if finding.evidence is not None:
        lines.append(f"  evidence  {odds(finding.evidence)} : 1 (alarm from {limit:,.0f} : 1)")
    lines.append(f"  to do     {finding.advice}")
    if finding.examples:
        lines.append(f"  images    {', '.join(finding.examples)}")
    return "\n".join(lines)


def name_of(category: str | None, subclass: str | None) -> str:
    """Return the name of a subclass for people."""
    return "/".join(filter(None, (category, subclass))) or "all images"


def table(monitor: "Monitor") -> "Table":
    """Return a table of the newest windows of each subclass: mean distances from the calibration images."""
    from rich.table import Table

    from normweave.drift.monitor import TESTED

    columns = [name.replace("_", " ") for name in TESTED]
    result = Table("subclass", "window", "images", "not good", *columns, box=None)
    result.caption = "Mean difference from the calibration images, in their standard deviations."
    for watched in monitor.subclasses:
        rows = [(name, of[watched.product]) for name, of in monitor.windows.items() if watched.product in of]
        for name, window in rows[-WINDOWS:]:
            means = (f"{mean:+.1f}" for mean in window.sums / window.n)
            result.add_row(name_of(*watched.product), name, str(window.n), str(window.not_good), *means)
        result.add_section()
    return result
