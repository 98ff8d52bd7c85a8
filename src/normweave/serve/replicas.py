"""Replicas: several servers of one line that share a PostgreSQL database and the images.

All of them inspect and show the same. One is the leader, and does what only one may do: read the sources, deliver to
the outputs, close parts, and remove what is too old. It holds an advisory lock of PostgreSQL, which ends with its
connection; then another replica becomes the leader. No table and no clock takes part in this.

An SQLite file has one server.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

from sqlalchemy import text

from normweave.errors import DataError, NormweaveError
from normweave.serve.database import Database, LockName, StoreError, lock_key
from normweave.serve.insertion import CHANNEL

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

CHECK_SECONDS = 0.5
"""Time between two checks of the connection, of the leadership, and of what other replicas have changed."""
_HOLDER = (
    "FROM pg_locks WHERE locktype = 'advisory' AND granted AND database = "
    "(SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND (classid::bigint << 32) | objid::bigint = "
)
"""Who holds a lock; PostgreSQL shows its key of 64 bits as two halves."""
_NAME_LENGTH = 63
"""Of the name of a connection to PostgreSQL, in bytes."""


class Leader(NamedTuple):
    """The server of a line that leads."""

    address: str
    since: datetime


class SoleServer:
    """An SQLite file or a data folder that this server alone uses; the operating system frees it with the process.

    Raises:
        DataError: another server uses it (not detected on Windows).
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = (path / ".lock" if path.is_dir() else path.with_name(f"{path.name}.lock")).open("a+")
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.close()
                raise DataError(
                    f"Another server uses {path}. Stop that server, or give each its own --data. Several servers of a "
                    "line share --database postgresql://… and --images."
                ) from error

    def close(self) -> None:
        """Free it for another server."""
        self._file.close()


class Replica:
    """One server of a line with several.

    Args:
        images: `ImageStore.identity`, which all servers of a line share.
        watches: whether it watches a folder, which one server of a line may do.
        server: `Store.server`, to ignore its own notifications.
        address: host and port of this server, by which people find it.

    Attributes:
        leads: whether it is the leader.

    Raises:
        DataError: another server of the line stores its images elsewhere, or watches a folder too.
        StoreError: the database failed.
    """

    def __init__(
        self,
        database: Database,
        *,
        line: str,
        images: str,
        server: str,
        watches: bool = False,
        address: str = "",
    ) -> None:
        self._database, self._line, self._images, self._server = database, line, images, server
        self._address = address
        self._watches = watches
        self.leads = False
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._connection: Any = self._join()

    def start(
        self,
        *,
        news: Callable[[], None],
        follow: Callable[[], None],
        leads: Callable[[], None],
        follows: Callable[[], None],
    ) -> None:
        """Start to compete for the leadership, and to follow the other replicas; all functions are called in threads.

        Args:
            news: another replica has stored inspections.
            follow: called often, to take over what another replica has changed.
            leads: this replica has become the leader.
            follows: it is the leader no longer.
        """
        self._news, self._follow, self._leads, self._follows = news, follow, leads, follows
        self._threads = [
            threading.Thread(target=work, name=f"replica {work.__name__.strip('_')}", daemon=True)
            for work in (self._compete, self._take_over)
        ]
        for thread in self._threads:
            thread.start()

    def leader(self) -> Leader | None:
        """Return which server of the line leads; None: none does at this moment. Reads the database."""
        query = text(f"SELECT application_name FROM pg_stat_activity WHERE pid IN (SELECT pid {_HOLDER} :key)")
        with self._database.reading() as connection:
            name = connection.scalar(query, {"key": lock_key("leader", self._line)})
        found = re.fullmatch(r"normweave ([0-9]+) (.*)", name or "")
        return None if found is None else Leader(found[2], datetime.fromtimestamp(int(found[1]), UTC))

    def stop(self) -> None:
        """Stop to compete and to follow. Call `close` when the work of the leader is done."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Give the leadership to another replica, and leave the line."""
        if self._connection is not None:
            self._connection.close()
        self.leads = False

    # ── the connection that holds the locks ──────────────────────────────────────────────────────────────────────────

    def _join(self) -> Any:
        """Return a connection that shows to other servers that this one is of the line, and where its images are."""
        connection = self._database.dedicated()
        try:
            self._check_images(connection)
            if self._watches and not _try(connection, "watch", self._line):
                raise DataError(
                    f"Another server of the line {self._line!r} watches a folder. Its list of inspected files is its "
                    "own, so one server of a line can do so: leave out --watch here."
                )
            connection.execute(f"LISTEN {CHANNEL}")
        except BaseException as error:
            connection.close()
            if isinstance(error, NormweaveError):
                raise
            raise StoreError(f"The replicas of the line {self._line!r} cannot be joined: {error}.") from error
        return connection

    def _check_images(self, connection: Any) -> None:
        line, images = lock_key("line", self._line), lock_key("images", self._line, self._images)
        connection.execute("SELECT pg_advisory_lock_shared(%s), pg_advisory_lock_shared(%s)", [line, images])
        held = f"SELECT pid {_HOLDER} %s"
        others = connection.execute(f"{held} EXCEPT {held}", [line, images]).fetchall()
        if others:
            raise DataError(
                f"Another server of the line {self._line!r} uses this database and stores its images elsewhere than "
                f"in {self._images}. Start all servers of a line with the same --images, and servers of other lines "
                "with another --name."
            )

    def _compete(self) -> None:
        while not self._stopped.is_set():
            try:
                if self._connection is None:
                    self._connection = self._join()
                    log.warning("The connection to the database is back.")
                    self._news()  # those of the meantime were missed
                if not self.leads and _try(self._connection, "leader", self._line):
                    # Other servers read who leads, and since when, from the name of the connection that has the lock.
                    name = f"normweave {int(time.time())} {self._address}"[:_NAME_LENGTH]
                    self._connection.execute("SELECT set_config('application_name', %s, false)", [name])
                    self.leads = True
                    log.info("This server is the leader of the line %r.", self._line)
                    self._leads()
                self._listen(self._connection)
            except Exception as error:  # of any type: without this thread, nobody would lead
                self._lose(error)
                self._stopped.wait(CHECK_SECONDS)

    def _listen(self, connection: Any) -> None:
        """Wait for notifications for `CHECK_SECONDS`, and test the connection."""
        end = time.monotonic() + CHECK_SECONDS
        while not self._stopped.is_set() and (left := end - time.monotonic()) > 0:
            came = [note.payload for note in connection.notifies(timeout=left, stop_after=1)]
            if any(payload != self._server for payload in came):
                self._news()
        connection.execute("SELECT 1")

    def _lose(self, error: Exception) -> None:
        """Do nothing more as the leader: PostgreSQL has freed the lock with the connection, or will soon."""
        connection, self._connection = self._connection, None
        if connection is not None:
            log.warning("The connection to the database is lost: %s", error)
            connection.close()
        if self.leads:
            self.leads = False
            self._follows()

    # ── what other replicas have changed ─────────────────────────────────────────────────────────────────────────────

    def _take_over(self) -> None:
        problem = ""
        while not self._stopped.wait(CHECK_SECONDS):
            try:
                self._follow()
                problem = ""
            except Exception as error:  # of any type: the next one may be taken over
                if str(error) != problem:
                    problem = str(error)
                    known = isinstance(error, NormweaveError)
                    log.warning("What other servers changed is not taken over: %s", error, exc_info=not known)


def _try(connection: Any, name: LockName, line: str) -> bool:
    """Take a lock until the end of the connection, and return whether it was free."""
    (taken,) = connection.execute("SELECT pg_try_advisory_lock(%s)", [lock_key(name, line)]).fetchone()
    return bool(taken)
