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


@pytest.mark.parametrize(
    "key", ["subclasses", "subclass_names", "config", "calibration", "fit_hashes", "calibration_hashes"]
)
def test_a_record_that_lacks_something_is_refused(bundle, key):
    record = bundles.read(bundle)
    del record[key]
    with pytest.raises(BundleError, match=f"lacks or misplaces '{key}'"):
        parse_record(record, where=bundle)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"fit_hashes": None}, "cannot be used: fit_hashes must be a list of texts, got None"),
        ({"calibration_hashes": [3]}, r"cannot be used: calibration_hashes must be a list of texts, got \[3\]"),
        ({"history": "x"}, "a step of the history must have an action, got 'x'"),
        ({"history": [{}]}, "a step of the history must have an action, got {}"),
        ({"map_threshold": "a"}, "cannot be used: could not convert string to float: 'a'"),
    ],
)
def test_a_record_that_was_edited_is_refused_in_words(bundle, changed, words):
    """And not by a command that needs the value much later."""
    with pytest.raises(BundleError, match=words):
        parse_record(bundles.read(bundle) | changed, where=bundle)
