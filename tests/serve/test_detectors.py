"""Views of parts with bundles of their own: which bundle inspects an image, and its rate, candidate and record."""

import asyncio
from pathlib import Path

import pytest

from bundles import wait_for
from normweave.errors import ConfigError
from normweave.serve.config import ServeConfig
from normweave.serve.library import Library
from normweave.serve.models import Models, choose_active
from normweave.serve.records import Filter, RateChange
from normweave.serve.service import InspectionService, Upload

from .conftest import load


@pytest.fixture(scope="module")
def both(library_folder):
    """The detectors of two bundles with other scores."""
    return load(library_folder / "old"), load(library_folder / "new")


@pytest.fixture
def line(both, start, library_folder):
    """A service whose view `back` has the bundle `new`."""
    first = start(shadow_share=1.0)
    choose_active(Library(library_folder), first.store, name="old")
    service = InspectionService(
        both[0], store=first.store, files=first.files, config=first.config, views={"back": both[1]}
    )
    yield service
    service.stop()


def inspect(service, photo, *views, part="17"):
    uploads = [Upload(f"{view}.png", Path(photo).read_bytes(), part, view) for view in views]
    return asyncio.run(service.inspect(uploads, source="api", actor="test"))


def test_the_bundle_of_the_view_inspects_and_is_stored(line, both, photos):
    old, new = both
    front, back = inspect(line, photos[0], "front", "back")
    (no_part,) = inspect(line, photos[0], None, part=None)
    with pytest.raises(ConfigError, match=r"'back.png' has the view 'back', but no part\. Give the id of its part too"):
        inspect(line, photos[0], "back", part=None)
    ((expected_old,), (expected_new,)) = (one.score([photos[0]]) for one in both)
    assert old.smoothing != new.smoothing
    judged = ((front, old, expected_old), (back, new, expected_new), (no_part, old, expected_old))
    for one, detector, expected in judged:
        stored = line.store.inspection(one.id)
        assert stored.outcome.bundle_hash == detector.bundle_hash
        assert stored.outcome.pred_score == pytest.approx(expected.pred_score, rel=1e-5)
        assert stored.image.smoothing == detector.smoothing
        assert line.references(stored) == detector.network.references
    assert line.store.count(Filter(bundle_hash=new.bundle_hash)) == 1
    entry = line.store.audit(event="bundle_loaded", limit=1)[0]
    assert (entry.detail["bundle_hash"], entry.detail["views"]) == (old.bundle_hash, {"back": new.bundle_hash})


def test_candidates_and_promotions_concern_the_active_bundle_alone(line, both, library, photos):
    offered = []
    line.models = Models(library, service=line, load=load, device="cpu")
    line.models.offer = offered.extend
    inspect(line, photos[0], "front", "back")
    wait_for(lambda: offered)  # the images of a request are offered at once
    assert [one.outcome.view for one in offered] == ["front"]
    line.detectors.swap(both[1])  # as a promotion of the bundle that the view has
    line.detectors.change_rate(0.3, actor="Ada", token=None)
    assert {one.calibration.false_alarm_rate for one in (line.detector, line.detectors.views["back"])} == {0.3}
    offered.clear()
    for one in inspect(line, photos[0], "front", "back"):
        assert (one.outcome.bundle_hash, one.outcome.false_alarm_rate) == (both[1].bundle_hash, 0.3)
    wait_for(lambda: len(offered) == 2)


def test_the_last_rate_of_a_bundle_is_that_of_its_view(line, both):
    new = both[1].bundle_hash
    change = RateChange(at=line.store.audit(limit=1)[0].at, bundle_hash=new, false_alarm_rate=0.25, actor="Ada")
    line.store.add_rate(change)  # of a line on which it is active
    line.detectors.follow_rates()
    assert line.detectors.views["back"].calibration.false_alarm_rate == 0.25
    assert line.detector.calibration.false_alarm_rate == both[0].calibration.false_alarm_rate
    again = InspectionService(
        both[0], store=line.store, files=line.files, config=ServeConfig(), views={"back": both[1]}
    )
    again.stop()
    assert again.detectors.views["back"].calibration.false_alarm_rate == 0.25
