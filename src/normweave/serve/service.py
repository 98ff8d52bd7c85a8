"""A bundle at work: images in, kept inspections out. REST and the page both stand in front of it.

    inspect() → decode (threads) → network (one thread, whatever waits goes in together) → keep (one thread) → answer
                                                                                           files, then one transaction

The network never waits for a disk and the disk never for the network. Nothing is answered before it is on disk, and
no more than `max_waiting` images are in here at a time: beyond that the sender is told to come back.
"""

from __future__ import annotations

import asyncio
import io
import logging
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normweave import scoring
from normweave.data import images
from normweave.detector import Detector
from normweave.errors import DataError, ImageError, NormweaveError
from normweave.scoring import ImageScore, PreparedImage, TileScores
from normweave.serve.config import ServeConfig
from normweave.serve.files import Files
from normweave.serve.metrics import Metrics
from normweave.serve.records import (
    Decision,
    Inspection,
    NotFoundError,
    RateChange,
    Review,
    Source,
    StoredImage,
)
from normweave.serve.store import Store, StoreError
from normweave.types import Outcome

log = logging.getLogger(__name__)
T = TypeVar("T")

DECODERS = 2
"""Threads that decode."""
TIDY_SECONDS = 600.0
"""Between two looks at what is to be removed."""
PREVIEW_IMAGES = 10_000
"""Inspections that a new false-alarm rate is tried on."""


class BusyError(NormweaveError):
    """As many images wait as the server takes."""


class StoppedError(NormweaveError):
    """The server is about to stop and takes nothing more."""


class Upload(NamedTuple):
    """An image as it came in."""

    name: str
    content: bytes


@dataclass(frozen=True, kw_only=True)
class RatePreview:
    """What another false-alarm rate would have said of what was inspected."""

    false_alarm_rate: float
    n: int
    """Inspections judged anew, the newest of this bundle."""
    now: dict[str, int]
    """How many of each verdict, as they were judged."""
    then: dict[str, int]
    changed: int
    """How many would have another verdict."""


@dataclass(kw_only=True)
class _Job:
    """An image on its way; its `latency_ms` counts from here, waiting included."""

    upload: Upload
    source: Source
    actor: str
    received_at: datetime
    started: float
    detector: Detector
    """With the lines as they were when the image came in."""
    done: Future[Inspection] = field(default_factory=Future)
    opened: PreparedImage | None = None
    scored: TileScores | None = None


class InspectionService:
    """Takes images, judges them, keeps what it said.

    Args:
        runtime: the bundle.
        store: where inspections are kept; it also knows the rate that an engineer set for this bundle.
        files: where their images and scores lie.

    Attributes:
        runtime: with the lines as they are now.
    """

    def __init__(self, runtime: Detector, *, store: Store, files: Files, config: ServeConfig) -> None:
        change = store.rate(runtime.bundle_hash or "")
        self.detector = runtime if change is None else runtime.with_rate(change.false_alarm_rate)
        self.store = store
        self.files = files
        self.config = config
        self.metrics = Metrics()
        self._lock = threading.Lock()
        self._waiting = 0
        self._stopping = False
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self._readers = ThreadPoolExecutor(DECODERS, thread_name_prefix="read")
        self._opened: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._scored: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True)
            for work in (self._judge, self._keep, self._tidy)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Images taken and not yet answered."""
        return self._waiting

    def ready(self) -> None:
        """Whether an image would be judged and kept now.

        Raises:
            NormweaveError: why not.
        """
        if self._stopping:
            raise StoppedError("The server is stopping.")
        if dead := [thread.name for thread in self._threads if not thread.is_alive()]:
            raise StoppedError(f"The server's {', '.join(dead)} has stopped. Restart it and look at its log.")
        if (free := shutil.disk_usage(self.files.folder).free) < self.config.max_request_bytes:
            raise StoreError(
                f"{free:,} bytes are free where {self.files.folder} lies, which is less than one request may bring. "
                "Make room, or keep less (--keep-days, --keep-gib)."
            )
        self.store.ping()

    # ── images in, inspections out ───────────────────────────────────────────────────────────────────────────────────

    async def inspect(self, uploads: Sequence[Upload], *, source: Source, actor: str) -> list[Inspection]:
        """Judge images and keep what was said, in their order; all are kept when this returns.

        Who stops waiting, stops waiting only: what was taken is judged and kept all the same.

        Raises:
            BusyError: too many are waiting.
            StoppedError: the server is stopping.
            NormweaveError: nothing could be kept, or the bundle failed.
        """
        with self._lock:
            if self._stopping:
                raise StoppedError("The server is stopping. Send the images again when it is back.")
            if self._waiting + len(uploads) > self.config.max_waiting:
                self.metrics.refused.inc(len(uploads))
                raise BusyError(
                    f"{self._waiting} images are waiting and {len(uploads)} more came, but at most "
                    f"{self.config.max_waiting} may wait. Send them again in a moment."
                )
            self._waiting += len(uploads)
            self.metrics.waiting.set(self._waiting)
            now, started = datetime.now(UTC), time.perf_counter()
            jobs = [
                _Job(
                    upload=upload,
                    source=source,
                    actor=actor,
                    received_at=now,
                    started=started,
                    detector=self.detector,
                )
                for upload in uploads
            ]
            for job in jobs:
                job.done.add_done_callback(self._left)
                self._decoders.submit(self._open, job)
        return list(await asyncio.gather(*(asyncio.shield(asyncio.wrap_future(job.done)) for job in jobs)))

    def _left(self, _: Future[Inspection]) -> None:
        with self._lock:
            self._waiting -= 1
        self.metrics.waiting.set(self._waiting)

    def _open(self, job: _Job) -> None:
        """Decode; on its way the image only gets heavier, so that here is where a large one is refused."""
        try:
            job.opened = self._refused(job.upload) or job.detector.open(job.upload.content)
        except BaseException as error:
            job.done.set_exception(error)
            return
        self._opened.put(job)

    def _refused(self, upload: Upload) -> PreparedImage | None:
        """Why an image is not even decoded."""
        if len(upload.content) > self.config.max_image_bytes:
            reason = (
                f"too large: more than {self.config.max_image_bytes:,} bytes, which is the most that this server takes "
                "of an image."
            )
            return PreparedImage(None, (0, 0), (), None, reason)
        try:
            height, width = images.size(upload.content)
        except ImageError as error:
            return PreparedImage(None, (0, 0), (), None, str(error))
        if height * width > self.config.max_pixels:
            reason = (
                f"too large, refused before decoding: {height} x {width} pixels (height x width). This server takes up "
                f"to {self.config.max_pixels:,} pixels. Shrink it or cut it into pieces."
            )
            return PreparedImage(None, (0, 0), (), None, reason)
        return None

    def _judge(self) -> None:
        """Whatever waits goes through the network together, up to a batch: alone without delay, many without waste."""
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
            try:
                answers = first.detector.scores([_opened(job) for job in batch])
            except BaseException as error:
                _fail(batch, error)
                continue
            for job, scored in zip(batch, answers, strict=True):
                job.scored = scored
            self.metrics.batch.observe(len(batch))
            self._scored.put(batch)
        self._scored.put(None)

    def _keep(self) -> None:
        """Files first, then the records of a batch in one transaction, then the answers."""
        while (batch := self._scored.get()) is not None:
            try:
                with self.files.write_lock:
                    kept = self.store.add([self._inspection(job) for job in batch])
            except BaseException as error:
                if isinstance(error, OSError):
                    error = StoreError(
                        f"The images cannot be kept: {error}. Make room where {self.files.folder} lies, or mend it."
                    )
                _fail(batch, error)
                continue
            for job, inspection in zip(batch, kept, strict=True):
                self.metrics.observe(inspection, seconds=time.perf_counter() - job.started)
                job.done.set_result(inspection)

    def _inspection(self, job: _Job) -> Inspection:
        opened, scored = _opened(job), job.scored
        try:
            outcome = job.detector.outcome(opened, scored, maps=False)
            if outcome.verdict in ("anomalous", "unknown"):  # only there are boxes to be found
                outcome = job.detector.outcome(opened, scored, maps=True)
        except DataError as error:  # of this image: it does not stop the others
            outcome, scored = Outcome(image_path=None, error=str(error), model=job.detector.model), None
        outcome = replace(
            outcome,
            image_path=job.upload.name,
            anomaly_map=None,
            latency_ms=(time.perf_counter() - job.started) * 1000 if scored is not None else None,
            bundle_hash=job.detector.bundle_hash,
        )
        inspection = Inspection(
            received_at=job.received_at,
            name=job.upload.name,
            source=job.source,
            actor=job.actor,
            outcome=outcome,
        )
        if scored is None:
            return inspection
        grids = io.BytesIO()
        np.save(grids, scored.raw.scores, allow_pickle=False)
        line = job.detector.map_threshold
        assert outcome.threshold is not None  # it was judged
        return replace(
            inspection,
            routed=ImageScore.of(scored).subclass,
            image=StoredImage(
                image_hash=self.files.put(job.upload.content),
                image_type=media_type(job.upload.content),
                image_bytes=len(job.upload.content),
                grids_hash=self.files.put(grids.getvalue()),
                grids_bytes=len(grids.getvalue()),
                tiles=opened.tiles,
                smoothing=job.detector.smoothing,
                map_threshold=outcome.threshold if line is None else line,
            ),
        )

    # ── what was kept ────────────────────────────────────────────────────────────────────────────────────────────────

    async def inspection(self, id: int) -> Inspection:
        """One that was kept.

        Raises:
            NotFoundError: there is none.
        """
        return await self._read(lambda: self._inspection_of(id))

    def _inspection_of(self, id: int) -> Inspection:
        found = self.store.inspection(id)
        if found is None:
            raise _not_there(id)
        return found

    async def review(self, id: int, *, decision: Decision, reviewer: str, comment: str = "") -> Inspection:
        """What a person says of the part.

        Raises:
            NotFoundError: there is no such inspection.
        """
        review = Review(at=datetime.now(UTC), decision=decision, reviewer=reviewer, comment=comment)
        return await self._read(lambda: self._review(id, review))

    def _review(self, id: int, review: Review) -> Inspection:
        try:
            return self.store.review(id, review)
        except LookupError:
            raise _not_there(id) from None

    async def read_image(self, picture: StoredImage) -> bytes:
        """The image as it came in.

        Raises:
            DataError: its file is gone or damaged.
        """
        return await self._read(lambda: self.files.read(picture.image_hash))

    async def render(self, picture: StoredImage, work: Callable[[ImageReader], T]) -> T:
        """Whatever `work` makes of an image and its map, in a thread; two at a time, since they are large."""
        return await self._read(lambda: work(ImageReader(self.files, picture)))

    async def _read(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    # ── the line ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def preview_rate(self, rate: float, last: int = PREVIEW_IMAGES) -> RatePreview:
        """What this false-alarm rate would have said of the newest inspections of this bundle.

        Raises:
            CheckError: the held-out normals are too few for it.
            ConfigError: it does not lie in (0, 1).
        """
        return await self._read(lambda: self._preview(rate, last))

    def _preview(self, rate: float, last: int) -> RatePreview:
        runtime = self.detector.with_rate(rate)
        calibration = runtime.calibration
        assert calibration is not None  # or it could not have been drawn anew
        now: Counter[str] = Counter()
        then: Counter[str] = Counter()
        changed = 0
        for one in self.store.scored_images(runtime.bundle_hash or "", newest=last):
            verdict = calibration.decide(score=one.score, distance=one.distance, subclass=one.routed).verdict
            now[one.verdict] += 1
            then[verdict] += 1
            changed += verdict != one.verdict
        return RatePreview(
            false_alarm_rate=rate, n=now.total(), now=dict(now), then=dict(then), changed=changed
        )

    async def change_rate(self, rate: float, *, actor: str) -> None:
        """Draw the lines for this rate from now on, and after a restart with this bundle.

        Raises:
            CheckError: the held-out normals are too few for it.
            ConfigError: it does not lie in (0, 1).
        """
        await self._read(lambda: self._change(rate, actor))

    def _change(self, rate: float, actor: str) -> None:
        with self._lock:
            runtime = self.detector.with_rate(rate)
            assert runtime.bundle_hash is not None  # it was loaded from a folder
            self.store.add_rate(
                RateChange(
                    at=datetime.now(UTC),
                    bundle_hash=runtime.bundle_hash,
                    false_alarm_rate=rate,
                    actor=actor,
                )
            )
            self.detector = runtime

    # ── retention, and the end ───────────────────────────────────────────────────────────────────────────────────────

    def _tidy(self) -> None:
        while not self._stopped.wait(TIDY_SECONDS):
            try:
                self.tidy()
            except NormweaveError as error:  # tried again later
                log.warning("Retention failed: %s", error)

    def tidy(self) -> None:
        """Remove what is older or more than the settings keep."""
        if self.config.keep_days:
            self._remove(self.store.expire(before=datetime.now(UTC) - timedelta(days=self.config.keep_days)))
        if self.config.keep_gib:
            self._remove(self.store.shrink(max_bytes=int(self.config.keep_gib * 2**30)))

    def _remove(self, forgotten: Iterable[str]) -> None:
        for digest in forgotten:
            self.files.remove_unless(self.store.is_referenced, digest)

    def stop(self) -> None:
        """Take nothing more, finish what was taken, and end the threads."""
        with self._lock:
            self._stopping = True
        self._decoders.shutdown(wait=True)
        self._opened.put(None)
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._readers.shutdown(wait=True)


class ImageReader:
    """The image of an inspection and its map, each decoded when it is asked for."""

    def __init__(self, files: Files, picture: StoredImage) -> None:
        self._files = files
        self.picture = picture

    def image(self) -> NDArray[np.uint8]:
        """(H, W, 3)."""
        return images.decode(self._files.read(self.picture.image_hash))

    def anomaly_map(self) -> NDArray[np.float32]:
        """(H, W)."""
        grids = np.load(io.BytesIO(self._files.read(self.picture.grids_hash)), allow_pickle=False)
        tiles = self.picture.tiles
        size = (
            max(tile.top + tile.height for tile in tiles),
            max(tile.left + tile.width for tile in tiles),
        )
        return scoring.anomaly_map(grids, tiles, size, smoothing=self.picture.smoothing)


def png(pixels: NDArray[np.uint8], *, max_side: int | None = None) -> bytes:
    """A PNG of (H, W, 3 or 4) pixels, shrunk to at most `max_side` a side."""
    picture = Image.fromarray(pixels)
    if max_side is not None:
        picture.thumbnail((max_side, max_side))
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=3)
    return content.getvalue()


_TYPES = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8", "image/jpeg"),
    (b"BM", "image/bmp"),
    (b"II", "image/tiff"),
    (b"MM", "image/tiff"),
    (b"RIFF", "image/webp"),
)


def media_type(content: bytes) -> str:
    """What kind of image the bytes are, whatever the sender called them."""
    return next((name for start, name in _TYPES if content.startswith(start)), "application/octet-stream")


def _not_there(id: int) -> NotFoundError:
    return NotFoundError(f"There is no inspection {id}. See GET /v1/inspections for those there are.")


def _opened(job: _Job) -> PreparedImage:
    assert job.opened is not None  # no job goes on without
    return job.opened


def _fail(jobs: Sequence[_Job], error: BaseException) -> None:
    for job in jobs:
        job.done.set_exception(error)
