"""Drift of the inspections of a server: read from the store in batches, apart from the answers."""

from __future__ import annotations

import copy
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from normweave.atomic import write_atomically
from normweave.data.stored import is_url
from normweave.detector import Detector
from normweave.drift import reference, stream
from normweave.drift.causes import Finding, findings
from normweave.drift.monitor import Image, Monitor
from normweave.errors import BundleError, DataError, NormweaveError
from normweave.serve.delivery_store import DeliveryStore
from normweave.serve.records import DriftAlarm, Filter, Inspection
from normweave.serve.service import InspectionService
from normweave.serve.store import DATABASE, Store

log = logging.getLogger(__name__)

CHUNK = 200
"""Inspections that are read at a time."""
STEP_SECONDS = 5.0
"""Time between two looks for new inspections."""
HANDOVER_SECONDS = 60.0
"""A new leader stores the alarms of so long before, which the one before may not have stored."""


def open_store(place: str) -> Store:
    """Open the store of a server: a folder of inspections, or the URL of a database.

    Raises:
        DataError: there is none.
    """
    if is_url(place):
        return Store.open(place, migrate=False)
    path = Path(place) / DATABASE
    if not path.is_file():
        raise DataError(f"{place} holds no {DATABASE}. Give the folder of 'normweave serve --data', or postgresql://…")
    return Store.open(path, migrate=False)


def images(store: Store, *, bundle_hash: str, by: stream.By, line: str | None = None) -> Iterator[Image]:
    """Yield the inspections of a bundle as images of the line, oldest first.

    Args:
        line: its name; None: all lines of the store as one.
    """
    for one in store.iter_inspections(Filter(bundle_hash=bundle_hash, line=line)):
        image = image_of(one, by=by)
        if image is not None:
            yield image


def image_of(inspection: Inspection, *, by: stream.By) -> Image | None:
    """Return an inspection as an image of the line; None if it has no statistics.

    Its name is the id of the inspection. The camera is the name of the token that it was sent with.
    """
    window = stream.window_of(by, inspection.received_at, inspection.actor)
    at = f"{inspection.received_at.astimezone():%Y-%m-%d %H:%M:%S}"
    outcome = inspection.outcome
    return stream.image_of(lambda name: getattr(outcome, name), name=str(inspection.id), at=at, window=window)


class DriftWatch:
    """Follows the inspections of a server in a thread of its own; the state is kept on disk, so a restart continues.

    Args:
        service: whose store is read; the tests begin anew with each bundle.
        path: file of the state.
        leads: whether this server stores alarms; all servers of a line find the same ones.

    Attributes:
        listeners: called from another thread when an alarm has been stored.
    """

    def __init__(self, service: InspectionService, path: Path, *, leads: Callable[[], bool] = lambda: True) -> None:
        self.listeners: set[Callable[[], None]] = set()
        self._service = service
        self._store = DeliveryStore(service.store.database, line=service.store.line)
        self._leads = leads
        self._unsent: deque[tuple[float, DriftAlarm, datetime]] = deque()
        self._path = path
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._bundle: str | None = None
        self._last = 0
        self._newest = datetime.now(UTC)
        self._monitor: Monitor | None = None
        self._found: list[Finding] = []
        self._raised: set[tuple[str, str]] = set()
        self._saved = True
        self.refusal: str | None = None
        """Why nothing is followed, for people."""

    def start(self) -> None:
        """Start the thread, also again after `stop`."""
        self._stopped.clear()
        self._thread = threading.Thread(target=self._run, name="drift", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and save the state."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def state(self) -> tuple[list[Finding], Monitor | None]:
        """Return the findings and a copy of the monitor; None: nothing is followed."""
        with self._lock:
            return list(self._found), copy.deepcopy(self._monitor)

    def _run(self) -> None:
        while True:
            try:
                while self.step() and not self._stopped.is_set():
                    pass
                self._store_unsent()
            except NormweaveError as error:  # the next run tries again
                log.warning("Drift is not followed for now: %s", error)
            if self._stopped.wait(STEP_SECONDS):
                return

    def _store_unsent(self) -> None:
        """Store the alarms of the last `HANDOVER_SECONDS` if this server has become the leader."""
        while self._unsent and self._unsent[0][0] < time.monotonic() - HANDOVER_SECONDS:
            self._unsent.popleft()
        while self._unsent and self._leads():
            _, alarm, newest = self._unsent[0]
            self._store.add_alarm(alarm, newest=newest)
            self._unsent.popleft()
            for notify in tuple(self.listeners):
                notify()

    def step(self) -> bool:
        """Test the next inspections and save the state; return whether there were as many as are read at a time."""
        detector = self._service.detector
        own = detector.bundle_hash or ""
        if own != self._bundle:
            self._begin(detector, own)
        if self._monitor is None:
            return False
        store = self._service.store
        found = store.inspections(Filter(bundle_hash=own, line=store.line), after=self._last, limit=CHUNK)
        if not found:
            if not self._saved:
                self._save()
            return False
        with self._lock:
            for one in found:
                self._last, self._newest = one.id, one.received_at
                image = image_of(one, by="hour")
                if image is not None:
                    self._monitor.add(image)
            self._found = findings(self._monitor)
        self._show_alarms()
        self._save()
        return len(found) == CHUNK

    def _save(self) -> None:
        """Save the state. Where that fails, the images are followed all the same, and it is tried again."""
        if self._monitor is None:
            return
        state = {
            "bundle_hash": self._bundle,
            "last": self._last,
            "monitor": self._monitor.as_dict(),
            "raised": sorted(self._raised),
        }
        try:
            write_atomically(self._path, lambda path: path.write_text(json.dumps(state)))
        except OSError as error:
            if self._saved:
                log.warning("The state of drift cannot be saved for now: %s", error)
            self._saved = False
        else:
            self._saved = True

    def _begin(self, detector: Detector, own: str) -> None:
        """Load the state of this bundle, or begin anew."""
        with self._lock:
            self._bundle, self._last, self._monitor, self._found, self.refusal = own, 0, None, [], None
            try:
                self._monitor = Monitor(reference.read(detector.record, where="The bundle"))
            except BundleError as error:
                self.refusal = str(error)
                return
            try:
                state = json.loads(self._path.read_text())
                if state["bundle_hash"] == own:
                    self._monitor.load(state["monitor"])
                    self._last = int(state["last"])
                    self._raised = {(str(cause), str(subclass)) for cause, subclass in state["raised"]}
                    self._found = findings(self._monitor)
            except FileNotFoundError:
                pass
            except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                log.warning("The state of drift in %s is damaged (%s); it begins anew.", self._path, error)
                self._monitor = Monitor(reference.read(detector.record, where="The bundle"))
        self._show_alarms()

    def _show_alarms(self) -> None:
        """Set the metric of each alarm; log and store new ones."""
        gauge = self._service.metrics.drift_alarm
        alarms: dict[tuple[str, str], Finding] = {
            (one.cause, "/".join(filter(None, product))): one
            for one in self._found
            if one.alarm
            for product in one.products
        }
        now = set(alarms)
        for cause, subclass in self._raised - now:
            gauge.labels(cause, subclass).set(0)
        for cause, subclass in now - self._raised:
            alarm = self._alarm(alarms[cause, subclass], subclass)
            if not self._leads():
                self._unsent.append((time.monotonic(), alarm, self._newest))
            elif not self._store.add_alarm(alarm, newest=self._newest):
                continue
            log.warning("Drift: %s, %s", cause, subclass or "all images")
        for cause, subclass in now:
            gauge.labels(cause, subclass).set(1)
        if now - self._raised:
            for notify in tuple(self.listeners):
                notify()
        self._raised = now

    def _alarm(self, alarm: Finding, subclass: str) -> DriftAlarm:
        """Return an alarm as it is stored."""
        return DriftAlarm(
            time=datetime.now(UTC),
            line=self._service.store.line,
            bundle_hash=self._bundle or "",
            cause=alarm.cause,
            subclass=subclass,
            since=alarm.since_at,
            since_inspection=int(alarm.since),
            evidence=alarm.evidence,
            effect=alarm.effect,
            advice=alarm.advice,
            inspections=tuple(int(name) for name in alarm.examples),
        )
