"""What the bundle holds of its calibration images."""

import json

import numpy as np
import pytest

from normweave import bundle as bundles
from normweave.detector import Detector
from normweave.drift import reference
from normweave.drift.statistics import ImageStatistics, MapStatistics
from normweave.errors import BundleError


def image(number=0, group=None, subclass="a", distance=1.0):
    described = reference.Described(
        ImageStatistics(0.5 + number / 1000, 0.1, 0.2, 0.0, -1.0),
        MapStatistics(2.0, 0.25, 0.75),
        {name: (0.1, 0.0, 0.0, 0.0, float(number)) for name in (*reference.LIGHT, *reference.FOCUS)},
    )
    return reference.CalibrationImage(("cloth", subclass), number if group is None else group, 3.0, distance, described)


def held(images, **changes):
    record = reference.record(images, cross_validated=False) | changes
    return json.loads(json.dumps({reference.KEY: record}))


def test_what_is_read_is_what_was_recorded():
    first, second = reference.read(
        held([image(1, distance=None), image(3, subclass="b"), image(5, subclass="b")]), where="cloth.bundle"
    )
    assert (first.product, second.product) == (("cloth", "a"), ("cloth", "b"))
    np.testing.assert_allclose(first.values[0], [0.501, 0.1, 0.2, 0.0, -1.0, 2.0, 0.25, 0.75, 3.0, np.nan])
    assert sorted(second.values[:, 0]) == [0.503, 0.505]
    assert second.shifts["blurred"].tolist() == [0.1, 0.0, 0.0, 0.0, 4.0]
    assert not first.cross_validated


def test_the_record_stays_small():
    (only,) = reference.read(held([image(number) for number in range(1000)]), where="b")
    assert len(only.values) == reference.MOST_IMAGES
    assert len(json.dumps(reference.record([image(number) for number in range(1000)], cross_validated=False))) < 40_000


def test_groups_count_once():
    (only,) = reference.read(held([image(number, group=number // 10) for number in range(100)]), where="b")
    assert len(only.one_of_each_group(seed=0)) == 10
    assert len(np.unique(np.floor((only.one_of_each_group(seed=1)[:, 0] - 0.5) * 100 + 1e-6))) == 10


@pytest.mark.parametrize(
    "record",
    [
        {},
        {reference.KEY: None},
        held([image()], columns=["brightness"]),
        held([image()], subclasses=[{"category": "a", "subclass": None, "groups": [1], "values": [], "shifts": {}}]),
        held([image()], subclasses=[{"category": "a", "subclass": None, "groups": [], "values": [[1]], "shifts": {}}]),
    ],
)
def test_a_bundle_without_them_names_the_command_that_adds_them(record):
    with pytest.raises(BundleError, match=r"(holds no|are damaged).*normweave calibrate old\.bundle GOOD_IMAGES"):
        reference.read(record, where="old.bundle")


def test_the_bundle_of_a_training_has_them(bundle, photos):
    references = reference.read(bundles.read(bundle), where=bundle)
    loaded = Detector.load(bundle, threads=1, device="cpu")
    assert {each.product for each in references} <= {loaded.subclasses[name] for name in loaded.subclass_names}
    assert sum(len(each.values) for each in references) == loaded.record["calibration_images"]
    for each in references:
        assert each.shifts["darker"][0] < -0.01 < 0.01 < each.shifts["brighter"][0]
        assert each.shifts["blurred"][4] < 0
    outcome = loaded.score(photos[0])
    numbers = reference.numbers_of(outcome.as_dict())
    assert numbers[0] == outcome.brightness
    assert numbers[-2:].tolist() == [outcome.pred_score, outcome.subclass_distance]


def test_calibrate_adds_them_to_an_old_bundle(bundle, cloth, tmp_path):
    record = bundles.read(bundle)
    del record[reference.KEY]
    old = tmp_path / "old.bundle"
    bundles.rewrite(bundle, old, record=record)
    loaded = Detector.load(old, threads=1, device="cpu")
    good = sorted(cloth.parent.glob("cloth/*/test/good/*.png"))
    loaded.calibrate(good, false_alarm_rate=0.2)
    loaded.save(old, overwrite=True)
    read = reference.read(bundles.read(old), where=old)
    assert sum(len(each.values) for each in read) == len(good)


def test_an_outcome_without_statistics_has_no_numbers():
    assert reference.numbers_of({"pred_score": 1.0}) is None
