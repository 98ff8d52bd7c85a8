"""A folder that a camera writes to: every image in it is inspected once, in the order in which they came."""

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
"""Between two looks into the folder."""
SETTLED_SECONDS = 1.0
"""A file that has not changed for so long is whole."""
AT_ONCE = 500
"""Files of one look, the oldest first, so that a full folder takes no memory."""
ACTOR = "folder"


class _File(NamedTuple):
    """Ordered by when it came."""

    stamp: float  # seconds since 1970: of its content or of its name, whichever changed last
    path: str


class Watch:
    """Follows a folder while it runs. Files are read, never changed; the store knows which were inspected.

    Attributes:
        problem: why the last look failed; None: it did not.
    """

    def __init__(self, folder: Path, *, service: InspectionService) -> None:
        self.folder = folder
        self.problem: str | None = None
        self._service = service
        self._task: asyncio.Task[None] | None = None
        self._behind = _File(0.0, "")  # everything up to here has been inspected

    @property
    def running(self) -> bool:
        """Whether it follows the folder now."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Follow the folder, from inside the server's loop."""
        if not self.running:
            self._task = asyncio.get_running_loop().create_task(self._follow())

    def stop(self) -> None:
        """Follow it no longer; what was taken is still judged and kept."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _follow(self) -> None:
        while True:
            try:
                for file in await asyncio.to_thread(self._new):
                    await self._inspect(file)
                self.problem = None
            except (NormweaveError, OSError) as error:
                if str(error) != self.problem:
                    log.warning("Following %s: %s", self.folder, error)
                self.problem = str(error)
            await asyncio.sleep(SECONDS)

    def _new(self) -> list[_File]:
        """The oldest files that are whole and have not been inspected since they changed."""
        settled = time.time() - SETTLED_SECONDS
        files = (file for file in self._files() if self._behind < file and file.stamp <= settled)
        oldest = heapq.nsmallest(AT_ONCE, files)
        new = [file for file in oldest if not self._known(file)]
        if oldest and not new:
            self._behind = oldest[-1]
        return new

    def _files(self) -> Iterator[_File]:
        for place, folders, names in os.walk(self.folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = os.path.join(place, name)
                if name.startswith(".") or not name.lower().endswith(IMAGES) or os.path.islink(path):
                    continue
                try:
                    status = os.stat(path)
                except OSError:  # gone meanwhile
                    continue
                yield _File(max(status.st_mtime, status.st_ctime), path)

    def _name(self, file: _File) -> str:
        return Path(file.path).relative_to(self.folder).as_posix()

    def _known(self, file: _File) -> bool:
        since = datetime.fromtimestamp(file.stamp, UTC)
        wanted = Filter(name=self._name(file), source="folder", since=since)
        return bool(self._service.store.inspections(wanted, limit=1))

    async def _inspect(self, file: _File) -> None:
        try:
            content = await asyncio.to_thread(self._read, file.path)
        except (
            OSError
        ) as error:  # gone meanwhile, or not to be read: it is reported, and the next one follows
            log.warning("Following %s: %s", self.folder, error)
            self._behind = file
            return
        while True:
            try:
                await self._service.inspect([Upload(self._name(file), content)], source="folder", actor=ACTOR)
                break
            except BusyError:
                await asyncio.sleep(SECONDS)
        self._behind = file

    def _read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read(self._service.config.max_image_bytes + 1)


def _raise(error: OSError) -> None:
    raise error
