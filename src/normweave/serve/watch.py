"""Folder watcher: inspects each new or changed image in a folder once, oldest first."""

from __future__ import annotations

import asyncio
import heapq
import logging
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from normweave.data.layouts import IMAGES
from normweave.errors import NormweaveError
from normweave.serve.records import Filter
from normweave.serve.service import BusyError, InspectionService, Upload

log = logging.getLogger(__name__)

SECONDS = 0.5
"""Time between two scans of the folder."""
SETTLED_SECONDS = 1.0
"""A file is complete if it has not changed for this time."""
MAX_FILES = 500
"""Maximum number of files that a scan returns, which bounds the memory for a folder with many files."""
ACTOR = "folder"


class _File(NamedTuple):
    """A file with its time of arrival, which defines the order."""

    stamp: float  # seconds since 1970 of the last change of its content or its name
    path: str


class Watch:
    """Watches a folder. Files are never changed; the store has the names of the inspected files.

    Attributes:
        problem: error of the last scan; None if it succeeded.
    """

    def __init__(self, folder: Path, *, service: InspectionService) -> None:
        self.folder = folder
        self.problem: str | None = None
        self._service = service
        self._task: asyncio.Task[None] | None = None
        self._last = _File(0.0, "")  # all files up to this one are inspected

    @property
    def running(self) -> bool:
        """Whether the watcher runs."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Start watching; must be called from a running event loop."""
        if not self.running:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """Stop watching; images that the service has accepted are still inspected."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        while True:
            try:
                for file in await asyncio.to_thread(self._new):
                    await self._inspect(file)
                self.problem = None
            except (NormweaveError, OSError) as error:
                if str(error) != self.problem:
                    log.warning("Watching %s: %s", self.folder, error)
                self.problem = str(error)
            await asyncio.sleep(SECONDS)

    def _new(self) -> list[_File]:
        """Return the oldest complete files that have not been inspected since their last change."""
        settled = time.time() - SETTLED_SECONDS
        files = (file for file in self._files() if file > self._last and file.stamp <= settled)
        oldest = heapq.nsmallest(MAX_FILES, files)
        new = [file for file in oldest if not self._known(file)]
        if oldest and not new:
            self._last = oldest[-1]
        return new

    def _files(self) -> Iterator[_File]:
        for folder, folders, names in os.walk(self.folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = os.path.join(folder, name)
                if name.startswith(".") or not name.lower().endswith(IMAGES) or os.path.islink(path):
                    continue
                try:
                    status = os.stat(path)
                except OSError:  # removed in the meantime
                    continue
                yield _File(max(status.st_mtime, status.st_ctime), path)

    def _name(self, file: _File) -> str:
        return Path(file.path).relative_to(self.folder).as_posix()

    def _known(self, file: _File) -> bool:
        since = datetime.fromtimestamp(file.stamp, UTC)
        same = Filter(name=self._name(file), source="folder", since=since)
        return bool(self._service.store.inspections(same, limit=1))

    async def _inspect(self, file: _File) -> None:
        try:
            content = await asyncio.to_thread(self._read, file.path)
        except OSError as error:  # removed in the meantime or not readable: continue with the next file
            log.warning("Watching %s: %s", self.folder, error)
            self._last = file
            return
        while True:
            try:
                await self._service.inspect([Upload(self._name(file), content)], source="folder", actor=ACTOR)
                break
            except BusyError:
                await asyncio.sleep(SECONDS)
        self._last = file

    def _read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read(self._service.config.max_image_bytes + 1)


def _raise(error: OSError) -> None:
    raise error
