"""`normweave calibrate`: compute the operating points of a bundle from other normal images."""

from typing import TYPE_CHECKING

from normweave.cli import options
from normweave.cli.terminal import Terminal
from normweave.cli.train import report

if TYPE_CHECKING:
    from normweave.detector import Detector


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
    before = _own_points(detector)
    with terminal.progress() as progress:
        detector.calibrate(data, false_alarm_rate=false_alarm_rate, layout=layout, progress=progress)
    detector.save(bundle, overwrite=True)
    code = report(terminal, detector, bundle)
    if pooled := sorted(before - _own_points(detector)):
        terminal.remark(
            f"Too few images for a threshold of its own, which it had before: {', '.join(pooled)}. The threshold is "
            "now that of all images together, or of the category. To avoid it, calibrate with images of every subclass."
        )
    return code


def _own_points(detector: "Detector") -> set[str]:
    """Return the subclasses that have an operating point of their own."""
    if detector.calibration is None:
        return set()
    rows = detector.calibration.table(detector.subclass_names)
    return {row["subclass"] for row in rows if row["subclass"] and not row["pooled"]}
