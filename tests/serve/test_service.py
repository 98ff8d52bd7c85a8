"""The inspection service: order, batches, limits, failures, reviews and rates."""

import asyncio
import io
import struct
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inspections import inspect_files
from normweave.errors import BundleError, CheckError
from normweave.serve.config import ServeConfig
from normweave.serve.database import StoreError
from normweave.serve.records import Filter, NotFoundError
from normweave.serve.service import BusyError, InspectionService, StoppedError, Upload


@pytest.fixture
def held(service, monkeypatch):
    """Event that the network waits for."""
    free = threading.Event()
    scores = service.detector.scores
    monkeypatch.setattr(service.detector, "scores", lambda batch: (free.wait(30), scores(batch))[1])
    yield free
    free.set()


def test_outcomes_equal_those_of_the_detector_in_order(service, loaded, photos):
    kept = inspect_files(service, *photos)
    assert sorted(one.id for one in kept) == list(range(1, len(photos) + 1))
    for one, expected in zip(kept, loaded.score(photos), strict=True):
        outcome = one.outcome
        assert (outcome.image_path, outcome.verdict) == (expected.image_path, expected.verdict)
        assert outcome.pred_score == pytest.approx(expected.pred_score, rel=1e-4)
        assert outcome.boxes == tuple(box._replace(peak=pytest.approx(box.peak, rel=1e-4)) for box in expected.boxes)
        assert outcome.latency_ms > 0
        stored = service.store.inspection(one.id)
        assert replace(stored, received_at=one.received_at) == one


def test_image_and_map_of_an_inspection(service, loaded, photos):
    (one,) = inspect_files(service, photos[-1])
    (expected,) = loaded.score([photos[-1]])
    assert asyncio.run(service.read_image(one.image)) == Path(photos[-1]).read_bytes()
    drawn = asyncio.run(service.render(one.image, lambda drawing: drawing.anomaly_map()))
    np.testing.assert_allclose(drawn, expected.anomaly_map, rtol=1e-4, atol=1e-5)
    assert one.image.image_type == "image/png"


def test_the_map_of_a_tiled_image(service, photos, tmp_path):
    large = tmp_path / "large.png"
    Image.open(photos[0]).resize((300, 280)).save(large)  # 64 pixels a side are scored, four times that in tiles
    (one,) = inspect_files(service, large)
    assert len(one.image.tiles) == 4
    drawn = asyncio.run(service.render(one.image, lambda drawing: drawing.anomaly_map()))
    (expected,) = service.detector.score([large])
    np.testing.assert_allclose(drawn, expected.anomaly_map, rtol=1e-4, atol=1e-5)


def test_an_unreadable_image_does_not_affect_the_others(service, photos, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    first, bad, last = inspect_files(service, photos[0], tmp_path / "bad.png", photos[1])
    assert first.outcome.verdict is not None
    assert last.outcome.verdict is not None
    assert bad.outcome.verdict is None
    assert bad.outcome.error.startswith("not an image")
    assert bad.image is None
    assert service.store.inspection(bad.id).outcome.error == bad.outcome.error


def test_limits_of_an_image(start, photos):
    (bytes_,) = inspect_files(start(max_image_bytes=100), photos[0])
    assert "more than 100 bytes" in bytes_.outcome.error
    (pixels,) = inspect_files(start(max_pixels=1000), photos[0])
    assert "64 x 64 pixels (height x width). The maximum of this server is 1,000 pixels" in pixels.outcome.error


def blank(height, width):
    """The header of a PNG of this size, without pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_an_image_of_too_many_tiles_is_refused_before_decoding(start):
    service = start(max_pixels=100_000_000)
    uploads = [Upload("thin", blank(8, 6_000_000)), Upload("square", blank(8448, 8448))]
    thin, square = asyncio.run(service.inspect(uploads, source="api", actor="test"))
    assert "8 x 6000000 pixels (height x width). Allowed: up to 150,000,000 pixels, and 65,535" in thin.outcome.error
    assert "8448 x 8448 pixels (height x width) give 1,089 tiles" in square.outcome.error


def test_a_slow_image_delays_the_next_by_its_time_limit_at_most(start, photos, monkeypatch):
    service = start(score_seconds=0.3)
    scores = service.detector.scores
    slow = threading.Event()

    def slowly(batch):
        if batch[0].size == (600, 600):
            slow.set()
            time.sleep(0.2)
        return scores(batch)

    monkeypatch.setattr(service.detector, "scores", slowly)
    large = io.BytesIO()
    Image.open(photos[0]).resize((600, 600)).save(large, "PNG")

    async def walk():
        first = asyncio.ensure_future(
            service.inspect([Upload("large", large.getvalue())] * 2, source="api", actor="test")
        )
        await asyncio.to_thread(slow.wait, 10)
        begun = time.monotonic()
        (next_,) = await service.inspect([Upload("next", Path(photos[0]).read_bytes())], source="api", actor="test")
        return await first, next_, time.monotonic() - begun

    late, next_, seconds = asyncio.run(walk())
    for one in late:
        assert "not inspected: after 0.3 s, the maximum of this server, 8 of its 9 tiles" in one.outcome.error
    assert next_.outcome.verdict is not None
    assert seconds < 3


def test_a_large_image_is_scored_like_any_other(service, loaded, photos, tmp_path):
    large = tmp_path / "large.png"
    Image.open(photos[0]).resize((600, 600)).save(large)
    (one,) = inspect_files(service, large)
    assert len(one.image.tiles) > loaded.batch_images
    assert one.outcome.pred_score == pytest.approx(loaded.score(large).pred_score, rel=1e-5)


def test_ready_tells_that_scoring_does_not_end(start, photos, monkeypatch):
    service = start(score_seconds=0.05)
    free, begun = threading.Event(), threading.Event()
    scores = service.detector.scores
    monkeypatch.setattr(service.detector, "scores", lambda batch: (begun.set(), free.wait(30), scores(batch))[2])
    thread = threading.Thread(target=inspect_files, args=(service, photos[0]))
    thread.start()
    begun.wait(10)
    time.sleep(0.2)
    with pytest.raises(StoppedError, match=r"has been scoring the same images for .* Restart the server"):
        service.check_ready()
    free.set()
    thread.join()
    service.check_ready()


def test_a_score_that_is_not_finite_is_an_error_of_that_image_only(service, photos, monkeypatch):
    scores = service.detector.scores

    def spoiled(batch):
        return [
            one._replace(scores=one.scores * np.nan) if opened.size == (32, 32) else one
            for opened, one in zip(batch, scores(batch), strict=True)
        ]

    monkeypatch.setattr(service.detector, "scores", spoiled)
    small = io.BytesIO()
    Image.open(photos[0]).resize((32, 32)).save(small, "PNG")
    uploads = [Upload("good", Path(photos[0]).read_bytes()), Upload("bad", small.getvalue())]
    good, bad = asyncio.run(service.inspect(uploads, source="api", actor="test"))
    assert good.outcome.verdict is not None
    assert "must be finite" in bad.outcome.error


def test_waiting_images_are_scored_in_batches(service, photos, held, monkeypatch):
    sizes, decoded = [], []
    scores, read = service.detector.scores, service.detector.open
    monkeypatch.setattr(service.detector, "scores", lambda batch: (sizes.append(len(batch)), scores(batch))[1])
    monkeypatch.setattr(service.detector, "open", lambda image: (read(image), decoded.append(image))[0])

    async def all_at_once():
        content = Path(photos[0]).read_bytes()
        waiting = [
            asyncio.ensure_future(service.inspect([Upload(str(n), content)], source="api", actor="test"))
            for n in range(9)
        ]
        while len(decoded) < 9:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # until the last is in the queue
        held.set()
        return await asyncio.gather(*waiting)

    answers = asyncio.run(all_at_once())
    assert [answer[0].name for answer in answers] == [str(n) for n in range(9)]  # in the order of the calls
    assert max(sizes) == service.detector.batch_images == 4
    assert sum(sizes) == 9


def test_a_full_queue_refuses_further_images(start, photos, monkeypatch):
    service = start(max_waiting=3, max_images=3)
    free = threading.Event()
    scores = service.detector.scores
    monkeypatch.setattr(service.detector, "scores", lambda batch: (free.wait(30), scores(batch))[1])

    async def walk():
        content = Path(photos[0]).read_bytes()
        three = asyncio.ensure_future(service.inspect([Upload("a", content)] * 3, source="api", actor="test"))
        await asyncio.sleep(0.1)
        assert service.waiting == 3
        with pytest.raises(BusyError, match="3 images are waiting and 1 more were sent, but at most 3 may wait"):
            await service.inspect([Upload("b", content)], source="api", actor="test")
        free.set()
        assert len(await three) == 3
        assert len(await service.inspect([Upload("c", content)], source="api", actor="test")) == 1

    asyncio.run(walk())
    assert service.waiting == 0
    assert service.store.count(Filter()) == 4


def test_a_cancelled_call_does_not_stop_the_inspection(service, photos, held):
    async def walk():
        upload = Upload("left alone", Path(photos[0]).read_bytes())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await service.inspect([upload], source="api", actor="test")
        held.set()
        while service.waiting:
            await asyncio.sleep(0.01)

    asyncio.run(walk())
    assert service.store.count(Filter(name="left alone")) == 1


def test_stopping_finishes_accepted_images_and_refuses_further_ones(start, photos, monkeypatch):
    service = start()
    free = threading.Event()
    scores = service.detector.scores
    monkeypatch.setattr(service.detector, "scores", lambda batch: (free.wait(30), scores(batch))[1])

    async def walk():
        upload = Upload("taken", Path(photos[0]).read_bytes())
        taken = asyncio.ensure_future(service.inspect([upload], source="api", actor="test"))
        await asyncio.sleep(0.1)
        stopping = asyncio.ensure_future(asyncio.to_thread(service.stop))
        await asyncio.sleep(0.1)
        with pytest.raises(StoppedError):
            await service.inspect([upload], source="api", actor="test")
        with pytest.raises(StoppedError):
            service.check_ready()
        free.set()
        await stopping
        return await taken

    assert asyncio.run(walk())[0].id == 1


def test_after_a_failure_of_the_bundle_or_store_the_service_works(service, photos, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(service.detector, "scores", lambda batch: (_ for _ in ()).throw(BundleError("broken graph")))
        with pytest.raises(BundleError, match="broken graph"):
            inspect_files(service, photos[0])
    with monkeypatch.context() as broken:
        broken.setattr(service.files, "put", lambda content: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(StoreError, match=r"cannot be written to .*: disk full\. Free disk space"):
            inspect_files(service, photos[0])
    service.check_ready()
    assert inspect_files(service, photos[0])[0].id == 1
    assert service.waiting == 0


def test_images_that_wait_for_a_place_that_fails_fail_with_the_first(service, photos, monkeypatch, caplog):
    """Each would wait as long for it, one after another."""
    free, scored, written = threading.Event(), [], []
    scores = service.detector.scores
    monkeypatch.setattr(service.detector, "scores", lambda batch: (scores(batch), scored.append(len(batch)))[0])

    def put(content):
        written.append(content)
        free.wait(30)
        raise OSError("no answer")

    monkeypatch.setattr(service.files, "put", put)

    async def walk():
        upload = Upload("one", Path(photos[0]).read_bytes())
        first = asyncio.ensure_future(service.inspect([upload], source="api", actor="test"))
        while not written:
            await asyncio.sleep(0.01)
        others = [asyncio.ensure_future(service.inspect([upload], source="api", actor="test")) for _ in range(6)]
        while sum(scored) < 7:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        free.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    failures = asyncio.run(walk())
    assert {str(one) for one in failures} == {str(failures[0])}
    assert "cannot be written" in str(failures[0])
    assert len(written) == 1
    assert [one.message for one in caplog.records].count(str(failures[0])) == 1
    assert service.waiting == 0


def test_with_a_full_disk_the_service_is_not_ready(start):
    with pytest.raises(StoreError, match=r"bytes free, less than one request may have"):
        start(max_request_bytes=2**60).check_ready()


# ── reviews and rates ────────────────────────────────────────────────────────────────────────────────────────────────


def test_reviews(service, photos):
    (one,) = inspect_files(service, photos[0])
    reviewed = asyncio.run(service.review(one.id, decision="reject", reviewer="Ada", comment="scratch"))
    assert (reviewed.review.decision, reviewed.review.reviewer, reviewed.review.comment) == (
        "reject",
        "Ada",
        "scratch",
    )
    with pytest.raises(NotFoundError, match="no inspection 99"):
        asyncio.run(service.review(99, decision="accept", reviewer="Ada"))
    with pytest.raises(NotFoundError, match="no inspection 99"):
        asyncio.run(service.inspection(99))


def test_a_changed_rate_gives_the_previewed_verdicts(service, photos):
    now = inspect_files(service, *photos)
    preview = asyncio.run(service.preview_rate(0.3))
    assert preview.n == len(photos)
    asyncio.run(service.change_rate(0.3, actor="Eve"))
    then = inspect_files(service, *photos)
    verdicts = [[one.outcome.verdict for one in kept] for kept in (now, then)]
    assert preview.now == {verdict: verdicts[0].count(verdict) for verdict in set(verdicts[0])}
    assert preview.then == {verdict: verdicts[1].count(verdict) for verdict in set(verdicts[1])}
    assert preview.changed == sum(a != b for a, b in zip(*verdicts, strict=True)) > 0
    assert {one.outcome.false_alarm_rate for one in then} == {0.3}
    assert then[0].outcome.bundle_hash == now[0].outcome.bundle_hash


def test_a_changed_rate_survives_a_restart(start, loaded, photos):
    first = start()
    asyncio.run(first.change_rate(0.3, actor="Eve"))
    again = InspectionService(loaded, store=first.store, files=first.files, config=ServeConfig())
    assert again.detector.calibration.false_alarm_rate == 0.3
    assert loaded.calibration.false_alarm_rate == 0.1  # the bundle is unchanged
    again.stop()


def test_a_rate_with_too_few_calibration_images(service):
    for work in (service.preview_rate(0.001), service.change_rate(0.001, actor="Eve")):
        with pytest.raises(CheckError, match="needs at least 999 independent groups of held-out normal images"):
            asyncio.run(work)
    assert service.detector.calibration.false_alarm_rate == 0.1


# ── retention ────────────────────────────────────────────────────────────────────────────────────────────────────────


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_start_records_the_bundle_and_the_one_before(service, loaded, monkeypatch):
    def started():
        other = InspectionService(loaded, store=service.store, files=service.files, config=service.config)
        other.stop()

    monkeypatch.setattr(loaded, "bundle_hash", "d" * 64)
    started()
    monkeypatch.undo()
    started()
    newest, other, first = service.store.audit(event="bundle_loaded", limit=9)
    hashes = [(one.detail["before"], one.detail["bundle_hash"]) for one in (first, other, newest)]
    assert hashes == [(None, loaded.bundle_hash), (loaded.bundle_hash, "d" * 64), ("d" * 64, loaded.bundle_hash)]
    assert newest.detail["false_alarm_rate"] == 0.1


def test_a_damaged_image_is_mended_by_the_same_image(service, photos):
    (first,) = inspect_files(service, photos[0])
    path = service.files.folder / first.image.image_hash[:2] / first.image.image_hash
    path.write_bytes(path.read_bytes()[:-10])
    inspect_files(service, photos[0])
    assert service.files.read(first.image.image_hash) == Path(photos[0]).read_bytes()
