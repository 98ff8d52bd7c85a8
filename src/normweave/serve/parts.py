"""Parts of several views: collects their images and stores one verdict when a part is closed.

A part is closed when all expected views came, or some time after its last view, and none of its images is accepted on
this server and not judged yet. Images of one request are stored in one transaction (see `together`), so they count
together on whichever server they came to. An image that comes later belongs to the closed part too; it never makes its
verdict better, and if it makes it worse, a correction is stored.

All images are read from the store in the order of their storage, and an image is marked in the transaction that stores
the verdict in which it counts. So after a restart the open parts are those of the unmarked images. Their time limits
then begin again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from normweave.errors import NormweaveError
from normweave.outcome.parts import MAX_IMAGES, PartResult, PartRule, PartView, is_worse, judge
from normweave.serve.part_store import OpenView, PartStore, TakenError
from normweave.serve.records import PartRecord
from normweave.serve.service import InspectionService

log = logging.getLogger(__name__)

MAX_OPEN = 10_000
"""Open parts; beyond it the one that waits longest is closed."""
CHUNK = 500
"""Images that are read at a time."""
LONGEST_WAIT = 1.0
"""Longest time between two looks at the store, in seconds."""
RETENTION_SECONDS = 600.0
"""Time between two removals of old records."""


class ClosedPart(NamedTuple):
    """A part that is complete, or whose time is over."""

    part_id: str
    images: tuple[PartView, ...]
    result: PartResult


@dataclass
class _Open:
    images: list[PartView] = field(default_factory=list)
    last: float = 0.0


class OpenParts:
    """The parts that wait for views. Times are in seconds of any clock that only increases.

    Args:
        most: largest number of open parts.
    """

    def __init__(self, rule: PartRule, *, most: int = MAX_OPEN) -> None:
        self.rule = rule
        self.most = most
        self._parts: OrderedDict[str, _Open] = OrderedDict()  # the part with the latest view last
        self._complete: dict[str, None] = {}  # in the order in which their last view came

    def __contains__(self, part_id: str) -> bool:
        return part_id in self._parts

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, part_id: str, image: PartView, *, now: float) -> list[ClosedPart]:
        """Add an image, and close and return the parts that go beyond a limit: its own, or the longest waiting one."""
        part = self._parts.setdefault(part_id, _Open())
        part.images.append(image)
        part.last = now
        self._parts.move_to_end(part_id)
        if len(part.images) >= MAX_IMAGES:
            return [self._close(part_id)]
        if self.rule.is_complete(part.images):
            self._complete.setdefault(part_id)
        return [self._close(next(iter(self._parts)))] if len(self._parts) > self.most else []

    def ready(self, *, now: float, but: Collection[str] = ()) -> list[ClosedPart]:
        """Close and return the parts that are complete, or whose last view came at least `rule.seconds` ago.

        Args:
            but: parts that stay open, since more of their images are being judged.
        """
        ids = [one for one in self._complete if one not in but]
        for id, part in self._parts.items():
            if now - part.last < self.rule.seconds:
                break
            if id not in but and id not in self._complete:
                ids.append(id)
        return [self._close(id) for id in ids]

    def wait(self, *, now: float, but: Collection[str] = ()) -> float:
        """Return the time until the next part is due; infinity if none is open. `but` is that of `ready`."""
        waiting = (part.last for id, part in self._parts.items() if id not in but)
        return next((max(0.0, last + self.rule.seconds - now) for last in waiting), float("inf"))

    def _close(self, part_id: str) -> ClosedPart:
        images = tuple(self._parts.pop(part_id).images)
        self._complete.pop(part_id, None)
        return ClosedPart(part_id, images, judge(images, self.rule.views))


class Parts:
    """Follows the inspections of a server in a thread of its own, and stores the verdicts on parts.

    Args:
        rule: expected views and time limits.
        clock: seconds of a clock that only increases.

    Attributes:
        records: the closed parts.
        listeners: called from another thread when a verdict or a correction has been stored.
    """

    def __init__(
        self, service: InspectionService, *, most: int = MAX_OPEN, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.records = PartStore(service.store)
        self.listeners: set[Callable[[], None]] = set()
        self.rule = service.part_rule
        self._service = service
        self._clock = clock
        self._open = OpenParts(service.part_rule, most=most)
        self._last = 0
        self._being_judged: set[str] = set()  # parts of which images are being judged
        self._removed_at = clock()
        self._news, self._stopped = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, also again after `stop`."""
        self._stopped.clear()
        self._begin_again()
        self._service.listeners.add(self._news.set)
        self._news.set()
        self._thread = threading.Thread(target=self._run, name="parts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Count the images that are stored, and end the thread; open parts wait in the store for the next start."""
        self._stopped.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join()
        self._service.listeners.discard(self._news.set)

    def _run(self) -> None:
        while True:
            ended = self._stopped.is_set()
            self._news.clear()
            try:
                while self.step():
                    pass
                self._remove_old()
            except NormweaveError as error:  # the next step tries again
                log.warning("Parts are not closed for now: %s", error)
                self._begin_again()
            if ended:
                return
            seconds = self._open.wait(now=self._clock(), but=self._being_judged)
            self._news.wait(min(LONGEST_WAIT, max(0.01, seconds)))

    def step(self) -> bool:
        """Count the next images and close what is ready; return whether there may be more images.

        Raises:
            NormweaveError: the store failed.
        """
        # Asked before the read: an image that is not judged now cannot be missing in both.
        self._being_judged = self._service.waiting_parts()
        found = self.records.open_views(after=self._last, limit=CHUNK)
        for one in found:
            self._add(one)
            self._last = one.image.inspection or 0
        if len(found) == CHUNK:
            return True
        for closed in self._open.ready(now=self._clock(), but=self._being_judged):
            self._store(closed)
        return False

    def _begin_again(self) -> None:
        """Forget what is open; the unmarked images are read again."""
        self._open, self._last = OpenParts(self.rule, most=self._open.most), 0

    def _add(self, one: OpenView) -> None:
        if one.part_id not in self._open:
            since = datetime.now(UTC) - timedelta(seconds=self.rule.late_seconds)
            closed = self.records.last(one.part_id, since=since)
            if closed is not None:
                self._add_late(closed, one.image)
                return
        for part in self._open.add(one.part_id, one.image, now=self._clock()):
            self._store(part)

    def _store(self, part: ClosedPart) -> None:
        record = PartRecord(
            at=datetime.now(UTC),
            part_id=part.part_id,
            line=self.records.line,
            verdict=part.result.verdict,
            reasons=part.result.reasons,
            images=len(part.images),
            expected=self.rule.views,
        )
        try:
            self.records.close(record, [one.inspection for one in part.images if one.inspection is not None])
        except TakenError as error:
            log.error("The part %r is not closed: %s", part.part_id, error)
            return
        self._notify()

    def _add_late(self, closed: PartRecord, image: PartView) -> None:
        """Let an image belong to a closed part, and store a correction if this makes its verdict worse."""
        assert image.inspection is not None  # it was read from the store
        correction = None
        if is_worse(image, closed.verdict):  # at most three times a part, so its images may be read
            views = [*self.records.views(closed.root, limit=MAX_IMAGES), image]
            result = judge(views, closed.expected)
            correction = replace(
                closed,
                at=datetime.now(UTC),
                verdict=result.verdict,
                reasons=result.reasons,
                images=len(views),
                corrects=closed.root,
            )
        self.records.add_late(closed.root, image.inspection, correction=correction)
        if correction is not None:
            self._notify()

    def _notify(self) -> None:
        for notify in tuple(self.listeners):
            notify()

    def _remove_old(self) -> None:
        days = self._service.config.keep_days
        if days and self._clock() >= self._removed_at + RETENTION_SECONDS:
            self._removed_at = self._clock()
            self.records.expire(before=datetime.now(UTC) - timedelta(days=days))
