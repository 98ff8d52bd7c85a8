"""Memory of the watched folder: which files were inspected, in an SQLite file beside the inspections.

A file is known by its name, size and time of change, all as they were when it was inspected. No time of the clock is
kept, so that a clock that is wrong cannot hide a file, and retention of inspections does not affect it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from normweave.serve.database import StoreError

CHUNK = 500
"""Files that are looked up in one query."""
MAX_GONE = 100_000
"""Files that are remembered after they left the folder. A folder that is away for a while loses none of them."""


class File(NamedTuple):
    """A file in the folder."""

    name: bytes
    """Path relative to the folder."""
    size: int
    """In bytes."""
    changed: int
    """Time of the last change as the file system reports it, in nanoseconds; compared for equality only."""


class Seen:
    """The inspected files. Methods may be called from any thread, one at a time; all raise StoreError on a failure.

    Args:
        path: SQLite file, created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS seen (number INTEGER PRIMARY KEY AUTOINCREMENT, name BLOB NOT NULL UNIQUE, "
                "size INTEGER NOT NULL, changed INTEGER NOT NULL)"
            )
            self._added = len(self)  # since the last call of `forget`, at least

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __len__(self) -> int:
        """Return the number of files that are remembered."""
        return int(self._database.execute("SELECT count(*) FROM seen").fetchone()[0])

    @property
    def is_full(self) -> bool:
        """Whether `forget` should be called."""
        return self._added > MAX_GONE

    def unseen(self, files: Iterable[File]) -> Iterator[File]:
        """Yield the files that were not inspected, or have changed since."""
        for chunk in _chunks(files):
            query = f"SELECT name, size, changed FROM seen WHERE {_one_of(chunk)}"
            with self._errors():
                known = {File._make(row) for row in self._database.execute(query, _names(chunk))}
            yield from (file for file in chunk if file not in known)

    def add(self, files: Sequence[File]) -> None:
        """Remember that these files were inspected, all or none. They are on disk when this method returns."""
        with self._errors(), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT OR REPLACE INTO seen (name, size, changed) VALUES (?, ?, ?)", files)
        self._added += len(files)

    def forget(self, present: Iterable[File]) -> None:
        """Forget all but the last `MAX_GONE` of the files that are not present."""
        with self._errors(), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            last = self._database.execute("SELECT coalesce(max(number), 0) FROM seen").fetchone()[0]
            for chunk in _chunks(present):  # they get new numbers, above `last`
                self._database.execute(
                    "INSERT OR REPLACE INTO seen (name, size, changed) SELECT name, size, changed FROM seen "
                    f"WHERE {_one_of(chunk)}",
                    _names(chunk),
                )
            self._database.execute(
                "DELETE FROM seen WHERE number <= "
                "(SELECT number FROM seen WHERE number <= ? ORDER BY number DESC LIMIT 1 OFFSET ?)",
                (last, MAX_GONE),
            )
        self._added = 0

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(
                f"The list of inspected files, {self._path}, failed: {error}. Check that its folder is writable and "
                "not full. If the list is damaged, remove it: the images in the folder are then inspected again."
            ) from error


def _one_of(files: Sequence[File]) -> str:
    return f"name IN ({', '.join('?' * len(files))})"


def _names(files: Sequence[File]) -> list[bytes]:
    return [file.name for file in files]


def _chunks(files: Iterable[File]) -> Iterator[list[File]]:
    remaining = iter(files)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk
