"""Verdicts as numbers: an old result is never good."""

from datetime import UTC, datetime, timedelta

import pytest

from inspections import inspection, unreadable
from normweave.serve.message import Message
from normweave.serve.verdict_codes import DEFECTIVE, GOOD, NO_RESULT, STALE, UNKNOWN, UNREADABLE, verdict_code


def code(verdict, *, age):
    at = datetime.now(UTC) - timedelta(seconds=age)
    return verdict_code(Message.of(inspection(id=1, verdict=verdict, received_at=at)), max_age=10)


@pytest.mark.parametrize(
    ("verdict", "young", "old"),
    [("normal", GOOD, STALE), ("anomalous", DEFECTIVE, DEFECTIVE), ("unknown", UNKNOWN, UNKNOWN)],
)
def test_an_old_result_is_never_good(verdict, young, old):
    assert (code(verdict, age=9), code(verdict, age=11)) == (young, old)


def test_an_unreadable_image_has_a_number_of_its_own():
    assert verdict_code(Message.of(unreadable(id=1)), max_age=1e9) == UNREADABLE
    assert NO_RESULT == 0  # of empty registers
