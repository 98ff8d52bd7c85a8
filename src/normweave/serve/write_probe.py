"""Whether something can be written now: asked often, tested seldom, and answered soon even if a test hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from normweave.serve.database import StoreError

PROBE_SECONDS = 0.3
"""How long a result is used again."""
WAIT_SECONDS = 5.0
"""Longest wait of a caller for a test. An object store that hangs is noticed by its own time limits much later."""


class WriteProbe:
    """Tests in a thread of its own, and shares each result between all callers.

    Args:
        test: raises NormweaveError if nothing can be written.
    """

    def __init__(self, test: Callable[[], None]) -> None:
        self._test = test
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="probe")
        self._last: Future[None] | None = None
        self._ended_at = 0.0

    def check(self) -> None:
        """Raise what the last test raised, after a new one if that is too old.

        Raises:
            NormweaveError: nothing can be written.
            StoreError: the test has not ended within `WAIT_SECONDS`.
        """
        with self._lock:
            last = self._last
            if last is None or (last.done() and time.monotonic() >= self._ended_at + PROBE_SECONDS):
                last = self._last = self._worker.submit(self._run)
        try:
            last.result(WAIT_SECONDS)
        except TimeoutError as error:
            raise StoreError(
                f"A test whether images can be stored has not ended within {WAIT_SECONDS:g} s. Check that the place of "
                "the images and the database answer."
            ) from error

    def close(self) -> None:
        """End the thread, after the test that it may be running."""
        self._worker.shutdown(wait=True)

    def _run(self) -> None:
        try:
            self._test()
        finally:
            self._ended_at = time.monotonic()
