"""The record of a bundle becomes the parts of a detector, and a damaged one is refused."""

import pytest

from normweave import bundle as bundles
from normweave.errors import BundleError
from normweave.record import parse_record


def test_a_record_becomes_the_parts_of_its_detector(detector, bundle):
    parts = parse_record(bundles.read(bundle), where=bundle)
    assert parts["config"] == detector.config
    assert parts["subclasses"] == detector.subclasses
    assert parts["subclass_names"] == detector.subclass_names
    assert parts["record"]["fit_images"] == detector.record["fit_images"]
    assert parts["operating_points"].as_dict() == detector.operating_points.as_dict()


def test_a_record_from_before_the_regions_has_none(bundle):
    record = bundles.read(bundle)
    assert record["config"].pop("regions") == []
    assert parse_record(record, where=bundle)["config"].regions == ()


@pytest.mark.parametrize("key", ["subclasses", "subclass_names", "config", "calibration"])
def test_a_record_that_lacks_something_is_refused(bundle, key):
    record = bundles.read(bundle)
    del record[key]
    with pytest.raises(BundleError, match=f"lacks or misplaces '{key}'"):
        parse_record(record, where=bundle)
