"""Tests are shared, and a caller waits for one that hangs for a limited time only."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from normweave.serve import write_probe
from normweave.serve.database import StoreError
from normweave.serve.write_probe import WriteProbe


@pytest.fixture
def probe(monkeypatch):
    """A function that makes a probe whose results are used again for so long."""
    made = []

    def make(test, *, seconds=60.0):
        monkeypatch.setattr(write_probe, "PROBE_SECONDS", seconds)
        made.append(WriteProbe(test))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_result_is_shared_and_used_again(probe):
    tested = []
    one = probe(lambda: (time.sleep(0.2), tested.append(1)))
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(lambda _: one.check(), range(8)))
    one.check()
    assert len(tested) == 1
    old = probe(lambda: tested.append(2), seconds=0.0)
    old.check()
    old.check()
    assert tested == [1, 2, 2]


def test_a_failure_is_raised_until_a_test_passes(probe):
    failures = [StoreError("full"), StoreError("full")]

    def test():
        if failures:
            raise failures.pop()

    one = probe(test, seconds=0.0)
    for _ in range(2):
        with pytest.raises(StoreError, match="full"):
            one.check()
    one.check()


def test_a_test_that_hangs_is_a_failure_soon_and_no_second_one_begins(probe, monkeypatch):
    monkeypatch.setattr(write_probe, "WAIT_SECONDS", 0.1)
    free, begun = threading.Event(), []
    one = probe(lambda: (begun.append(1), free.wait(30)), seconds=60.0)
    for _ in range(3):
        with pytest.raises(StoreError, match=r"whether images can be stored has not ended within 0\.1 s"):
            one.check()
    assert len(begun) == 1
    monkeypatch.setattr(write_probe, "WAIT_SECONDS", 30.0)
    free.set()
    one.check()
