"""Folder watcher: inspects each new or changed image in a folder once, in batches.

A file is taken when its size and its time of change have not changed for a while, measured by a clock that nobody sets.
What was inspected is remembered in `seen.Seen`. If more files wait than one batch has, the newest batch comes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from normweave.data import images
from normweave.data.integrity import CHECKED, check_complete
from normweave.data.layouts import IMAGES
from normweave.errors import ImageError, NormweaveError
from normweave.serve.database import StoreError
from normweave.serve.records import NAME_LENGTH, WatchState, WatchStatus
from normweave.serve.seen import File, Seen
from normweave.serve.service import BusyError, InspectionService, StoppedError, Upload

log = logging.getLogger(__name__)

SECONDS = 0.5
"""Shortest time between two scans of the folder."""
SETTLED_SECONDS = 1.0
"""A file is complete if it has not changed for this time."""
INCOMPLETE_SECONDS = 10.0
"""The same for a file that is no whole image: it is inspected, as not readable, after this time."""
RETRY_SECONDS = 10.0
"""A file that could not be read or inspected is tried again after this time, alone; others are not delayed."""
BATCH = 16
"""Files that are inspected together."""
MAX_FILES = 100_000
"""Number of waiting files that are kept in memory, about 40 MB; more are counted only, the oldest."""
ACTOR = "folder"


@dataclass
class _Waiting:
    """A file that is not inspected yet. Times are those of `time.monotonic`."""

    file: File
    scan: int
    """Number of the scan that found it first, which orders the files whatever their times are."""
    since: float
    """Time of the scan that found it with this size and time of change."""
    not_before: float
    """Time at which it may be taken."""
    error: str | None = None
    """Why it could not be inspected."""


class Watch:
    """Watches a folder, whose files are never changed.

    Only regular files are inspected: no links, and nothing whose name begins with a dot.

    Args:
        seen: the inspected files.
    """

    def __init__(self, folder: Path, *, service: InspectionService, seen: Seen) -> None:
        self.folder = folder
        self.running = False
        self._service = service
        self._seen = seen
        self._unsaved: list[File] = []  # inspected, and not yet in `seen`
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._waiting: dict[bytes, _Waiting] = {}  # by name, newest first
        self._further = 0  # waiting files beyond MAX_FILES
        self._scans = 0
        self._next_scan = 0.0  # monotonic time
        self._problem: Exception | None = None  # of the last step
        self._closed_folder: str | None = None  # a folder below that could not be read in the last scan

    @property
    def state(self) -> WatchState:
        """What the watcher does."""
        state: WatchStatus = "watching" if self.running else "paused"
        error = next((one.error for one in self._waiting.values() if one.error), self._closed_folder)
        if self.running and self._problem is not None:
            missing = isinstance(self._problem, (FileNotFoundError, NotADirectoryError))
            state, error = "folder missing" if missing else "failed", str(self._problem)
        return WatchState(state=state, files_behind=len(self._waiting) + self._further, last_error=error)

    def check_ready(self) -> None:
        """Check that new images in the folder are inspected, or that someone has paused this.

        Raises:
            StoreError: the folder, the store or the list of inspected files cannot be used.
        """
        state = self.state
        if state.state in ("folder missing", "failed"):
            raise StoreError(
                f"Images in the watched folder {self.folder} are not inspected ({state.state}): {state.last_error}. "
                "Make the folder available again, or start the server without --watch."
            )

    def start(self) -> None:
        """Start watching; must be called from a running event loop."""
        self.running = True
        self._wake.clear()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        self._report()

    def stop(self) -> None:
        """Stop watching; the images that were taken are still inspected."""
        self.running = False
        self._wake.set()
        self._report()

    async def finish(self) -> None:
        """Stop watching, and return when the images that were taken are inspected."""
        self.stop()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=self._service.config.answer_seconds)

    async def _run(self) -> None:
        while self.running:
            try:
                pause = await self._step()
                self._problem = None
            except Exception as error:  # of any type: the watcher must not end in silence
                if str(error) != str(self._problem):
                    known = isinstance(error, (NormweaveError, OSError))
                    log.warning("Watching %s: %s", self.folder, error, exc_info=None if known else error)
                self._problem, pause = error, SECONDS
            self._report()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    async def _step(self) -> float:
        """Scan the folder if it is time to, inspect a batch, and return the pause before the next step."""
        began = time.monotonic()
        await asyncio.to_thread(self._save)
        if began >= self._next_scan:
            await asyncio.to_thread(self._scan)
            now = time.monotonic()
            self._next_scan = now + max(SECONDS, now - began)  # at most half of the time for scans of a large folder
        if not (batch := self._next_batch()):
            return max(0.0, self._next_scan - time.monotonic())
        busy = await self._inspect(batch)
        await asyncio.to_thread(self._save)
        return SECONDS if busy else 0.0

    def _save(self) -> None:
        if self._unsaved:
            self._seen.add(self._unsaved)
            self._unsaved.clear()
        if self._seen.is_full:
            self._seen.forget(self._files())

    def _report(self) -> None:
        state = self.state
        self._service.metrics.watch.state(state.state)
        self._service.metrics.files_behind.set(state.files_behind)

    # ── which files wait ─────────────────────────────────────────────────────────────────────────────────────────────

    def _scan(self) -> None:
        """Find the files that are not inspected, and since when they have not changed."""
        now = time.monotonic()
        self._scans += 1
        self._closed_folder = None
        count = 0

        def found() -> Iterator[_Waiting]:
            nonlocal count
            for file in self._seen.unseen(self._files()):
                count += 1
                before = self._waiting.get(file.name)
                if before is not None and before.file == file:
                    yield before
                else:
                    scan = self._scans if before is None else before.scan
                    yield _Waiting(file, scan=scan, since=now, not_before=now + SETTLED_SECONDS)

        # What waits already stays, so that it settles; then the newest.
        kept = heapq.nlargest(MAX_FILES, found(), key=lambda one: (one.scan < self._scans, *_age(one)))
        self._waiting = {one.file.name: one for one in sorted(kept, key=_age, reverse=True)}
        self._further = count - len(kept)

    def _files(self) -> Iterator[File]:
        folders = [""]
        while folders:
            below = folders.pop()
            try:
                entries = os.scandir(self.folder / below)
            except OSError as error:
                if not below:
                    raise
                if not isinstance(error, FileNotFoundError):  # removed in the meantime
                    self._closed_folder = str(error)
                continue
            with entries:
                for entry in entries:
                    name = os.path.join(below, entry.name)
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(name)
                    elif entry.name.lower().endswith(IMAGES) and entry.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            yield File(os.fsencode(name), status.st_size, status.st_mtime_ns)

    def _next_batch(self) -> list[_Waiting]:
        """Return the newest files that may be taken, in the order of their arrival."""
        now, size = time.monotonic(), 0
        batch: list[_Waiting] = []
        for one in self._waiting.values():
            if one.not_before > now or (batch and one.error is not None):
                continue
            size += min(one.file.size, self._service.config.max_image_bytes)
            if batch and size > self._service.config.max_request_bytes:
                break
            batch.append(one)
            if len(batch) == BATCH or one.error is not None:
                break
        return batch[::-1]

    # ── from a file to an inspection ─────────────────────────────────────────────────────────────────────────────────

    async def _inspect(self, batch: list[_Waiting]) -> bool:
        """Inspect files, and return whether the server was too busy for some of them.

        Raises:
            StoreError: the inspections could not be stored.
        """
        results = await asyncio.gather(*map(self._inspect_file, batch), return_exceptions=True)
        busy, failed = False, None
        for one, result in zip(batch, results, strict=True):
            if isinstance(result, (BusyError, StoppedError)):
                busy = True
            elif isinstance(result, StoreError):
                failed = result
            elif isinstance(result, Exception):
                one.error = f"{os.fsdecode(one.file.name)}: {result}"
                one.not_before = time.monotonic() + RETRY_SECONDS
                log.warning("Watching %s: %s", self.folder, one.error)
            elif isinstance(result, BaseException):
                raise result
            elif result:
                self._unsaved.append(one.file)
                del self._waiting[one.file.name]
        if failed is not None:
            raise failed
        return busy

    async def _inspect_file(self, one: _Waiting) -> bool:
        """Inspect a file, and return whether this was done; if not, the file is not complete, or gone."""
        content = await asyncio.to_thread(self._read, one.file)
        now = time.monotonic()
        if content is None:
            one.not_before = now + SETTLED_SECONDS  # the next scan comes before
            return False
        if now < one.since + INCOMPLETE_SECONDS and not await asyncio.to_thread(self._is_complete, content):
            one.not_before = one.since + INCOMPLETE_SECONDS
            return False
        name = os.fsdecode(one.file.name).replace(os.sep, "/")
        if len(name) > NAME_LENGTH:  # the end has the name of the file
            name = f"…{name[1 - NAME_LENGTH :]}"
        await self._service.inspect([Upload(name, content)], source="folder", actor=ACTOR)
        return True

    def _read(self, file: File) -> bytes | None:
        """Return the content; None if it is not the file of the scan."""
        try:
            descriptor = os.open(self.folder / os.fsdecode(file.name), _FLAGS)
        except FileNotFoundError:
            return None
        with open(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            content = stream.read(self._service.config.max_image_bytes + 1)
            status = os.fstat(descriptor)
        same = (status.st_size, status.st_mtime_ns) == (file.size, file.changed)
        return content if same else None

    def _is_complete(self, content: bytes) -> bool:
        """Return whether the content is a whole image, or is refused without decoding."""
        try:
            check_complete(content)
            if not content.startswith(CHECKED):
                height, width = images.size(content)
                if height * width <= self._service.config.max_pixels:
                    images.decode(content)
        except (ImageError, ValueError):
            return False
        return True


def _age(one: _Waiting) -> tuple[int, int, bytes]:
    """Return a key that is larger for newer files."""
    return one.scan, one.file.changed, one.file.name


_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"):  # none exists on all systems
    _FLAGS |= getattr(os, _name, 0)
