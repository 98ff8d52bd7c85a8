"""A folder that a camera writes to."""

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


def follow(service, folder, walk):
    """Run `walk` while the folder is followed."""

    async def run():
        watch = Watch(folder, service=service)
        watch.start()
        try:
            await walk(watch)
        finally:
            watch.stop()

    asyncio.run(run())


def test_what_is_there_and_what_comes_is_inspected_once(service, camera, photos):
    shutil.copy(photos[0], camera / "a.png")

    async def walk(watch):
        assert watch.running
        await until(lambda: names(service) == ["a.png"])
        (camera / "lot 7").mkdir()
        shutil.copy(photos[1], camera / "lot 7" / "b.png")
        await until(lambda: names(service) == ["a.png", "lot 7/b.png"])
        await asyncio.sleep(0.3)

    follow(service, camera, walk)
    follow(service, camera, lambda watch: asyncio.sleep(0.5))  # after a restart neither comes again
    assert names(service) == ["a.png", "lot 7/b.png"]


def test_a_file_of_the_same_name_that_changed_comes_again(service, camera, photos):
    async def walk(watch):
        shutil.copy(photos[0], camera / "last.png")
        await until(lambda: len(names(service)) == 1)
        shutil.copy(photos[1], camera / "last.png")
        await until(lambda: len(names(service)) == 2)

    follow(service, camera, walk)


def test_a_file_is_not_read_while_it_grows(service, camera, photos):
    content = Path(photos[0]).read_bytes()

    async def walk(watch):
        with open(camera / "slow.png", "wb") as file:
            for start in range(0, len(content), 1 + len(content) // 6):
                file.write(content[start : start + 1 + len(content) // 6])
                file.flush()
                await asyncio.sleep(0.1)
        await until(lambda: names(service) == ["slow.png"])

    follow(service, camera, walk)
    (one,) = service.store.inspections(Filter(), limit=10)
    assert one.outcome.error is None


def test_what_is_not_taken(service, camera, photos, tmp_path):
    shutil.copy(photos[0], tmp_path / "secret.png")
    (camera / "link.png").symlink_to(tmp_path / "secret.png")
    (camera / "notes.txt").write_text("x")
    shutil.copy(photos[0], camera / ".hidden.png")
    (camera / "broken.png").write_bytes(b"x")
    shutil.copy(photos[0], camera / "z.png")

    async def walk(watch):
        await until(lambda: len(names(service)) == 2)
        await asyncio.sleep(0.2)

    follow(service, camera, walk)
    assert sorted(names(service)) == ["broken.png", "z.png"]
    assert service.store.count(Filter(unreadable=True)) == 1


def test_a_folder_that_goes_away_and_comes_back(service, camera, photos):
    async def walk(watch):
        camera.rmdir()
        await until(lambda: watch.problem is not None)
        assert "camera" in watch.problem
        camera.mkdir()
        shutil.copy(photos[0], camera / "a.png")
        await until(lambda: names(service) == ["a.png"])
        assert watch.problem is None

    follow(service, camera, walk)


def test_a_full_queue_is_waited_for(start, camera, photos):
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

    follow(service, camera, walk)
    assert sorted(names(service)) == [f"{number}.png" for number in range(5)]


def test_many_files_are_taken_the_oldest_first_some_at_a_time(service, camera, photos, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILES", 2)
    for number in (3, 1, 4, 2, 0):
        shutil.copy(photos[0], camera / f"{number}.png")
        time.sleep(0.02)

    async def walk(watch):
        await until(lambda: len(names(service)) == 5)

    follow(service, camera, walk)
    assert names(service) == ["3.png", "1.png", "4.png", "2.png", "0.png"]
