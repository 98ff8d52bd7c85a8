"""The candidate in the shadow: it judges stored images after their answers, within a budget, and delays no answer."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from normweave.errors import NormweaveError
from normweave.serve.candidate import CandidateError, CandidateProcess, Judgement
from normweave.serve.files import ImageStore
from normweave.serve.metrics import Metrics
from normweave.serve.model_store import ModelStore, ShadowOutcome, ShadowRun
from normweave.serve.records import Inspection
from normweave.types import Outcome, Tile

log = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
"""Outcomes are stored at most this often, since every transaction waits for the disk, as those of inspections do."""
_LISTS = {column.name: column.type for column in Outcome.columns() if column.is_list}


class Shadow:
    """Judges the images of inspections with a candidate, in a thread that waits for a process of low priority.

    Args:
        path: the bundle.
        share: highest share of the time of one processor that it may take.
        waiting: highest number of images that wait; further ones are skipped and counted.
        failed: called once from the thread with the reason why the candidate was switched off.
    """

    def __init__(
        self,
        run: ShadowRun,
        path: Path,
        *,
        store: ModelStore,
        files: ImageStore,
        metrics: Metrics,
        device: str,
        share: float,
        waiting: int,
        failed: Callable[[str], None],
    ) -> None:
        self.run = run
        self._path, self._share = path, share
        self._store, self._files, self._metrics, self._failed = store, files, metrics, failed
        self._queue: queue.Queue[Inspection | None] = queue.Queue(waiting)
        self._lock = threading.Lock()
        self._skipped = 0
        self._outcomes: list[ShadowOutcome] = []
        self._stopped = threading.Event()
        self._process = CandidateProcess(path, device=device)
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it was neither stopped nor switched off."""
        return not self._stopped.is_set()

    @property
    def waiting(self) -> int:
        """Number of images that wait."""
        return self._queue.qsize() if self.running else 0

    def offer(self, inspections: Sequence[Inspection]) -> None:
        """Take images that were answered, or skip them; returns at once."""
        for inspection in inspections:
            if inspection.image is None or not self.running:
                continue
            try:
                self._queue.put_nowait(inspection)
            except queue.Full:
                self._skip()

    def _skip(self) -> None:
        with self._lock:
            self._skipped += 1
        self._metrics.shadow_images.labels("skipped").inc()

    def stop(self) -> None:
        """End the process, skip what waits, and store what was judged."""
        self._stopped.set()
        self._process.kill()
        with contextlib.suppress(queue.Full):  # then the thread has work, and sees that it is stopped
            self._queue.put_nowait(None)
        self._thread.join()

    def _work(self) -> None:
        try:
            self._process.wait_ready()
            while self.running:
                self._judge_next()
                if self._outcomes or self._skipped:
                    self._flush()
        except CandidateError as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("The shadow has failed.")
            self._fail(f"{type(error).__name__}: {error}")
        self._process.close()
        with contextlib.suppress(queue.Empty):
            while True:
                if self._queue.get_nowait() is not None:
                    self._skip()
        self._flush()

    def _fail(self, reason: str) -> None:
        if self.running:
            self._stopped.set()
            log.warning("The candidate %s is switched off: %s", self._path.name, reason)
            self._failed(reason)

    def _judge_next(self) -> None:
        """Judge the images that come within `FLUSH_SECONDS`, each followed by a pause."""
        end = time.monotonic() + FLUSH_SECONDS
        while self.running and (left := end - time.monotonic()) > 0:
            try:
                inspection = self._queue.get(timeout=left)
            except queue.Empty:
                return
            if inspection is None or inspection.image is None:
                return
            start = time.monotonic()
            try:
                content = self._files.read(inspection.image.image_hash)
            except NormweaveError:  # retention has removed it
                self._skip()
                continue
            judgement = self._process.judge(content)
            self._outcomes.append(shadow_outcome(inspection, judgement, bundle_hash=self.run.bundle_hash))
            self._stopped.wait(judgement.seconds / self._share - (time.monotonic() - start))

    def _flush(self) -> None:
        with self._lock:
            skipped, self._skipped = self._skipped, 0
        outcomes, self._outcomes = self._outcomes, []
        try:
            self._store.add_outcomes(self.run.id, outcomes, skipped=skipped)
        except NormweaveError as error:
            log.warning("%d outcomes of the candidate are not stored: %s", len(outcomes), error)
            self._metrics.shadow_images.labels("skipped").inc(len(outcomes))
            with self._lock:
                self._skipped += skipped + len(outcomes)
            self._stopped.wait(FLUSH_SECONDS)
            return
        self._metrics.shadow_images.labels("judged").inc(len(outcomes))
        self._metrics.shadow_differences.inc(sum(one.smoothing is not None for one in outcomes))


def shadow_outcome(inspection: Inspection, judgement: Judgement, *, bundle_hash: str) -> ShadowOutcome:
    """Return what is stored of a judgement; what belongs to the map only if the verdicts differ."""
    values = dict(judgement.outcome)
    for name, item in _LISTS.items():
        values[name] = tuple(item(**one) for one in values[name])
    values |= {"bundle_hash": bundle_hash, "error": values["error"] and values["error"].removeprefix("bytes: ")}
    outcome = Outcome(image_path=None, **values)
    if outcome.verdict == inspection.outcome.verdict:
        return ShadowOutcome(inspection=inspection.id, outcome=outcome)
    return ShadowOutcome(
        inspection=inspection.id,
        outcome=outcome,
        tiles=tuple(Tile(*tile) for tile in judgement.tiles),
        smoothing=judgement.smoothing,
        map_threshold=judgement.map_threshold,
        grids=judgement.grids or None,
    )
