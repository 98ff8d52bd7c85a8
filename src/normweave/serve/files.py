"""Image files and patch scores on disk, each named by the SHA-256 of its content.

    files/
    ├── .id                identifies the folder, wherever it is mounted; with PostgreSQL only
    ├── .database          identifies the database that the images belong to
    ├── .lock              held by the running server, or by all servers that share the folder
    └── ab/abcdef…         one file for each content, even if it is sent several times

Names given by senders never become part of a path.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path

from normweave.errors import DataError

if sys.platform != "win32":
    import fcntl

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARTIAL = ".partial-"
OWNER = ".database"
"""Name of the file that identifies the database."""
CHUNK = 500
"""Number of files that are looked up in the database at a time."""
MOST_ORPHANS = 1200
"""Most files without a record that one kill leaves: those of 500 inspections in retention, or of one batch."""
ABANDONED_SECONDS = 3600.0
"""Age at which a partial file in a folder that several servers share is of a killed one."""

log = logging.getLogger(__name__)


class ContentError(DataError):
    """A file is missing, was changed, or its hash is malformed."""


class MissingFileError(ContentError):
    """A file is missing."""


class FullError(OSError):
    """The disk has too little space."""


class ImageStore(ABC):
    """Contents by their SHA-256.

    Retention removes unreferenced files while new images arrive, which may have the same content. Therefore hold
    `write_lock` from `put` until the store has the record; `remove_unreferenced` checks and removes under that lock.

    Attributes:
        name: folder or address, for messages.
        removal: context in which `remove_unreferenced` checks and removes; keeps other servers from storing an
            inspection that refers to the file. See `Store.removing`.
        parallel: number of threads that write at the same time.
        cure: what to do when it cannot be written.
    """

    parallel = 1
    cure = "Free disk space, change the permissions of the folder, or repair the disk."

    def __init__(self, name: str) -> None:
        self.name = name
        self.write_lock = threading.RLock()
        self.removal: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    @abstractmethod
    def identity(self) -> str:
        """What tells whether two servers use the same store."""

    @abstractmethod
    def first(self, name: str, content: str) -> str:
        """Return the text of a file beside the images, after writing `content` if the file does not exist.

        Raises:
            OSError: it cannot be read or written.
        """

    def claim(self, database: str) -> None:
        """Note which database the images belong to; its servers remove those that none of its records refers to.

        Args:
            database: `Store.identity`.

        Raises:
            DataError: they belong to another database, or this cannot be read or written.
        """
        try:
            owner = self.first(OWNER, database)
        except OSError as error:
            raise DataError(f"Images cannot be stored in {self.name}: {str(error).rstrip('.')}. {self.cure}") from error
        if owner != database:
            raise DataError(
                f"The images in {self.name} belong to another database, whose servers would remove the images of this "
                "one. Give each database its own folder (--images, or --data without it). If the other database is "
                f"lost, remove the file {self.name.rstrip('/')}/{OWNER}: then the images belong to this one."
            )

    @abstractmethod
    def put(self, content: bytes) -> str:
        """Write a content and return its hash. It is stored to last once this method has returned.

        Raises:
            OSError: it cannot be written.
        """

    @abstractmethod
    def read(self, digest: str) -> bytes:
        """Return the content with this hash.

        Raises:
            ContentError: the file is missing or was changed, or the hash is malformed.
        """

    @abstractmethod
    def remove(self, digest: str) -> None:
        """Remove the file with this hash, if it exists.

        Raises:
            ContentError: the hash is malformed.
        """

    @abstractmethod
    def all_hashes(self) -> Iterator[str]:
        """Yield the hashes of all files in order."""

    @abstractmethod
    def check_writable(self, *, free: int = 0) -> None:
        """Raise OSError if no file can be written now, or there are less than `free` bytes of space."""

    def sweep(self) -> None:  # noqa: B027 - not every store has partial files
        """Remove partial files of a killed server; files that are being written now are kept."""

    def close(self) -> None:  # noqa: B027 - not every store holds something
        """Release the store for another server."""

    def remove_unreferenced(self, unreferenced: Callable[[set[str]], set[str]], digest: str) -> bool:
        """Remove a file unless a record refers to it, and return whether it was removed.

        Args:
            unreferenced: returns those of some hashes that no record refers to.
        """
        with self.write_lock, self.removal():
            if not unreferenced({digest}):
                return False
            self.remove(digest)
            return True

    def remove_orphans(self, unreferenced: Callable[[set[str]], set[str]], *, stopped: threading.Event) -> int:
        """Remove the files without a record that a killed server has left, and return their number.

        More than `MOST_ORPHANS`, or than files with a record, are not from a kill: the folder belongs to another
        database, or the database is restored from an older backup. Then nothing is removed.

        Args:
            unreferenced: returns those of some hashes that no record refers to.
            stopped: ends the search.
        """
        orphans: list[str] = []
        referenced = 0
        hashes = self.all_hashes()
        while (chunk := set(islice(hashes, CHUNK))) and not stopped.is_set() and len(orphans) <= MOST_ORPHANS:
            free = unreferenced(chunk)
            orphans += sorted(free)
            referenced += len(chunk) - len(free)
        if stopped.is_set() or not orphans:
            return 0
        if len(orphans) > min(MOST_ORPHANS, referenced):
            log.warning(
                "%s files in %s belong to no inspection, too many for a killed server, so none is removed. Check that "
                "the database belongs to this folder.",
                f"{len(orphans):,}{' or more' if len(orphans) > MOST_ORPHANS else ''}",
                self.name,
            )
            return 0
        removed = sum(self.remove_unreferenced(unreferenced, digest) for digest in orphans)
        log.warning("%d files of a killed server, which belong to no inspection, are removed.", removed)
        return removed


class Files(ImageStore):
    """A folder of files, for one server at a time, or for all servers that share it.

    Args:
        folder: created if it does not exist.
        shared: whether other servers may use it at the same time.

    Raises:
        DataError: another server uses the folder (not detected on Windows), or it is not writable.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self._shared = shared
        self._partial = f"{_PARTIAL}{uuid.uuid4().hex}-"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("a+")
        except OSError as error:
            raise DataError(
                f"The folder {folder} for images is not writable: {error.strerror}. "
                "Choose another folder, or change its permissions."
            ) from error
        if sys.platform != "win32":
            try:
                fcntl.flock(self._lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                self._lock.close()
                raise DataError(
                    f"Another server stores its images in {folder}. Stop that server, or choose another folder for "
                    "this one. Several servers share a folder if each is started with --images."
                ) from error

    @property
    def identity(self) -> str:
        """The same wherever the folder is mounted; drawn when it is read for the first time."""
        return self.first(".id", uuid.uuid4().hex)

    def first(self, name: str, content: str) -> str:
        """Return the text of a file beside the images, after writing `content` if the file does not exist.

        Raises:
            OSError: it cannot be read or written.
        """
        path = self.folder / name
        if not path.exists():
            drawn = self.folder / f"{self._partial}{uuid.uuid4().hex}"
            with drawn.open("xb") as file:
                file.write(content.encode())
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(drawn, path)  # unlike a renaming, it never replaces that of another server
            except FileExistsError:
                pass
            except OSError:  # the file system has no links; two servers that start for the first time may then collide
                drawn.replace(path)
            drawn.unlink(missing_ok=True)
            _sync_folder(self.folder)
        return path.read_bytes().decode(errors="replace").strip()

    def close(self) -> None:
        """Release the folder for another server."""
        self._lock.close()

    def check_writable(self, *, free: int = 0) -> None:
        """Raise OSError if no file can be written now, or there are less than `free` bytes of space."""
        left = shutil.disk_usage(self.folder).free
        if left < free:
            raise FullError(
                f"The disk of {self.folder} has {left:,} bytes free, less than one request may have. "
                "Free disk space, or keep less (--keep-days, --keep-gib)."
            )
        probe = self.folder / f"{self._partial}probe"
        try:
            probe.write_bytes(b"x")
        finally:
            probe.unlink(missing_ok=True)

    def put(self, content: bytes) -> str:
        """Write a content and return its hash. The file survives a power failure once this method has returned.

        A file that was changed on disk is replaced.

        Raises:
            OSError: the disk is full or broken; no partial file remains.
        """
        digest = hashlib.sha256(content).hexdigest()
        path = self._path(digest)
        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            stored = None
        except OSError as error:
            log.warning("The file %s cannot be read and is written again: %s", path, error)
            stored = None
        if stored != content:
            if stored is not None:
                log.warning("The file %s was changed on disk and is replaced. Check the disk.", path)
            self._write(path, content)
        # Also if the file exists: another thread may have written it and not yet synced the folder.
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
        """Return the content with this hash.

        Raises:
            ContentError: the file is missing or was changed, or the hash is malformed.
        """
        return read_content(self.folder, digest)

    def remove(self, digest: str) -> None:
        """Remove the file with this hash, if it exists.

        Raises:
            ContentError: the hash is malformed.
        """
        self._path(digest).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove partial files of a killed server; files that are being written now are kept."""
        for folder in [self.folder, *self._shards()]:
            for partial in folder.glob(f"{_PARTIAL}*"):
                if not partial.name.startswith(self._partial) and not self._may_be_written(partial):
                    partial.unlink(missing_ok=True)

    def _may_be_written(self, partial: Path) -> bool:
        """Return whether another server may be writing a partial file."""
        if not self._shared:
            return False
        try:
            return time.time() - partial.stat().st_mtime < ABANDONED_SECONDS
        except FileNotFoundError:
            return True

    def all_hashes(self) -> Iterator[str]:
        """Yield the hashes of all files in order."""
        for shard in self._shards():
            yield from sorted(path.name for path in shard.iterdir() if is_hash(path.name))

    def _shards(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and len(path.name) == 2)

    def _path(self, digest: str) -> Path:
        return _path(self.folder, digest)


def read_content(folder: Path, digest: str) -> bytes:
    """Return the content with this hash from the folder of a server, which may be running.

    Raises:
        ContentError: the file is missing or was changed, or the hash is malformed.
    """
    try:
        content = _path(folder, digest).read_bytes()
    except FileNotFoundError as error:
        raise MissingFileError(
            f"The file {digest} is not in {folder}. It was removed by retention or by another program."
        ) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise ContentError(
            f"The file {digest} in {folder} was changed on disk. Check the disk, and restore the file from a backup."
        )
    return content


def is_hash(name: str) -> bool:
    """Return whether a name is the hash of a file."""
    return _SHA256.fullmatch(name) is not None


def check_hash(digest: str) -> str:
    """Return the hash of a file.

    Raises:
        ContentError: it is not one.
    """
    if not is_hash(digest):
        raise ContentError(f"The hash of a file must be a SHA-256 in 64 lowercase hex digits, got {digest[:100]!r}.")
    return digest


def _path(folder: Path, digest: str) -> Path:
    return folder / check_hash(digest)[:2] / digest


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder through to the disk; Windows neither offers nor needs this."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
