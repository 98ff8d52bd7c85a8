"""`normweave calibrate`: compute the operating points of a bundle from other normal images."""

from normweave.cli import options
from normweave.cli.terminal import Terminal
from normweave.cli.train import report


def calibrate(
    terminal: Terminal,
    bundle: options.Bundle,
    data: options.Data,
    false_alarm_rate: options.FalseAlarmRate = None,
    layout: options.Layout = None,
) -> int:
    """Compute new operating points from other normal images and replace the bundle. Needs no torch."""
    from normweave.bundle import check_target
    from normweave.detector import Detector

    detector = Detector.load(bundle, threads=terminal.threads, device=terminal.device)
    check_target(bundle, overwrite=True)
    with terminal.progress() as progress:
        detector.calibrate(data, false_alarm_rate=false_alarm_rate, layout=layout, progress=progress)
    detector.save(bundle, overwrite=True)
    return report(terminal, detector, bundle)
