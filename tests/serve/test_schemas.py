"""Models of the REST interface."""

import pytest
from pydantic import ValidationError

from inspections import accept, inspection, unreadable
from normweave.serve.schemas import InspectionDetail, InspectionOut, ReviewIn, outcome_names
from normweave.types import Outcome


def test_an_inspection_has_the_fields_of_its_outcome():
    record = inspection(id=7)
    answer = InspectionOut.of(record).model_dump()
    outcome = record.outcome.as_dict()
    assert {name: answer[name] for name in outcome_names(Outcome)} == {
        name: value for name, value in outcome.items() if name not in ("image_path", "anomaly_map")
    }
    assert (answer["id"], answer["name"], answer["image_hash"]) == (7, record.name, "a" * 64)
    assert answer["map_url"] == "/v1/inspections/7/map"


def test_an_unreadable_image_has_no_urls():
    answer = InspectionOut.of(unreadable(id=7))
    assert (answer.image_url, answer.map_url, answer.overlay_url, answer.image_hash) == (None,) * 4


def test_reviews_of_an_inspection():
    answer = InspectionDetail.with_reviews(inspection(id=7, review=accept()), [accept(), accept(comment="")])
    assert answer.review.decision == "accept"
    assert [review.comment for review in answer.reviews] == ["a shadow", ""]


def test_unknown_fields_of_a_request_are_refused():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        ReviewIn.model_validate({"decision": "accept", "more": 1})
