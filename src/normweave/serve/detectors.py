"""The detectors of a server: that of the active bundle, those of views with a bundle of their own, and their rates."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType

from normweave.detector import Detector
from normweave.serve.metrics import Metrics
from normweave.serve.records import SERVER, RateChange
from normweave.serve.store import Store


class Detectors:
    """The detectors that inspect on a line. Methods are thread-safe.

    Args:
        active: that of the active bundle.
        views: that of each view whose bundle is another one; images of all other views, and of no part, are inspected
            with `active`.
        store: its last false-alarm rate for a bundle replaces that of the bundle.

    Attributes:
        active: `swap` replaces it.
        views: they stay until the server ends.
    """

    def __init__(self, active: Detector, *, views: Mapping[str, Detector], store: Store, metrics: Metrics) -> None:
        self._store, self._metrics = store, metrics
        self._lock = threading.Lock()
        self.active = self.with_last_rate(active)
        self.views = {view: self.with_last_rate(each) for view, each in views.items()}
        self._name_active()
        self._record()

    def of_view(self, view: str | None) -> Detector | None:
        """Return the detector of a view whose bundle is another one than the active one; None: it has none."""
        own = None if view is None else self.views.get(view)
        return None if own is None or own.bundle_hash == self.active.bundle_hash else own

    def of_bundle(self, bundle_hash: str | None) -> Detector | None:
        """Return the detector of a bundle; None: it does not inspect here."""
        return next((one for one in (self.active, *self.views.values()) if one.bundle_hash == bundle_hash), None)

    @property
    def view_hashes(self) -> Mapping[str, str]:
        """The bundle of each view that has one of its own."""
        return MappingProxyType({view: one.bundle_hash or "" for view, one in self.views.items()})

    def swap(self, active: Detector) -> None:
        """Replace the detector of the active bundle."""
        with self._lock:
            self.active = active
            self._name_active()

    def with_last_rate(self, detector: Detector) -> Detector:
        """Return the detector with the last false-alarm rate that was set for its bundle."""
        change = self._store.rate(detector.bundle_hash or "")
        return detector if change is None else detector.with_rate(change.false_alarm_rate)

    def change_rate(self, rate: float, *, actor: str, token: int | None) -> None:
        """Store another false-alarm rate of the active bundle, and use it.

        Raises:
            CheckError: there are too few calibration images for this rate.
            ConfigError: the rate is not in (0, 1).
        """
        with self._lock:
            detector = self.active.with_rate(rate)
            assert detector.bundle_hash is not None  # it was loaded from a folder
            change = RateChange(
                at=datetime.now(UTC), bundle_hash=detector.bundle_hash, false_alarm_rate=rate, actor=actor
            )
            self._store.add_rate(change, token=token)
            self.active = detector
        self.follow_rates()  # of a view with the same bundle

    def follow_rates(self) -> None:
        """Take over false-alarm rates that were set elsewhere for the bundles that inspect here."""
        before = self.active
        found = self.with_last_rate(before)
        views = {view: self.with_last_rate(each) for view, each in self.views.items()}
        with self._lock:
            if self.active is before:  # else it has just been replaced
                self.active = _changed(before, found)
            self.views = {view: _changed(each, views[view]) for view, each in self.views.items()}

    def _name_active(self) -> None:
        self._metrics.name_bundle(self.active.bundle_hash or "", model=self.active.model)

    def _record(self) -> None:
        """Add the bundles, and the active one before it on this line, to the audit."""
        calibration = self.active.calibration
        before = self._store.audit(event="bundle_loaded", line=self._store.line, limit=1)
        detail = {
            "bundle_hash": self.active.bundle_hash,
            "before": before[0].detail["bundle_hash"] if before else None,
            "false_alarm_rate": None if calibration is None else calibration.false_alarm_rate,
        }
        if self.views:
            detail["views"] = dict(self.view_hashes)
        self._store.add_audit("bundle_loaded", actor=SERVER, detail=detail)


def _changed(before: Detector, after: Detector) -> Detector:
    """Return the detector after a change of the rate; the same object if there was none."""
    return before if before.calibration == after.calibration else after
