"""Failed logins in the audit: a flood of them adds few entries."""

from __future__ import annotations

import logging
import threading

from normweave.serve.database import StoreError
from normweave.serve.store import Store

log = logging.getLogger(__name__)

FIRST_SECONDS, MOST_SECONDS = 60.0, 600.0
"""Time between two entries of failed logins: the first, and the longest. It doubles while logins fail."""
MOST_ADDRESSES = 16
"""Maximum number of addresses in one entry."""


class FailedLogins:
    """Count of the requests with a wrong token. The first is recorded at once, further ones together after a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._attempts = 0  # not recorded yet
        self._addresses: set[str] = set()
        self._timer: threading.Timer | None = None

    def add(self, address: str) -> None:
        """Count a request from this network address."""
        with self._lock:
            self._attempts += 1
            if len(self._addresses) < MOST_ADDRESSES:
                self._addresses.add(address)
            if self._timer is not None:
                return
            self._start_timer(FIRST_SECONDS)
        self._record()

    def close(self) -> None:
        """Record what is not recorded yet."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        self._record()

    def _start_timer(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._elapsed, [seconds])
        self._timer.daemon = True
        self._timer.start()

    def _elapsed(self, seconds: float) -> None:
        with self._lock:
            if self._timer is None or not self._attempts:
                self._timer = None
                return
            self._start_timer(min(2 * seconds, MOST_SECONDS))
        self._record()

    def _record(self) -> None:
        with self._lock:  # not held while writing, so that no request waits for the database
            attempts, addresses = self._attempts, sorted(self._addresses)
            self._attempts = 0
            self._addresses.clear()
        if attempts:
            try:
                self._store.add_audit("login_failed", detail={"attempts": attempts, "addresses": addresses})
            except StoreError as error:  # the next entry counts them
                log.warning("Failed logins are not recorded yet: %s", error)
                with self._lock:
                    self._attempts += attempts
                    self._addresses.update(addresses)
