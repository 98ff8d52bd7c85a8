"""The folder watcher."""

import asyncio
import contextlib
import os
import shutil
import time
from pathlib import Path

import pytest

from normweave.serve import watch as module
from normweave.serve.records import Filter
from normweave.serve.service import BusyError, Upload
from normweave.serve.watch import Watch


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.02)
    monkeypatch.setattr(module, "SETTLED_SECONDS", 0.2)


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

    async def run():
        watch = Watch(folder, service=service)
        watch.start()
        try:
            await walk(watch)
        finally:
            watch.stop()

    asyncio.run(run())


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


def test_a_changed_file_is_inspected_again(service, camera, photos):
    async def walk(watch):
        shutil.copy(photos[0], camera / "last.png")
        await until(lambda: len(names(service)) == 1)
        shutil.copy(photos[1], camera / "last.png")
        await until(lambda: len(names(service)) == 2)

    watching(service, camera, walk)


def test_a_growing_file_is_not_read(service, camera, photos):
    content = Path(photos[0]).read_bytes()

    async def walk(watch):
        with open(camera / "slow.png", "wb") as file:
            for start in range(0, len(content), 1 + len(content) // 6):
                file.write(content[start : start + 1 + len(content) // 6])
                file.flush()
                await asyncio.sleep(0.1)
        await until(lambda: names(service) == ["slow.png"])

    watching(service, camera, walk)
    (one,) = service.store.inspections(Filter(), limit=10)
    assert one.outcome.error is None


def test_ignored_files(service, camera, photos, tmp_path):
    shutil.copy(photos[0], tmp_path / "secret.png")
    (camera / "link.png").symlink_to(tmp_path / "secret.png")
    (camera / "notes.txt").write_text("x")
    shutil.copy(photos[0], camera / ".hidden.png")
    (camera / "broken.png").write_bytes(b"x")
    shutil.copy(photos[0], camera / "z.png")

    async def walk(watch):
        await until(lambda: len(names(service)) == 2)
        await asyncio.sleep(0.2)

    watching(service, camera, walk)
    assert sorted(names(service)) == ["broken.png", "z.png"]
    assert service.store.count(Filter(unreadable=True)) == 1


def test_a_removed_and_recreated_folder(service, camera, photos):
    async def walk(watch):
        camera.rmdir()
        await until(lambda: watch.problem is not None)
        assert "camera" in watch.problem
        camera.mkdir()
        shutil.copy(photos[0], camera / "a.png")
        await until(lambda: names(service) == ["a.png"])
        assert watch.problem is None

    watching(service, camera, walk)


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


def test_files_are_inspected_oldest_first(service, camera, photos, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILES", 2)
    for number in (3, 1, 4, 2, 0):
        shutil.copy(photos[0], camera / f"{number}.png")
        time.sleep(0.02)

    async def walk(watch):
        await until(lambda: len(names(service)) == 5)

    watching(service, camera, walk)
    assert names(service) == ["3.png", "1.png", "4.png", "2.png", "0.png"]
