import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from normweave import features
from normweave.config import TimmConfig
from normweave.errors import DataError, ImageError
from normweave.features import cache

SETTINGS = {"backbone": "resnet18", "weights": "random", "strides": (4, 8), "batch_images": 2}
ROW_BYTES = 192 * 8 * 8 * 2
GIB = 2**30


@pytest.fixture(scope="module")
def extractor():
    return features.build(TimmConfig(**SETTINGS), height=64, width=64)


@pytest.fixture(scope="module")
def other():
    return features.build(TimmConfig(**SETTINGS | {"neighbourhood": 1}), height=64, width=64)


def image(row):
    return np.random.default_rng(row).integers(0, 256, (3, 64, 64), dtype=np.uint8)


def keys(*rows):
    return [f"key{row}" for row in rows]


def refuse(row):
    raise AssertionError(f"row {row} was computed a second time")


def cached_bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*.f16"))


def test_returns_the_features_of_the_extractor_in_the_given_order(tmp_path, extractor):
    progress = []
    source = cache.cached(
        extractor,
        keys(*range(5)),
        image,
        folder=tmp_path,
        max_gib=1,
        progress=lambda *now: progress.append(now),
    )
    expected = extractor.extract(torch.from_numpy(np.stack([image(row) for row in (4, 0, 4, 2)]))).half().float()

    assert len(source) == 5
    assert source.shape == (192, 8, 8)
    assert source.read([4, 0, 4, 2]).dtype == torch.float32
    assert torch.equal(source.read([4, 0, 4, 2]), expected)
    assert torch.equal(source.read(np.array([4, 0, 4, 2])), expected)
    assert source.read([]).shape == (0, 192, 8, 8)
    assert progress == [("features", 2, 5), ("features", 4, 5), ("features", 5, 5)]


def test_streamed_is_the_same_to_the_bit(tmp_path, extractor):
    stored = cache.cached(extractor, keys(*range(5)), image, folder=tmp_path, max_gib=1)
    anew = cache.streamed(extractor, image, 5)
    assert len(anew) == 5
    assert anew.shape == stored.shape
    assert torch.equal(anew.read([3, 1, 0]), stored.read([3, 1, 0]))
    assert anew.read([]).shape == (0, 192, 8, 8)


def test_nothing_is_computed_twice(tmp_path, extractor):
    first = cache.cached(extractor, keys(0, 1, 2), image, folder=tmp_path, max_gib=1)
    again = cache.cached(extractor, keys(2, 0), refuse, folder=tmp_path, max_gib=1)
    assert torch.equal(again.read([0, 1]), first.read([2, 0]))
    assert cache.contains(tmp_path, extractor.fingerprint, keys(7, 1, 0)) == [False, True, True]

    loaded = []
    rows = (3, 1, 4)
    more = cache.cached(
        extractor, keys(*rows), lambda i: loaded.append(i) or image(rows[i]), folder=tmp_path, max_gib=1
    )
    assert sorted(loaded) == [0, 2]
    assert torch.equal(more.read([1]), first.read([1]))
    assert torch.equal(more.read([0, 2]), cache.streamed(extractor, image, 5).read([3, 4]))


def test_rows_of_one_key_are_stored_once(tmp_path, extractor):
    source = cache.cached(extractor, keys(5, 6, 5, 5), lambda i: image((5, 6, 5, 5)[i]), folder=tmp_path, max_gib=1)
    assert len(source) == 4
    assert torch.equal(source.read([0, 2, 3]), source.read([0, 0, 0]))
    assert cached_bytes(tmp_path) == 2 * ROW_BYTES


def test_rows_that_were_computed_elsewhere_are_read_as_own_ones(tmp_path, extractor):
    own = cache.cached(extractor, keys(1), image, folder=tmp_path, max_gib=1)
    assert cache.missing(extractor, keys(3, 1, 2, 3), folder=tmp_path, max_gib=1) == keys(3, 2)
    (features,) = cache.computed(extractor, image, [3, 2])
    cache.add(tmp_path, extractor.fingerprint, keys(3, 2), features)
    assert cache.missing(extractor, keys(1, 2, 3), folder=tmp_path, max_gib=1) == []
    source = cache.cached(extractor, keys(1, 2, 3), refuse, folder=tmp_path, max_gib=1)
    assert torch.equal(source.read([0]), own.read([0]))
    assert torch.equal(source.read([2, 1]), torch.from_numpy(features).float())


def test_room_is_made_for_rows_that_are_computed_elsewhere(tmp_path, extractor, other):
    cache.cached(other, keys(1, 2), image, folder=tmp_path, max_gib=1)
    cache.cached(extractor, keys(1), image, folder=tmp_path, max_gib=1)
    assert cache.missing(extractor, keys(1, 2), folder=tmp_path, max_gib=2 * ROW_BYTES / GIB) == keys(2)
    assert cached_bytes(tmp_path) == ROW_BYTES  # of the extractor itself
    with pytest.raises(DataError, match=r"The features of 2 more images take"):
        cache.missing(extractor, keys(1, 2, 3), folder=tmp_path, max_gib=2 * ROW_BYTES / GIB)


def test_other_weights_or_settings_never_get_these_rows(tmp_path, extractor, other):
    cache.cached(extractor, keys(0), image, folder=tmp_path, max_gib=1)
    assert cache.contains(tmp_path, other.fingerprint, keys(0)) == [False]
    fresh = cache.cached(other, keys(0), image, folder=tmp_path, max_gib=1)
    assert torch.equal(fresh.read([0]), cache.streamed(other, image, 1).read([0]))


def test_an_unreadable_image_stops_the_run_and_finished_rows_are_kept(tmp_path, extractor):
    def load(row):
        if row == 3:
            raise ImageError("three.png is truncated")
        return image(row)

    with pytest.raises(ImageError, match=r"three.png is truncated"):
        cache.cached(extractor, keys(*range(6)), load, folder=tmp_path, max_gib=1)
    assert cache.contains(tmp_path, extractor.fingerprint, keys(*range(6))) == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]


def test_an_incomplete_row_or_line_is_ignored(tmp_path, extractor):
    whole = cache.cached(extractor, keys(0, 1, 2), image, folder=tmp_path, max_gib=1).read([0, 1, 2])
    (data,) = tmp_path.rglob("*.f16")
    index = data.with_suffix(".keys")

    index.write_bytes(index.read_bytes()[:-1])  # the third line lacks its end
    assert cache.contains(tmp_path, extractor.fingerprint, keys(0, 1, 2)) == [True, True, False]
    os.truncate(data, ROW_BYTES + 10)  # and the second row is incomplete though its line was written

    loaded = []
    again = cache.cached(extractor, keys(0, 1, 2), lambda i: loaded.append(i) or image(i), folder=tmp_path, max_gib=1)
    assert sorted(loaded) == [1, 2]
    assert torch.equal(again.read([0, 1, 2]), whole)


CHILD = """
import json, pathlib, sys, time
import numpy as np
import torch
from normweave import features
from normweave.config import TimmConfig
from normweave.features import cache
torch.set_num_threads(1)
settings, folder, rows, pause = json.loads(sys.argv[1])
settings["strides"] = tuple(settings["strides"])
extractor = features.build(TimmConfig(**settings), height=64, width=64)
def load(row):
    time.sleep(pause)
    return np.random.default_rng(row).integers(0, 256, (3, 64, 64), dtype=np.uint8)
def progress(what, done, total):
    print(done, flush=True)
print("ready", flush=True)
sys.stdin.readline()
keys = [f"key{row}" for row in range(rows)]
cache.cached(extractor, keys, load, folder=pathlib.Path(folder), max_gib=1, progress=progress)
"""


def child(folder, *, rows, pause=0.0, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps([SETTINGS, str(folder), rows, pause])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_finished_rows_survive_a_kill(tmp_path, extractor):
    process = child(tmp_path, rows=40, pause=0.02)
    process.stdin.write("\n")
    process.stdin.flush()
    for _ in range(3):
        done = int(process.stdout.readline())
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # This process has the same fingerprint.
    kept = sum(cache.contains(tmp_path, extractor.fingerprint, keys(*range(40))))
    assert done <= kept < 40

    loaded = []
    resumed = cache.cached(
        extractor, keys(*range(40)), lambda i: loaded.append(i) or image(i), folder=tmp_path, max_gib=1
    )

    assert sorted(loaded) == list(range(kept, 40))
    undisturbed = cache.cached(extractor, keys(*range(40)), image, folder=tmp_path / "undisturbed", max_gib=1)
    assert torch.equal(resumed.read(range(40)), undisturbed.read(range(40)))


def test_two_processes_at_once_do_not_disturb_each_other(tmp_path, extractor):
    both = [child(tmp_path, rows=12, pause=0.01) for _ in range(2)]
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        _, complaint = process.communicate()
        assert process.returncode == 0, complaint
    stored = cache.cached(extractor, keys(*range(12)), refuse, folder=tmp_path, max_gib=1)
    assert torch.equal(stored.read(range(12)), cache.streamed(extractor, image, 12).read(range(12)))


def test_a_full_disk_is_reported_and_finished_rows_are_kept(tmp_path, extractor):
    """A limit on the file size simulates a full disk: the kernel refuses the same write."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * ROW_BYTES, 5 * ROW_BYTES))

    process = child(tmp_path, rows=8, preexec_fn=limit)
    _, complaint = process.communicate("\n")
    assert "DataError: The cache" in complaint
    assert "could not be written after 4 of 8 images (File too large). These are kept." in complaint
    assert "--no-cache" in complaint
    assert sum(cache.contains(tmp_path, extractor.fingerprint, keys(*range(8)))) == 4


def test_the_least_recently_used_segments_of_others_are_removed_first(tmp_path, extractor, other):
    for age, (which, row) in enumerate([(extractor, 0), (other, 1), (other, 2), (extractor, 3)]):
        cache.cached(which, keys(row), lambda _, row=row: image(row), folder=tmp_path, max_gib=1)
        for data in tmp_path.rglob("*.f16"):
            if data.stat().st_mtime > 1000:
                os.utime(data, (age, age))

    def held():
        return cache.contains(tmp_path, other.fingerprint, keys(1, 2)) + cache.contains(
            tmp_path, extractor.fingerprint, keys(0, 3)
        )

    assert held() == [True] * 4
    four = 4 * ROW_BYTES / GIB
    cache.cached(extractor, keys(9), lambda _: image(9), folder=tmp_path, max_gib=four)
    assert held() == [False, True, True, True]
    cache.cached(extractor, keys(0, 10), lambda _: image(10), folder=tmp_path, max_gib=four)
    assert held() == [False, False, True, True]
    cache.cached(extractor, keys(0, 11), lambda _: image(11), folder=tmp_path, max_gib=four)
    assert held() == [False, False, True, False], "row 0 is older, but this call needs it"
    assert cached_bytes(tmp_path) <= 4 * ROW_BYTES


def test_a_source_outlives_the_removal_of_its_files(tmp_path, extractor):
    source = cache.cached(extractor, keys(0), image, folder=tmp_path, max_gib=1)
    before = source.read([0])
    for file in [*tmp_path.rglob("*.f16"), *tmp_path.rglob("*.keys")]:
        file.unlink()
    assert torch.equal(source.read([0]), before)


def test_a_cache_that_is_too_small_is_refused_with_the_size_it_needs(tmp_path, extractor):
    cache.cached(extractor, keys(0), image, folder=tmp_path, max_gib=1)
    with pytest.raises(
        DataError, match=r"features of 99 more images take 0.00227 GiB. .* contains 2.29e-05 GiB that this"
    ) as error:
        cache.cached(extractor, keys(*range(100)), refuse, folder=tmp_path, max_gib=0.001)
    assert (
        "its limit is 0.001 GiB. Raise the limit to 0.003 GiB (`cache_gib` in Python), or use no cache (--no-cache"
        in str(error.value)
    )


def test_a_disk_that_is_too_small_is_refused_before_the_first_image(tmp_path, extractor, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(
        DataError,
        match=r"take 2.29e-05 GiB, and the disk of .* has 9.31e-07 GiB left. Free some, .*--no-cache",
    ):
        cache.cached(extractor, keys(0), refuse, folder=tmp_path, max_gib=1)


def test_features_beyond_float16_are_refused(tmp_path, extractor):
    loud = features.build(TimmConfig(**SETTINGS), height=64, width=64)
    loud.scale *= 1e7
    with pytest.raises(DataError, match=r"features reach .*e\+\d+, but they are stored as float16, at most 65504"):
        cache.streamed(loud, image, 1).read([0])


def test_images_are_loaded_by_two_threads_at_most_16_ahead(extractor):
    running, largest, ahead, lock = set(), 0, [], threading.Lock()
    loaded = passes = 0

    def load(row):
        nonlocal largest, loaded
        with lock:
            running.add(row)
            largest, loaded = max(largest, len(running)), loaded + 1
        time.sleep(0.002)
        with lock:
            running.remove(row)
        return image(row)

    def before_pass(module, inputs):
        nonlocal passes
        passes += 1
        time.sleep(0.05)  # long enough to load all that is allowed
        ahead.append(loaded - passes * SETTINGS["batch_images"])

    hook = extractor.register_forward_pre_hook(before_pass)
    cache.streamed(extractor, load, 40).read(range(40))
    hook.remove()
    assert largest == 2
    assert 0 < max(ahead) <= cache.AHEAD


def test_a_source_that_is_made_when_it_is_read_is_the_same_and_made_once():
    made, features_of = [], torch.arange(12.0).view(3, 4, 1, 1)

    class Source:
        def read(self, rows):
            return features_of[torch.as_tensor(rows)]

    late = cache.WhenRead(lambda: made.append(1) or Source(), shape=(4, 1, 1), count=3)
    assert (len(late), late.shape, made) == (3, (4, 1, 1), [])
    assert torch.equal(late.read([2, 0]), features_of[[2, 0]])
    late.read([1])
    assert made == [1]
