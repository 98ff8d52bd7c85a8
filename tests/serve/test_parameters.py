"""Parameters that several routes have."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from inspections import inspection, unreadable
from normweave.serve.parameters import stored_image, utc
from normweave.serve.problems import ProblemError


def test_a_time_without_a_zone_is_in_utc():
    there = datetime(2026, 3, 5, 12, tzinfo=timezone(timedelta(hours=2)))
    assert (utc(None), utc(there)) == (None, there)
    assert utc(datetime(2026, 3, 5, 12)) == datetime(2026, 3, 5, 12, tzinfo=UTC)


def test_an_image_that_is_not_stored_has_a_reason():
    one = inspection()
    assert stored_image(one) == one.image
    for missing, status, code in (
        (unreadable(), 404, "image_unreadable"),
        (replace(one, image=None), 410, "image_gone"),
    ):
        with pytest.raises(ProblemError) as raised:
            stored_image(missing)
        assert (raised.value.status_code, raised.value.code) == (status, code)
