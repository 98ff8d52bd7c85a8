"""The folder watcher."""

import asyncio
import contextlib
import errno
import io
import os
import shutil
import time
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from normweave.serve import create_app
from normweave.serve import watch as module
from normweave.serve.database import StoreError
from normweave.serve.records import Filter, WatchState
from normweave.serve.retention import Retention
from normweave.serve.seen import Seen
from normweave.serve.service import BusyError, Upload
from normweave.serve.watch import Watch


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.02)
    monkeypatch.setattr(module, "SETTLED_SECONDS", 0.2)
    monkeypatch.setattr(module, "INCOMPLETE_SECONDS", 0.8)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.3)


@pytest.fixture
def camera(tmp_path):
    folder = tmp_path / "camera"
    folder.mkdir()
    return folder


def names(service):
    return [one.name for one in reversed(service.store.inspections(Filter(source="folder"), limit=100))]


async def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.02)


def watching(service, folder, walk):
    """Run `walk` while the folder is watched."""

    async def run(seen):
        watch = Watch(folder, service=service, seen=seen)
        watch.start()
        try:
            await walk(watch)
        finally:
            await watch.finish()

    with closing(Seen(folder.parent / "watched.sqlite")) as seen:
        asyncio.run(run(seen))


def test_existing_and_new_files_are_inspected_once(service, camera, photos):
    shutil.copy(photos[0], camera / "a.png")

    async def walk(watch):
        assert watch.running
        await until(lambda: names(service) == ["a.png"])
        (camera / "lot 7").mkdir()
        shutil.copy(photos[1], camera / "lot 7" / "b.png")
        await until(lambda: names(service) == ["a.png", "lot 7/b.png"])
        await asyncio.sleep(0.3)

    watching(service, camera, walk)
    watching(service, camera, lambda watch: asyncio.sleep(0.5))  # after a restart no file is inspected again
    assert names(service) == ["a.png", "lot 7/b.png"]


def test_what_retention_removed_is_not_inspected_again(start, camera, photos):
    service = start(keep_days=1e-9)
    shutil.copy(photos[0], camera / "a.png")

    async def walk(watch):
        await until(lambda: names(service) == ["a.png"])
        Retention(service).apply()
        await asyncio.sleep(0.4)

    watching(service, camera, walk)
    watching(service, camera, lambda watch: asyncio.sleep(0.5))
    assert names(service) == []


def test_long_names(service, camera, photos):
    """Of a name that is longer than the records hold, the end is kept."""
    folder = camera / ("a" * 250) / ("b" * 245)
    folder.mkdir(parents=True)
    for name in ("1.png", "20.png", "21.png"):
        shutil.copy(photos[0], folder / name)

    async def walk(watch):
        await until(lambda: len(names(service)) == 3)

    watching(service, camera, walk)
    below = f"{'a' * 250}/{'b' * 245}/"
    expected = [f"…{(below + name)[-499:]}" for name in ("1.png", "20.png", "21.png")]
    assert sorted(names(service)) == sorted(expected)


def test_a_changed_file_is_inspected_again(service, camera, photos):
    async def walk(watch):
        shutil.copy(photos[0], camera / "last.png")
        await until(lambda: len(names(service)) == 1)
        shutil.copy(photos[1], camera / "last.png")
        await until(lambda: len(names(service)) == 2)

    watching(service, camera, walk)


@pytest.mark.parametrize("form", ["PNG", "BMP"])
def test_a_slow_writer_is_inspected_once(service, camera, photos, form):
    """The writer pauses for longer than a file needs to settle."""
    content = io.BytesIO()
    Image.open(photos[0]).save(content, form)
    half = len(content.getvalue()) // 2

    async def walk(watch):
        with open(camera / f"slow.{form.lower()}", "wb") as file:
            for piece in (content.getvalue()[:half], content.getvalue()[half:]):
                file.write(piece)
                file.flush()
                await asyncio.sleep(0.5)
        await until(lambda: len(names(service)) == 1)
        await asyncio.sleep(0.3)

    watching(service, camera, walk)
    (one,) = service.store.inspections(Filter(), limit=10)
    assert one.outcome.error is None


def test_ignored_files(service, camera, photos, tmp_path):
    shutil.copy(photos[0], tmp_path / "secret.png")
    (camera / "link.png").symlink_to(tmp_path / "secret.png")
    (camera / "notes.txt").write_text("x")
    (camera / "around").symlink_to(camera)
    (camera / "folder.png").mkdir()
    os.mkfifo(camera / "a.png")  # without a writer: opening it would never return
    shutil.copy(photos[0], camera / ".hidden.png")
    (camera / "broken.png").write_bytes(b"x")
    shutil.copy(photos[0], camera / "z.png")

    async def walk(watch):
        await until(lambda: len(names(service)) == 2)
        await asyncio.sleep(0.2)

    watching(service, camera, walk)
    assert sorted(names(service)) == ["broken.png", "z.png"]
    assert service.store.count(Filter(unreadable=True)) == 1


def test_a_folder_that_is_gone_and_back(service, camera, photos):
    shutil.copy(photos[0], camera / "a.png")

    async def walk(watch):
        await until(lambda: names(service) == ["a.png"])
        camera.rename(camera.with_name("elsewhere"))
        await until(lambda: watch.state.state == "folder missing")
        assert "camera" in watch.state.last_error
        with pytest.raises(StoreError, match=r"camera are not inspected \(folder missing\)"):
            watch.check_ready()
        camera.mkdir()  # as an unmounted share: there, and empty
        await until(lambda: watch.state.state == "watching")
        camera.rmdir()
        camera.with_name("elsewhere").rename(camera)
        shutil.copy(photos[1], camera / "b.png")
        await until(lambda: names(service) == ["a.png", "b.png"])
        await until(lambda: watch.state == WatchState(state="watching", files_behind=0, last_error=None))
        watch.check_ready()

    watching(service, camera, walk)


@pytest.mark.parametrize("age", [-86_400, 30 * 86_400], ids=["ahead of the clock", "older than what was inspected"])
def test_the_times_of_files_do_not_matter(service, camera, photos, age):
    shutil.copy(photos[0], camera / "first.png")

    async def walk(watch):
        await until(lambda: names(service) == ["first.png"])
        (camera.parent / "moved").mkdir()
        shutil.copy(photos[1], camera.parent / "moved" / "second.png")
        os.utime(camera.parent / "moved" / "second.png", (time.time() - age, time.time() - age))
        (camera.parent / "moved").rename(camera / "moved")
        await until(lambda: names(service) == ["first.png", "moved/second.png"])

    watching(service, camera, walk)


def test_the_clock_does_not_matter(service, camera, photos, monkeypatch):
    shutil.copy(photos[0], camera / "first.png")

    async def walk(watch):
        await until(lambda: names(service) == ["first.png"])
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: 1000.0)
            shutil.copy(photos[1], camera / "second.png")
            os.utime(camera / "second.png", (1000, 1000))
            await until(lambda: names(service) == ["first.png", "second.png"])

    watching(service, camera, walk)


def test_a_file_that_cannot_be_read_does_not_stop_the_others(service, camera, photos, monkeypatch):
    for number, name in enumerate(("closed.png", "open.png")):
        shutil.copy(photos[number], camera / name)
    closed, opened = camera / "closed.png", os.open

    def refusing(path, *given):
        if path == closed:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *given)

    async def walk(watch):
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refusing)
            await until(lambda: names(service) == ["open.png"] and watch.state.last_error is not None)
            assert watch.state.last_error == "closed.png: [Errno 13] Permission denied"
            assert (watch.state.state, watch.state.files_behind) == ("watching", 1)
        await until(lambda: len(names(service)) == 2)
        await until(lambda: watch.state.last_error is None)

    watching(service, camera, walk)


def test_a_broken_list_of_inspected_files_is_reported_and_inspects_nothing_twice(service, camera, photos, monkeypatch):
    shutil.copy(photos[0], camera / "a.png")

    def broken(self, files):
        raise StoreError("The disk is full.")

    async def walk(watch):
        with monkeypatch.context() as patch:
            patch.setattr(Seen, "add", broken)
            await until(lambda: watch.state.state == "failed")
            await asyncio.sleep(0.3)
            assert watch.state.last_error == "The disk is full."
        await until(lambda: watch.state.state == "watching")
        await asyncio.sleep(0.3)

    watching(service, camera, walk)
    assert names(service) == ["a.png"]


def test_an_unforeseen_error_does_not_end_it(service, camera, photos, monkeypatch):
    async def walk(watch):
        with monkeypatch.context() as patch:
            patch.setattr(Seen, "unseen", lambda self, files: 1 / 0)
            await until(lambda: watch.state.state == "failed")
        shutil.copy(photos[0], camera / "a.png")
        await until(lambda: names(service) == ["a.png"])

    watching(service, camera, walk)


def test_taken_files_are_finished_and_remembered_when_it_is_paused(service, camera, photos):
    for number in range(3):
        shutil.copy(photos[number], camera / f"{number}.png")

    async def walk(watch):
        await until(lambda: service.waiting > 0 or names(service))  # they may be done between two looks
        watch.stop()
        assert watch.state.state == "paused"
        await asyncio.sleep(0.5)
        watch.start()
        await until(lambda: len(names(service)) == 3)
        await asyncio.sleep(0.5)

    watching(service, camera, walk)
    assert sorted(names(service)) == ["0.png", "1.png", "2.png"]


def test_the_watcher_waits_for_a_full_queue(start, camera, photos):
    service = start(max_waiting=1, max_images=1)
    for number in range(5):
        shutil.copy(photos[number], camera / f"{number}.png")
        os.utime(camera / f"{number}.png", (1000 + number, 1000 + number))

    async def walk(watch):
        while len(names(service)) < 5:
            with contextlib.suppress(BusyError):
                upload = Upload("other", Path(photos[0]).read_bytes())
                await service.inspect([upload], source="api", actor="test")
            await asyncio.sleep(0)

    watching(service, camera, walk)
    assert sorted(names(service)) == [f"{number}.png" for number in range(5)]


def test_a_new_file_does_not_wait_behind_many_old_ones(service, camera, photos, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(module, "SETTLED_SECONDS", 0.05)
    for number in range(40):
        shutil.copy(photos[0], camera / f"{number:02}.png")
        os.utime(camera / f"{number:02}.png", (1000 + number, 1000 + number))

    async def walk(watch):
        await until(lambda: len(names(service)) >= 2)
        assert set(names(service)[:2]) == {"38.png", "39.png"}
        shutil.copy(photos[1], camera / "new.png")
        os.utime(camera / "new.png", (500, 500))  # by the clock of the camera
        await until(lambda: "new.png" in names(service))
        assert "00.png" not in names(service)
        assert b"normweave_watch_files_behind 0.0" not in service.metrics.text()
        await until(lambda: len(names(service)) == 41)

    watching(service, camera, walk)
    text = service.metrics.text().decode()
    assert "normweave_watch_files_behind 0.0" in text
    assert 'normweave_watch_state{normweave_watch_state="paused"} 1.0' in text


def test_more_files_than_are_kept_in_memory(service, camera, photos, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILES", 2)
    for number in (3, 1, 4, 2, 0):
        shutil.copy(photos[0], camera / f"{number}.png")

    async def walk(watch):
        await until(lambda: watch.state.files_behind == 5)
        await until(lambda: len(names(service)) == 5)

    watching(service, camera, walk)


def test_readyz_reports_the_folder(service, access, keys, camera, tmp_path):
    with closing(Seen(tmp_path / "watched.sqlite")) as seen:
        watch = Watch(camera, service=service, seen=seen)
        app = create_app(service, access=access, watch=watch, pages=False)
        with TestClient(app, raise_server_exceptions=False) as client:
            ok = {"state": "watching", "files_behind": 0, "last_error": None}
            assert client.get("/readyz").json() == {"status": "ok", "watch": ok}
            camera.rmdir()
            end = time.monotonic() + 5
            while (answer := client.get("/readyz")).status_code == 200:
                assert time.monotonic() < end
            assert answer.status_code == 503
            assert "folder missing" in answer.text
            assert client.get("/healthz").json() == {"status": "ok"}
