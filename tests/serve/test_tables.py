"""Conversion between rows and records."""

from dataclasses import replace
from datetime import UTC, timedelta, timezone

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inspections import inspection, unreadable
from normweave.serve.records import Filter, Review
from normweave.types import DefectBox, Tile


def test_an_inspection_is_read_as_it_was_added(store):
    given_ = [inspection(), unreadable(), inspection(routed=None, subclass=None, experts=(), boxes=())]
    kept = store.add(given_)
    assert [replace(one, id=0) for one in kept] == given_
    assert [store.inspection(one.id) for one in kept] == kept
    assert type(kept[0].image.tiles[0]) is Tile
    assert type(kept[0].outcome.boxes[0]) is DefectBox


ODD = st.text(st.characters(codec=None), max_size=300) | st.sampled_from(
    [
        "\0",
        "\ud800",
        "\udcff.png",
        "../../etc/passwd",
        "x" * 10_000,
        "'; DROP TABLE inspections; --",
        "%s :name {}",
    ]
)


ZONES = st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-9))])


NUMBERS = st.floats(allow_nan=False)


def stored_text(text, length=255):
    """Return the text that the store keeps."""
    refused = {"\0", *map(chr, range(0xD800, 0xE000))}
    return "".join("\N{REPLACEMENT CHARACTER}" if one in refused else one for one in text[:length])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(name=ODD, reviewer=ODD, moment=st.datetimes(timezones=ZONES), score=NUMBERS, peak=NUMBERS)
def test_unusual_text_times_and_numbers(store, name, reviewer, moment, score, peak):
    box = DefectBox(0, 0, 1, 1, peak)
    made = inspection(name=name, received_at=moment, pred_score=score, boxes=(box,), error=name)
    (kept,) = store.add([made])
    assert kept.name == stored_text(name, 500)
    assert kept.outcome.error == stored_text(name, 4000)
    assert (kept.received_at, kept.received_at.tzinfo) == (moment, UTC)
    assert (kept.outcome.pred_score, kept.outcome.boxes) == (score, (box,))
    assert kept in store.inspections(Filter(name=name), limit=1000)
    review = Review(at=moment, decision="accept", reviewer=reviewer, comment=name)
    as_kept = replace(review, reviewer=stored_text(reviewer), comment=stored_text(name, 4000))
    assert store.review(kept.id, review).review == as_kept
    assert store.reviews(kept.id) == [as_kept]
