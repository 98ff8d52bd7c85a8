"""Inspection service: images in, stored inspections out. The REST interface, the pages and the folder watcher call it.

    inspect() → decode (threads) → score (one thread, waiting images in one batch) → store (one thread) → answer
                                                                                     files, then one transaction

Scoring and storing run at the same time. An inspection is answered after it is on disk. At most `max_waiting` images
are in the service at a time; further ones are refused with BusyError.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

from normweave.data import images
from normweave.detector import Detector
from normweave.errors import DataError, ImageError, NormweaveError
from normweave.outcome.parts import PartRule
from normweave.references import References
from normweave.scoring import ImageScore, PreparedImage, TileScores
from normweave.serve.config import ServeConfig
from normweave.serve.database import StoreError
from normweave.serve.detectors import Detectors
from normweave.serve.files import Files, FullError, ImageStore
from normweave.serve.metrics import Metrics
from normweave.serve.models import Models
from normweave.serve.rates import preview
from normweave.serve.records import (
    Inspection,
    NotFoundError,
    RatePreview,
    RequestPart,
    Review,
    ReviewDecision,
    Source,
    StoredImage,
)
from normweave.serve.rendering import ImageReader, grids_file, media_type
from normweave.serve.replicas import Replica
from normweave.serve.store import Store
from normweave.serve.together import Together
from normweave.serve.write_probe import WriteProbe
from normweave.types import Outcome

log = logging.getLogger(__name__)
T = TypeVar("T")

DECODERS = 2
"""Number of threads that decode images."""
PREVIEW_IMAGES = 10_000
"""Number of inspections that the preview of a false-alarm rate uses."""


class BusyError(NormweaveError):
    """The maximum number of images is waiting."""


class StoppedError(NormweaveError):
    """The server is stopping and accepts no images."""


class Upload(NamedTuple):
    """An image file as it was sent."""

    name: str
    content: bytes
    part: str | None = None
    """Id of the part that it shows; None: that of `part_rule`, if any."""
    view: str | None = None
    """Name of the view of the part."""


@dataclass(kw_only=True)
class _Job:
    """An image in the service."""

    upload: Upload
    source: Source
    actor: str
    token: int | None
    received_at: datetime
    started: float
    detector: Detector
    """With the thresholds at the time of arrival."""
    compared: bool
    """Whether the candidate in the shadow judges the image too: not that of a view with a bundle of its own."""
    request: RequestPart | None
    together: Together[_Job]
    """The images of the same request and part."""
    done: Future[Inspection] = field(default_factory=Future)
    opened: PreparedImage = field(default=PreparedImage(None, (0, 0), (), None, None))
    scored: TileScores | None = None

    @property
    def seconds(self) -> float:
        """Time since the image arrived, including the time it waited."""
        return time.perf_counter() - self.started


class InspectionService:
    """Scores images and stores the results.

    Args:
        detector: loaded from a bundle.
        store: stores inspections; its last false-alarm rate for a bundle replaces that of the bundle.
        files: stores images and patch scores.
        folder: of what belongs to this server alone; None: the one in which the folder of `files` is.
        views: the detectors of views of parts with a bundle of their own.

    Attributes:
        folder: of what belongs to this server alone.
        refusal: why no image is accepted, which is for a while only; None: images are accepted.
        detectors: with the current thresholds.
        models: the library from which the active one is replaced; None: there is none.
        replica: this server among those of the line; None: it is the only one.
        waiting: number of images accepted and not yet answered.
        listeners: called from another thread when inspections have been stored.
        part_rule: which images show a part.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        store: Store,
        files: ImageStore,
        config: ServeConfig,
        folder: Path | None = None,
        views: Mapping[str, Detector] | None = None,
    ) -> None:
        self.store = store
        self.metrics = Metrics(line=store.line)
        self.models: Models | None = None
        self.replica: Replica | None = None
        self.refusal: str | None = None
        self.part_rule = PartRule()
        self.detectors = Detectors(detector, views=views or {}, store=store, metrics=self.metrics)
        self.files = files
        files.removal = store.removing
        if folder is None:
            assert isinstance(files, Files)  # an object store is in no folder
            folder = files.folder.parent
        self.folder = folder
        self.config = config
        self._lock = threading.Lock()
        self.waiting = 0
        self._waiting_parts: Counter[str] = Counter()
        self.listeners: set[Callable[[], None]] = set()
        self._stopping = False
        self._scoring_since: float | None = None
        self._probe = WriteProbe(self._check_writable)
        self._failing = False
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self._readers = ThreadPoolExecutor(DECODERS, thread_name_prefix="read")
        self._writers = ThreadPoolExecutor(files.parallel, thread_name_prefix="write")
        self._opened: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._scored: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True)
            for work in (self._score_batches, self._store_batches)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def detector(self) -> Detector:
        """The detector of the active bundle."""
        return self.detectors.active

    def check_ready(self) -> None:
        """Check that an image could be scored and stored now.

        Raises:
            NormweaveError: the server is stopping, a thread has stopped, the disk is full or the database failed.
        """
        if self._stopping:
            raise StoppedError("The server is stopping.")
        if self.refusal is not None:
            raise StoppedError(self.refusal)
        if stopped := [thread.name for thread in self._threads if not thread.is_alive()]:
            raise StoppedError(
                f"These threads of the server have stopped: {', '.join(stopped)}. Restart it and read its log."
            )
        if (since := self._scoring_since) is not None:
            seconds = time.monotonic() - since
            if seconds > 2 * self.config.score_seconds:
                raise StoppedError(
                    f"The network has been scoring the same images for {seconds:.0f} s, which should take at most "
                    f"{self.config.score_seconds:g} s. Restart the server if this does not end."
                )
        self._probe.check()  # all callers share a result, since anyone may ask

    def _check_writable(self) -> None:
        try:
            self.files.check_writable(free=self.config.max_request_bytes)
        except FullError as error:
            raise StoreError(str(error)) from error
        except OSError as error:
            raise _not_written(self.files, error) from error
        self.store.check_writable()

    # ── from an upload to a stored inspection ────────────────────────────────────────────────────────────────────────

    async def inspect(
        self,
        uploads: Sequence[Upload],
        *,
        source: Source,
        actor: str,
        token: int | None = None,
        parts: Sequence[RequestPart] | None = None,
    ) -> list[Inspection]:
        """Score and store images, and return their inspections in the same order.

        All are stored when this method returns. Cancelling the call does not stop the inspection of its images.

        Args:
            actor: name of the token that the images came with.
            token: id of this token.
            parts: the place of each image in a request with a key.

        Raises:
            BusyError: too many images are waiting.
            ConfigError: an image has a view and shows no part.
            StoppedError: the server is stopping.
            NormweaveError: the images could not be stored, or the bundle failed.
        """
        places: Sequence[RequestPart | None] = parts or [None] * len(uploads)
        identify = self.part_rule.identify
        named = [Upload(one.name, one.content, *identify(one.name, part=one.part, view=one.view)) for one in uploads]
        with self._lock:
            if self._stopping:
                raise StoppedError("The server is stopping. Send the images again when it is back.")
            if self.refusal is not None:
                raise StoppedError(self.refusal)
            if self.waiting + len(uploads) > self.config.max_waiting:
                self.metrics.refused.inc(len(uploads))
                raise BusyError(
                    f"{self.waiting} images are waiting and {len(uploads)} more were sent, but at most "
                    f"{self.config.max_waiting} may wait. Send them again in a moment."
                )
            self.waiting += len(uploads)
            self.metrics.waiting.set(self.waiting)
            now, started = datetime.now(UTC), time.perf_counter()
            counts = Counter(one.part for one in named if one.part is not None)
            together = {part: Together[_Job](count) for part, count in counts.items()}
            jobs, active = [], self.detector  # one for the whole request: it may be replaced at any time
            for upload, part in zip(named, places, strict=True):
                own = self.detectors.of_view(upload.view)
                jobs.append(
                    _Job(
                        upload=upload,
                        source=source,
                        actor=actor,
                        token=token,
                        received_at=now,
                        started=started,
                        detector=own or active,
                        compared=own is None,
                        request=part,
                        together=Together(1) if upload.part is None else together[upload.part],
                    )
                )
            self._waiting_parts.update(counts)
            for job in jobs:
                job.done.add_done_callback(functools.partial(self._count_answered, job.upload.part))
                self._decoders.submit(self._open, job)
        return list(await asyncio.gather(*(asyncio.shield(asyncio.wrap_future(job.done)) for job in jobs)))

    def waiting_parts(self) -> set[str]:
        """Return the ids of the parts of which images are accepted and not stored yet."""
        with self._lock:
            return set(self._waiting_parts)

    def _count_answered(self, part: str | None, _: Future[Inspection]) -> None:
        with self._lock:
            self.waiting -= 1
            if part is not None:
                self._waiting_parts -= Counter([part])  # keeps positive counts only
        self.metrics.waiting.set(self.waiting)

    def _open(self, job: _Job) -> None:
        try:
            reason = self._limit_error(job.upload.content, job.detector)
            if reason is None:
                job.opened = job.detector.open(job.upload.content)
            else:
                job.opened = job.opened._replace(error=reason)
        except BaseException as error:
            job.done.set_exception(error)
            self._scored.put([job])  # others may wait for it
            return
        self._opened.put(job)

    def _limit_error(self, content: bytes, detector: Detector) -> str | None:
        """Return why the image is not decoded; None if it is within the limits."""
        if len(content) > self.config.max_image_bytes:
            return f"too large: more than {self.config.max_image_bytes:,} bytes, the maximum of this server."
        try:
            height, width = images.size(content)
            detector.preparation.checked_tiles(height, width)
        except ImageError as error:
            return str(error)
        if height * width > self.config.max_pixels:
            return (
                f"too large, refused before decoding: {height} x {width} pixels (height x width). The maximum of this "
                f"server is {self.config.max_pixels:,} pixels. Shrink the image or cut it into pieces."
            )
        return None

    def _score_batches(self) -> None:
        """Score all waiting images up to the batch size together; a single image does not wait for others."""
        while (first := self._opened.get()) is not None:
            batch = [first]
            while len(batch) < first.detector.batch_images:
                try:
                    job = self._opened.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    self._opened.put(None)
                    break
                batch.append(job)
            # Images of many tiles come last and one by one, so that they do not delay the others.
            small, large = list[_Job](), list[_Job]()
            for job in batch:
                (small if len(job.opened.tiles) <= job.detector.batch_images else large).append(job)
            for network in {id(job.detector.network) for job in small}:  # of views, and after a swap
                self._score([job for job in small if id(job.detector.network) == network], self._scores)
            for job in large:
                self._score([job], self._scores_of_large)
        self._scored.put(None)

    def _score(self, batch: list[_Job], scores: Callable[[list[_Job]], Sequence[TileScores | None]]) -> None:
        self._scoring_since = time.monotonic()
        try:
            outputs = scores(batch)
        except BaseException as error:
            _fail(batch, error)
            self._scored.put(batch)  # others may wait for it
            return
        finally:
            self._scoring_since = None
        for job, scored in zip(batch, outputs, strict=True):
            job.scored = scored
        self.metrics.batch.observe(len(batch))
        self._scored.put(batch)

    def _scores(self, batch: list[_Job]) -> Sequence[TileScores | None]:
        return batch[0].detector.scores([job.opened for job in batch])

    def _scores_of_large(self, batch: list[_Job]) -> Sequence[TileScores | None]:
        """Score the tiles of one image in several passes; after `score_seconds`, give up and set the reason."""
        (job,) = batch
        opened, size, limit = job.opened, job.detector.batch_images, self.config.score_seconds
        assert opened.pixels is not None  # an image that cannot be read has no tiles
        end = time.monotonic() + limit
        parts: list[TileScores] = []
        for start in range(0, len(opened.tiles), size):
            if time.monotonic() > end:
                job.opened = opened._replace(
                    pixels=None,
                    error=f"not inspected: after {limit:g} s, the maximum of this server, {start} of its "
                    f"{len(opened.tiles)} tiles were scored. Shrink the image or cut it into pieces.",
                )
                return [None]
            (scored,) = job.detector.scores([opened.part(start, start + size)])
            assert scored is not None
            parts.append(scored)
        return [TileScores.concatenate(parts)]

    def _store_batches(self) -> None:
        """Write the files, then the records of a batch in one transaction, then answer."""
        while (scored := self._scored.get()) is not None:
            batch = [one for job in scored for one in job.together.add(job) if not one.done.done()]
            if not batch:
                continue
            try:
                with self.files.write_lock, self.store.adding() as add:
                    stored = add(list(self._writers.map(self._inspection, batch)))
            except OSError as error:
                failure = _not_written(self.files, error)
                if not self._failing:  # once, not for each image
                    log.warning("%s", failure)
                self._failing = True
                _fail(batch + self._waiting_for_files(), failure)
                continue
            except BaseException as error:
                _fail(batch, error)
                continue
            self._failing = False
            compared = []
            for job, inspection in zip(batch, stored, strict=True):
                if inspection.received_at == job.received_at:  # not stored by another server in the meantime
                    self.metrics.observe(inspection, seconds=job.seconds)
                    if job.compared:
                        compared.append(inspection)
                job.done.set_result(inspection)
            self.notify()
            if self.models is not None:
                self.models.offer(compared)

    def _waiting_for_files(self) -> list[_Job]:
        """Return the images that are scored and wait: each would wait as long for the place of the files to fail."""
        found: list[_Job] = []
        for _ in range(self._scored.qsize()):
            scored = self._scored.get()
            if scored is None:
                self._scored.put(None)  # the last one
                break
            found += [one for job in scored for one in job.together.add(job) if not one.done.done()]
        return found

    def notify(self) -> None:
        """Call all listeners: inspections have been stored, by this server or by another one."""
        for listener in tuple(self.listeners):
            listener()

    def _inspection(self, job: _Job) -> Inspection:
        """Return the inspection of a scored image, with its files written."""
        detector, opened, scored = job.detector, job.opened, job.scored
        opened, scored = detector.regions.choose(opened, scored)
        try:
            outcome = detector.outcome(opened, scored, maps=False)
            if outcome.verdict in ("anomalous", "unknown"):  # only these have boxes, which need the map
                outcome = detector.outcome(opened, scored, maps=True)
        except DataError as error:  # of this image only
            outcome, scored = Outcome(image_path=None, error=str(error), model=detector.model), None
        upload = job.upload
        outcome = replace(
            outcome,
            image_path=upload.name,
            error=outcome.error and outcome.error.removeprefix("bytes: "),  # the inspection has the name of the image
            anomaly_map=None,
            latency_ms=None if scored is None else job.seconds * 1000,
            bundle_hash=detector.bundle_hash,
            part_id=upload.part,
            view=upload.view,
        )
        routed = image = None
        if scored is not None:
            routed = ImageScore.of(scored).subclass
            content, grids = upload.content, grids_file(opened, scored)
            image = StoredImage(
                image_hash=self.files.put(content),
                image_type=media_type(content),
                image_bytes=len(content),
                grids_hash=self.files.put(grids),
                grids_bytes=len(grids),
                tiles=opened.tiles,
                smoothing=detector.smoothing,
                map_threshold=detector.box_threshold(outcome),
            )
        return Inspection(
            received_at=job.received_at,
            name=upload.name,
            source=job.source,
            actor=job.actor,
            token=job.token,
            line=self.store.line,
            outcome=outcome,
            routed=routed,
            image=image,
            request=job.request,
        )

    # ── stored inspections ───────────────────────────────────────────────────────────────────────────────────────────

    async def inspection(self, id: int) -> Inspection:
        """Return a stored inspection.

        Raises:
            NotFoundError: no inspection has this id.
        """
        found = await self._read(lambda: self.store.inspection(id))
        if found is None:
            raise _not_found(id)
        return found

    async def review(
        self,
        id: int,
        *,
        decision: ReviewDecision,
        reviewer: str,
        token: int | None = None,
        comment: str = "",
        defect: str = "",
    ) -> Inspection:
        """Add a reviewer decision.

        Args:
            reviewer: name of the token that the decision came with.
            token: id of this token.
            defect: name of the defect of a rejected part.

        Raises:
            NotFoundError: no inspection has this id.
        """
        review = Review(
            at=datetime.now(UTC), decision=decision, reviewer=reviewer, token=token, comment=comment, defect=defect
        )
        try:
            return await self._read(lambda: self.store.review(id, review))
        except LookupError:
            raise _not_found(id) from None

    async def read_image(self, stored: StoredImage) -> bytes:
        """Return the image file as it was sent.

        Raises:
            DataError: the file is missing or was changed.
        """
        return await self._read(lambda: self.files.read(stored.image_hash))

    async def render(self, stored: StoredImage, work: Callable[[ImageReader], T]) -> T:
        """Call `work` with the image and its map in a thread; two calls run at a time, which bounds the memory."""
        return await self._read(lambda: work(ImageReader(self.files, stored)))

    def references(self, inspection: Inspection) -> References | None:
        """Return the good images that the boxes of an inspection refer to; None if its bundle is not here any more."""
        bundle_hash = inspection.outcome.bundle_hash
        if (detector := self.detectors.of_bundle(bundle_hash)) is not None:
            return detector.network.references
        return None if self.models is None or bundle_hash is None else self.models.library.references(bundle_hash)

    async def _read(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    # ── operating points ─────────────────────────────────────────────────────────────────────────────────────────────

    async def preview_rate(self, rate: float, last: int = PREVIEW_IMAGES) -> RatePreview:
        """Return the verdicts that the newest inspections of this bundle would have at this false-alarm rate.

        Raises:
            CheckError: there are too few calibration images for this rate.
            ConfigError: the rate is not in (0, 1).
        """
        return await self._read(lambda: preview(self.store, self.detector.with_rate(rate), rate=rate, newest=last))

    async def change_rate(self, rate: float, *, actor: str, token: int | None = None) -> None:
        """Use the thresholds for this false-alarm rate from now on, also after a restart with this bundle.

        Args:
            actor: name of the token of the engineer.
            token: id of this token.

        Raises:
            CheckError: there are too few calibration images for this rate.
            ConfigError: the rate is not in (0, 1).
        """
        await self._read(lambda: self.detectors.change_rate(rate, actor=actor, token=token))

    # ── stopping ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> None:
        """Accept no more images, finish the accepted ones, and end the threads."""
        with self._lock:
            self._stopping = True
        self._decoders.shutdown(wait=True)
        self._opened.put(None)
        for thread in self._threads:
            thread.join()
        if self.models is not None:
            self.models.stop()
        self._readers.shutdown(wait=True)
        self._writers.shutdown(wait=True)
        self._probe.close()


def _not_written(files: ImageStore, error: OSError) -> StoreError:
    return StoreError(f"The images cannot be written to {files.name}: {str(error).rstrip('.')}. {files.cure}")


def _not_found(id: int) -> NotFoundError:
    return NotFoundError(f"There is no inspection {id}. GET /v1/inspections lists them.")


def _fail(jobs: Sequence[_Job], error: BaseException) -> None:
    for job in jobs:
        job.done.set_exception(error)
