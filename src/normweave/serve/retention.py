"""Retention: removes old inspections, and the images beyond the limit of their size."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import chain

from normweave.errors import NormweaveError
from normweave.serve.service import InspectionService

log = logging.getLogger(__name__)

SECONDS = 600.0
"""Time between two runs."""


class Retention:
    """Applies the limits of a service in a thread of its own, which can be started again after `stop`.

    It begins with the files of a killed server that belong to no inspection.
    """

    def __init__(self, service: InspectionService) -> None:
        self._service = service
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=[self._stopped], name="retention", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, stopped: threading.Event) -> None:
        service = self._service
        try:
            service.files.remove_orphans(service.store.unreferenced, stopped=stopped)
        except (NormweaveError, OSError) as error:  # the next start tries again
            log.warning("Files without an inspection are not removed: %s", error)
        while not stopped.wait(SECONDS):
            try:
                self.apply()
            except (NormweaveError, OSError) as error:  # the next run tries again
                log.warning("Retention failed: %s", error)

    def apply(self) -> None:
        """Remove inspections older than `keep_days`, and the oldest images beyond `keep_gib`."""
        files, store, config = self._service.files, self._service.store, self._service.config
        unreferenced: list[Iterable[str]] = []
        if config.keep_days:
            unreferenced.append(store.expire(before=datetime.now(UTC) - timedelta(days=config.keep_days)))
        if config.keep_gib:
            unreferenced.append(store.shrink(max_bytes=int(config.keep_gib * 2**30)))
        for digest in chain.from_iterable(unreferenced):
            files.remove_unreferenced(store.unreferenced, digest)
