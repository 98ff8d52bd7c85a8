"""Verdicts as numbers: an old result is never good."""

from datetime import UTC, datetime, timedelta

import pytest

from inspections import inspection, unreadable
from normweave.serve.message import InspectionMessage, PartMessage
from normweave.serve.records import PartRecord
from normweave.serve.verdict_codes import (
    DEFECTIVE,
    GOOD,
    INCOMPLETE,
    NO_RESULT,
    STALE,
    UNKNOWN,
    UNREADABLE,
    verdict_code,
)


def code(verdict, *, age):
    at = datetime.now(UTC) - timedelta(seconds=age)
    return verdict_code(InspectionMessage.of(inspection(id=1, verdict=verdict, received_at=at)), max_age=10)


@pytest.mark.parametrize(
    ("verdict", "young", "old"),
    [("normal", GOOD, STALE), ("anomalous", DEFECTIVE, DEFECTIVE), ("unknown", UNKNOWN, UNKNOWN)],
)
def test_an_old_result_is_never_good(verdict, young, old):
    assert (code(verdict, age=9), code(verdict, age=11)) == (young, old)


@pytest.mark.parametrize(
    ("verdict", "changes", "expected"),
    [
        ("normal", {}, GOOD),
        ("normal", {"age": 11}, STALE),
        ("normal", {"corrected": True}, STALE),
        ("normal", {"expected": None}, INCOMPLETE),
        ("incomplete", {}, INCOMPLETE),
        ("unknown", {"corrected": True}, UNKNOWN),
        ("anomalous", {"expected": None}, DEFECTIVE),
    ],
)
def test_a_part_is_good_only_if_it_is_known_to_be_complete(verdict, changes, expected):
    age, corrected = changes.get("age", 0), changes.get("corrected", False)
    record = PartRecord(
        id=1,
        at=datetime.now(UTC) - timedelta(seconds=age),
        part_id="17",
        line="",
        verdict=verdict,
        reasons=(),
        images=2,
        expected=changes.get("expected", 2),
    )
    assert verdict_code(PartMessage.of(record, revision=1, corrected=corrected), max_age=10) == expected


def test_an_unreadable_image_has_a_number_of_its_own():
    assert verdict_code(InspectionMessage.of(unreadable(id=1)), max_age=1e9) == UNREADABLE
    assert NO_RESULT == 0  # of empty registers
