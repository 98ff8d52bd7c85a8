"""Images and patch scores on disk, each under the SHA-256 of its content.

    files/
    ├── .lock              held by the server that works here
    └── ab/abcdef…         one file a content, whoever sent it and however often

No name that anybody sent becomes part of a path.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from normweave.errors import DataError

if sys.platform != "win32":
    import fcntl

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARTIAL = ".partial-"


class ContentError(DataError):
    """A content that is not there, or is no longer what it was."""


class Files:
    """A folder of contents, for one server at a time.

    A content that nobody refers to is removed while others come in, and may come in again that very moment. So
    whoever keeps a content holds `keeping` from `put` until the store has the record, and `remove_unless` asks
    the store and removes under the same lock.

    Args:
        folder: made if it is not there.

    Raises:
        DataError: another server works here (not noticed on Windows), or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write_lock = threading.RLock()
        self._partial = f"{_PARTIAL}{uuid.uuid4().hex}-"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("a+")
        except OSError as error:
            raise DataError(
                f"The folder {folder} for images cannot be written: {error.strerror}. "
                "Give the server a folder that it may write."
            ) from error
        if sys.platform != "win32":
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._lock.close()
                raise DataError(
                    f"Another server keeps its images in {folder}, and a folder serves one at a time. "
                    "Stop that one, or give this one a folder of its own."
                ) from error

    def close(self) -> None:
        """Let another server in."""
        self._lock.close()

    def put(self, content: bytes) -> str:
        """Keep a content and return its hash; it outlives a power cut when this returns.

        Raises:
            OSError: the disk is full or broken; nothing is left behind.
        """
        digest = hashlib.sha256(content).hexdigest()
        path = self._path(digest)
        if not path.exists():
            self._write(path, content)
        # Also if another thread wrote it, which may not have come this far yet.
        _sync_folder(path.parent)
        return digest

    def _write(self, path: Path, content: bytes) -> None:
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            _sync_folder(self.folder)
        partial = path.with_name(f"{self._partial}{uuid.uuid4().hex}")
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, digest: str) -> bytes:
        """The content of this hash.

        Raises:
            ContentError: it is not here, was changed on disk, or this is no hash.
        """
        try:
            content = self._path(digest).read_bytes()
        except FileNotFoundError as error:
            raise ContentError(
                f"The content {digest} is not in {self.folder}: retention has removed it, or somebody else has."
            ) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise ContentError(
                f"The content {digest} in {self.folder} was changed on disk. Check the disk, and bring the file "
                "back from a backup."
            )
        return content

    def remove(self, digest: str) -> None:
        """Forget a content, if it is here.

        Raises:
            ContentError: this is no hash.
        """
        self._path(digest).unlink(missing_ok=True)

    def remove_unless(self, referred: Callable[[str], bool], digest: str) -> bool:
        """Forget a content unless it is referred to by now, and say whether it was forgotten."""
        with self.write_lock:
            if referred(digest):
                return False
            self.remove(digest)
            return True

    def sweep(self) -> None:
        """Remove what a killed server left half written; writing goes on meanwhile."""
        for shard in self._shards():
            for partial in shard.glob(f"{_PARTIAL}*"):
                if not partial.name.startswith(self._partial):
                    partial.unlink(missing_ok=True)

    def all_hashes(self) -> Iterator[str]:
        """Every content that is here, in order, without a list of them."""
        for shard in self._shards():
            yield from sorted(path.name for path in shard.iterdir() if _SHA256.fullmatch(path.name))

    def _shards(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and len(path.name) == 2)

    def _path(self, digest: str) -> Path:
        if not _SHA256.fullmatch(digest):
            raise ContentError(
                f"A content is called by its SHA-256 in 64 small hex digits, got {digest[:100]!r}."
            )
        return self.folder / digest[:2] / digest


def _sync_folder(folder: Path) -> None:
    """Names in a folder outlive a power cut only after this; Windows neither offers nor needs it."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
