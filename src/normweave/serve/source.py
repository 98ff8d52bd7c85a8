"""Sources of images: read in a thread, chosen by a trigger, and inspected by a second thread.

    module of the type: frames() → trigger → one waiting frame → service.inspect
                        reconnects            a newer one replaces it

At most one chosen frame waits; a newer one replaces it, which is counted. So nothing is queued without a bound, and
what is inspected is recent. A source whose images do not hurry (a video file) waits instead, and loses none.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import field
from datetime import UTC, datetime
from typing import ClassVar, Literal, NamedTuple, Protocol, cast, get_args

import numpy as np
from numpy.typing import NDArray

from normweave.errors import ImageError, NormweaveError
from normweave.serve import line_config, records
from normweave.serve.service import BusyError, InspectionService, StoppedError, Upload
from normweave.serve.trigger import FrameTrigger, TriggerConfig, trigger
from normweave.validation import PositiveFloat, checked

log = logging.getLogger(__name__)

Result = Literal["inspected", "dropped", "failed", "missed"]
"""missed: a signal of the trigger that has no frame of its own; the others are of chosen frames."""
Status = Literal["running", "attention", "no images", "idle"]
RETRY_SECONDS, MAX_RETRY_SECONDS = 0.5, 30.0
"""Shortest and longest pause before a source is connected again; it doubles, with jitter."""
BUSY_SECONDS = 0.1
"""Pause before a frame is sent again to a busy server, if no newer one has come."""
QUIET_SECONDS = 10.0
"""A source without a frame for this time needs attention."""
ENDED = "the stream ended"
STOP_SECONDS = 10.0
"""Longest wait for the end of a source."""


@checked
class SourceConfig(line_config.EntryConfig):
    """Settings of every source."""

    trigger: TriggerConfig = field(default_factory=FrameTrigger)
    """Which frames are inspected."""
    retry_seconds: PositiveFloat = RETRY_SECONDS
    """First pause before the source is connected again."""

    drops: ClassVar[bool] = True
    """Whether frames that cannot be inspected in time are dropped; if not, the source waits, and has an end."""


class Frame(NamedTuple):
    """An image of a source, encoded only if it is inspected."""

    content: Callable[[], bytes]
    """Return the image file."""
    grey: Callable[[], NDArray[np.float32]]
    """Return the frame in grey, (SMALL, SMALL) from 0 to 255."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels, if it is known without decoding."""
    at: float | None = None
    """Time in seconds of the clock of the source; None: it is live."""
    part: str | None = None
    view: str | None = None
    suffix: str = ""
    """Of the name of its inspection."""


Frames = Generator[Frame | None, None, None]


class SourceState(NamedTuple):
    """State of a source, for the page and for people."""

    status: Status
    text: str


class Contract(Protocol):
    """What a module of `normweave.serve.sources` has besides its `Config`."""

    @staticmethod
    def frames(config: SourceConfig, *, max_bytes: int, on_drop: Callable[[int], None]) -> Frames:
        """Connect, and yield frames; None at least every second in which there is none, first when it is connected.

        The iterator is closed to end the connection.

        Args:
            config: an instance of `Config` of the module.
            max_bytes: largest size of an image file.
            on_drop: called with the number of images that are dropped before they are yielded.

        Raises:
            Exception: of any type, if the source cannot be read. It is then connected again.
        """
        ...


def frames(config: SourceConfig, *, max_bytes: int, on_drop: Callable[[int], None] = lambda count: None) -> Frames:
    """Return the frames of a source, as the module of its type yields them."""
    module = cast("type[Contract]", line_config.load("sources", config.type))
    return module.frames(config, max_bytes=max_bytes, on_drop=on_drop)


def check(config: SourceConfig, *, seconds: float = 10.0) -> str:
    """Connect to a source, and return in words what came; it may wait for its first frame so long.

    Raises:
        Exception: the source cannot be read.
    """
    began, reached = time.monotonic(), False
    with closing(frames(config, max_bytes=32 * 2**20)) as found:
        for frame in found:
            reached = True
            if frame is not None:
                try:
                    frame.grey()
                except ImageError as error:
                    raise ConnectionError(
                        f"What came is no image that can be read: {error}. Check that the source sends image files."
                    ) from error
                size = "" if frame.size is None else f" of {frame.size[1]} x {frame.size[0]} pixels"
                return f"first image{size} after {time.monotonic() - began:.1f} s"
            if time.monotonic() > began + seconds:
                break
    return "connected, no image yet" if reached else "it has no images"


class _Waiting(NamedTuple):
    frame: Frame
    name: str
    part: str | None


class SourceRunner:
    """Reads a source and inspects the frames that its trigger chooses.

    Args:
        clock: seconds of a clock that only increases.

    Attributes:
        counts: number of chosen frames by their result, each once, and of signals without a frame.
        last: the last inspection.
        listeners: called from another thread when a frame was inspected.
    """

    def __init__(
        self, config: SourceConfig, service: InspectionService, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.counts: Counter[Result] = Counter(dict.fromkeys(get_args(Result), 0))
        self.last: records.Inspection | None = None
        self.listeners: set[Callable[[], None]] = set()
        self._service = service
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: _Waiting | None = None
        self._stopped = threading.Event()
        self._finished = False
        self._connected = False
        self._error: str | None = None
        self._failure: str | None = None  # of the last inspection
        self._unreadable = 0  # images in a row that could not be read
        self._seen_at: float | None = None
        self._threads: list[threading.Thread] = []
        self._ending: list[threading.Thread] = []  # were stopped, and still wait for a counterpart

    @property
    def state(self) -> SourceState:
        """Return what the source does.

        running: images come; attention: none at the moment, or they are not inspected; no images: not connected; idle:
        this server does not read it.
        """
        if self._finished:
            ended = self._error == ENDED
            return SourceState(
                "running" if ended else "no images", f"{self._error}, {self.counts['inspected']} images were inspected"
            )
        if not self._threads:
            return SourceState("idle", "this server does not read it")
        if not self._connected:
            return SourceState("no images", self._error or "it is being connected")
        if self._failure is not None:
            return SourceState("attention", self._failure)
        if self._unreadable and self.last is not None:
            images = "The last image" if self._unreadable == 1 else f"The last {self._unreadable} images"
            reason = (self.last.outcome.error or "").rstrip(".")
            text = f"{images} could not be read: {reason}. Check that the source sends image files."
            return SourceState("attention", text)
        quiet = None if self._seen_at is None else self._clock() - self._seen_at
        if quiet is None or quiet > QUIET_SECONDS:
            return SourceState(
                "attention", "connected, no image yet" if quiet is None else f"no image for {quiet:.0f} s"
            )
        counts = ", ".join(
            f"{count} {result}" for result, count in self.counts.items() if count or result == "inspected"
        )
        return SourceState("running", counts)

    def check(self) -> str:
        """Connect to the source apart from this runner; see `check`."""
        return check(self.config)

    def start(self) -> None:
        """Start the threads, also again after `stop`."""
        for thread in self._ending:
            thread.join()
        self._stopped.clear()
        self._finished = False
        self._threads = [
            threading.Thread(target=work, name=f"{self.config.name} {work.__name__.strip('_')}", daemon=True)
            for work in (self._read, self._inspect)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop reading; the frame that is being inspected is finished, one that waits is dropped."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(STOP_SECONDS)
        self._ending, self._threads = [thread for thread in self._threads if thread.is_alive()], []
        if self._waiting is not None:
            self._waiting = None
            self._count("dropped")

    def _count(self, result: Result, count: int = 1) -> None:
        with self._changed:
            self.counts[result] += count
        self._service.metrics.source_frames.labels(self.config.name, result).inc(count)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self) -> None:
        """Read until the end, and connect again after each failure."""
        failures = 0
        while not self._stopped.is_set():
            began, seen = self._clock(), self._seen_at
            try:
                self._read_connection()
                text = ENDED
            except Exception as error:  # of any type: a source must not end in silence
                text = str(error) or type(error).__name__
                if text != self._error:
                    known = isinstance(error, (NormweaveError, OSError, ValueError))
                    log.warning("Source %s: %s", self.config.name, text, exc_info=None if known else error)
            self._error = text
            came = self._seen_at != seen
            if came and not self.config.drops:
                self._finish()
                return
            self._set_connected(False)
            failures = 0 if came or self._clock() > began + QUIET_SECONDS else failures + 1
            pause = min(MAX_RETRY_SECONDS, self.config.retry_seconds * 2 ** min(failures, 10))
            self._stopped.wait(pause * random.uniform(0.5, 1.0))

    def _read_connection(self) -> None:
        """Read the frames of one connection to its end."""
        chooser, missed = trigger(self.config.trigger), 0
        try:
            found = frames(
                self.config,
                max_bytes=self._service.config.max_image_bytes,
                on_drop=lambda count: self._count("dropped", count),
            )
            with closing(found):
                for frame in found:
                    if self._stopped.is_set():
                        return
                    self._set_connected(True)
                    if frame is None:
                        chooser.check()
                        continue
                    self._seen_at = self._clock()
                    at = self._seen_at if frame.at is None else frame.at
                    if chooser.chooses(frame.grey() if chooser.needs_grey else None, at=at):
                        self._offer(frame, chooser.part)
                    if chooser.missed > missed:
                        self._count("missed", chooser.missed - missed)
                        missed = chooser.missed
        finally:
            chooser.close()

    def _set_connected(self, connected: bool) -> None:
        if connected != self._connected:
            self._connected = connected
            log.info("Source %s is %s", self.config.name, "connected" if connected else "not connected")
        self._service.metrics.source_connected.labels(self.config.name).set(connected)

    def _finish(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None or self._stopped.is_set())
            self._finished = True
            self._changed.notify_all()

    def _offer(self, frame: Frame, part: str | None) -> None:
        """Let a frame wait in the place of an older one."""
        name = f"{self.config.name} {datetime.now(UTC):%Y%m%dT%H%M%S.%f}{frame.suffix}"
        with self._changed:
            if not self.config.drops:
                self._changed.wait_for(lambda: self._waiting is None or self._stopped.is_set())
            replaced = self._waiting is not None
            self._waiting = _Waiting(frame, name, frame.part or part)
            self._changed.notify_all()
        if replaced:
            self._count("dropped")

    # ── inspecting ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _inspect(self) -> None:
        with asyncio.Runner() as runner:
            while (waiting := self._take()) is not None:
                result, error = self._inspect_one(waiting, runner)
                if error != self._failure:
                    self._failure = error
                    if error is not None:
                        log.warning("Source %s: %s", self.config.name, error)
                self._count(result)
                for notify in tuple(self.listeners):
                    notify()

    def _take(self) -> _Waiting | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._stopped.is_set() or self._finished)
            if self._stopped.is_set():
                return None
            waiting, self._waiting = self._waiting, None
            self._changed.notify_all()
            return waiting

    def _inspect_one(self, waiting: _Waiting, runner: asyncio.Runner) -> tuple[Result, str | None]:
        """Inspect a frame, and return its result and why it failed."""
        config, frame = self.config, waiting.frame
        try:
            upload = Upload(waiting.name, frame.content(), waiting.part, frame.view or (waiting.part and config.name))
            while True:
                try:
                    call = self._service.inspect(
                        [upload], source=cast("records.Source", config.type), actor=config.name
                    )
                    (self.last,) = runner.run(call)
                    self._unreadable = 0 if self.last.outcome.error is None else self._unreadable + 1
                    return "inspected", None
                except BusyError as error:
                    if self._stopped.wait(BUSY_SECONDS) or (config.drops and self._waiting is not None):
                        return "dropped", f"the server is busy: {error}"
        except StoppedError:
            return "dropped", None
        except Exception as error:  # of any type: the next frame may be inspected
            return "failed", f"an image was not inspected: {error}"
