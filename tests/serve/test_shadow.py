"""The queue and the budget of the candidate; a candidate that needs no process stands in for it."""

import threading
import time
from dataclasses import replace

import pytest

from bundles import ADA, wait_for
from inspections import inspect_files, inspection
from normweave.serve import shadow as shadow_module
from normweave.serve.candidate import CandidateError, Judgement, judge
from normweave.serve.database import StoreError
from normweave.serve.model_store import Comparison, ModelStore
from normweave.serve.shadow import Shadow, shadow_outcome


class Stand:
    """Answers like `CandidateProcess`, when `go` is set."""

    seconds = 0.001
    failure = None

    def __init__(self, path, *, device):
        self.go, self.times, self.detector = threading.Event(), [], Stand.loaded
        Stand.made = self

    def wait_ready(self):
        if self.failure is not None:
            raise self.failure

    def judge(self, content):
        assert self.go.wait(30)
        self.times.append(time.monotonic())
        header, grids = judge(self.detector, content)
        return Judgement(**header | {"seconds": self.seconds}, grids=grids)

    def kill(self):
        self.go.set()

    def close(self):
        pass


@pytest.fixture
def begin(service, loaded, monkeypatch, tmp_path):
    """Start a shadow with a stand-in for its process."""
    monkeypatch.setattr(shadow_module, "CandidateProcess", Stand)
    Stand.loaded = loaded
    records, begun = ModelStore(service.store), []

    def begin(*, waiting=100, share=1.0):
        run = records.start_shadow("f" * 64, active_hash=loaded.bundle_hash, actor=ADA)
        given = {"files": service.files, "metrics": service.metrics, "device": "cpu", "share": share}
        reasons = []
        begun.append(Shadow(run, tmp_path, store=records, waiting=waiting, failed=reasons.append, **given))
        begun[-1].reasons = reasons
        return begun[-1]

    yield begin
    for shadow in begun:
        shadow.stop()


def both(service, loaded):
    comparison = Comparison(active=loaded.bundle_hash, candidate="f" * 64)
    return sum(one.n for one in ModelStore(service.store).pairs(comparison))


def test_what_does_not_fit_into_the_queue_is_skipped_and_counted_at_once(begin, service, photos, loaded):
    shadow = begin(waiting=3)
    stored = inspect_files(service, *photos[:10])
    start = time.monotonic()
    shadow.offer([*stored, inspection(id=99, image=None)])  # the last has no image to judge
    assert time.monotonic() - start < 1
    Stand.made.go.set()
    wait_for(lambda: both(service, loaded) >= 3)
    wait_for(lambda: shadow.waiting == 0)
    shadow.stop()
    skipped = ModelStore(service.store).last_shadow().skipped
    assert skipped in (6, 7)  # one may have left the queue before the others came
    assert both(service, loaded) + skipped == 10
    assert f'normweave_shadow_images_total{{result="skipped"}} {skipped}.0' in service.metrics.text().decode()


def test_it_keeps_its_share_of_a_processor(begin, service, photos, monkeypatch):
    monkeypatch.setattr(Stand, "seconds", 0.1)
    shadow = begin(share=0.5)
    shadow.offer(inspect_files(service, *photos[:3]))
    Stand.made.go.set()
    wait_for(lambda: len(Stand.made.times) == 3)
    first, second, third = Stand.made.times
    assert min(second - first, third - second) >= 0.18


def test_a_failure_is_reported_once_and_ends_the_thread(begin, service, photos, monkeypatch):
    monkeypatch.setattr(Stand, "failure", CandidateError("No operator of this name."))
    shadow = begin()
    wait_for(lambda: shadow.reasons)
    shadow.offer(inspect_files(service, photos[0]))
    shadow.stop()
    assert shadow.reasons == ["No operator of this name."]
    assert (shadow.running, shadow.waiting) == (False, 0)


def test_a_stop_skips_what_waits_and_is_no_failure(begin, service, photos):
    shadow = begin()
    shadow.offer(inspect_files(service, *photos[:4]))
    shadow.stop()
    assert shadow.reasons == []
    wait_for(lambda: ModelStore(service.store).last_shadow().skipped >= 3)


def test_images_that_retention_removed_are_skipped(begin, service, photos, loaded):
    shadow = begin()
    gone, kept = inspect_files(service, *photos[:2])
    lost = replace(gone, image=replace(gone.image, image_hash="0" * 64))
    shadow.offer([lost, kept])
    Stand.made.go.set()
    wait_for(lambda: both(service, loaded) == 1)
    assert ModelStore(service.store).last_shadow().skipped == 1


def test_a_database_that_fails_for_a_time_ends_nothing(begin, service, photos, loaded, monkeypatch):
    shadow = begin()
    monkeypatch.setattr(shadow_module, "FLUSH_SECONDS", 0.05)
    with monkeypatch.context() as patch:

        def broken(*_, **__):
            failed.set()
            raise StoreError("The database failed.")

        failed = threading.Event()
        patch.setattr(ModelStore, "add_outcomes", broken)
        shadow.offer(inspect_files(service, photos[0]))
        Stand.made.go.set()
        assert failed.wait(30)
    shadow.offer(inspect_files(service, photos[1]))
    wait_for(lambda: both(service, loaded) == 1)
    assert (shadow.running, shadow.reasons) == (True, [])
    assert ModelStore(service.store).last_shadow().skipped == 1


def test_the_map_is_kept_only_if_the_verdicts_differ(loaded, photos):
    with open(photos[0], "rb") as file:
        header, grids = judge(loaded, file.read())
    judgement = Judgement(**header, grids=grids)
    verdict = header["outcome"]["verdict"]
    same = shadow_outcome(inspection(id=5, verdict=verdict), judgement, bundle_hash="f" * 64)
    other = shadow_outcome(inspection(id=5, verdict="unknown"), judgement, bundle_hash="f" * 64)
    assert (same.inspection, same.outcome.bundle_hash, same.grids, same.tiles) == (5, "f" * 64, None, ())
    assert other.grids == grids
    assert (other.smoothing, other.map_threshold) == (loaded.smoothing, header["map_threshold"])
