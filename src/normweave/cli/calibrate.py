"""`normweave calibrate`: compute the operating points of a bundle from other normal images."""

from typing import TYPE_CHECKING

from normweave.cli import options
from normweave.cli.terminal import Terminal
from normweave.cli.train import report

if TYPE_CHECKING:
    from normweave.detector import Detector
    from normweave.outcome.operating_point import Calibration


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
    before, earlier = _own_points(detector), detector.calibration
    with terminal.progress() as progress:
        detector.calibrate(data, false_alarm_rate=false_alarm_rate, layout=layout, progress=progress)
    detector.save(bundle, overwrite=True)
    code = report(terminal, detector, bundle)
    if pooled := sorted(before - _own_points(detector)):
        terminal.remark(
            f"Too few images for a threshold of its own, which it had before: {', '.join(pooled)}. The threshold is "
            "now that of all images together, or of the category. To avoid it, calibrate with images of every subclass."
        )
    far = _far(detector, earlier)
    if sum(far) > 2 * detector.config.outcome.unknown_rate * len(far):
        terminal.remark(
            f"{sum(far)} of {len(far)} images were far from every known subclass before. Now such images count as "
            "known. If they are of another product or subclass, calibrate again without them, and add it with "
            "add-subclass."
        )
    return code


def _far(detector: "Detector", earlier: "Calibration | None") -> list[bool]:
    """Return whether each calibration image was far from every known subclass by an earlier calibration, if any."""
    now = detector.calibration
    if earlier is None or now is None or now.distances is None or now.subclasses is None:
        return []
    near = zip(now.distances.tolist(), now.subclasses.tolist(), strict=True)
    return [earlier.is_far(distance, subclass) for distance, subclass in near]


def _own_points(detector: "Detector") -> set[str]:
    """Return the subclasses that have an operating point of their own."""
    if detector.calibration is None:
        return set()
    rows = detector.calibration.table(detector.subclass_names)
    return {row["subclass"] for row in rows if row["subclass"] and not row["pooled"]}
