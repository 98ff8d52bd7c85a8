"""`normweave calibrate`: other normal images, or another rate, to new operating points."""

import typer

from normweave.cli import options
from normweave.cli.terminal import Terminal, command
from normweave.cli.train import report


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "calibrate")(calibrate)


def calibrate(
    terminal: Terminal,
    bundle: options.Bundle,
    data: options.Data,
    false_alarm_rate: options.FalseAlarmRate = None,
    layout: options.Layout = None,
) -> int:
    """Draw the operating points anew from other normal images; the bundle is replaced as a whole. Needs no torch."""
    from normweave.detector import Detector

    runtime = Detector.load(bundle, threads=terminal.threads, device=terminal.device)
    with terminal.progress() as progress:
        runtime.calibrate(data, false_alarm_rate=false_alarm_rate, layout=layout, progress=progress)
    runtime.save(bundle, overwrite=True)
    return report(terminal, runtime, bundle)
