"""What is stored of parts, in both databases."""

from datetime import timedelta

import pytest

from inspections import NOON, accept, inspection
from normweave.outcome.parts import PartRule, PartView
from normweave.serve.part_store import Marks, PartStore, TakenError
from normweave.serve.records import PartRecord
from normweave.types import PartReason


def record(**changes):
    given = {"part_id": "17", "line": "", "verdict": "normal", "reasons": (), "images": 1, "expected": None}
    return PartRecord(**({"at": NOON} | given | changes))


@pytest.fixture
def parts(store):
    return PartStore(store)


def add(store, *views, part="17"):
    return [one.id for one in store.add([inspection(part_id=part, view=view, verdict="normal") for view in views])]


def test_open_views_are_those_that_count_in_no_part(store, parts):
    store.add([inspection()])
    first, second = add(store, "a", None)
    content = store.inspection(second).image.image_hash[:8]
    assert [one.image for one in parts.open_views(after=0, limit=9)] == [
        PartView("a", "normal", first),
        PartView(f"image {content}", "normal", second),
    ]
    assert [one.image.inspection for one in parts.open_views(after=first, limit=9)] == [second]
    closed = parts.close(record(), [first])
    assert [one.image.inspection for one in parts.open_views(after=0, limit=9)] == [second]
    parts.add_late(closed.id, second, correction=None)
    assert parts.open_views(after=0, limit=9) == []
    assert [one.view for one in parts.views(closed.id, limit=9)] == ["a", f"image {content}"]
    assert [one.id for one in parts.inspections(closed.id, limit=1)] == [first]


def test_the_same_content_without_a_name_is_one_view(store, parts):
    """A client that sends an image again must not complete a part whose other side was never seen."""
    add(store, None, None)
    one, two = (one.image.view for one in parts.open_views(after=0, limit=9))
    assert one == two
    assert PartRule(views=2).is_complete([PartView(one, "normal", 1), PartView(two, "normal", 2)]) is False


def test_a_record_comes_back_as_it_was_stored(store, parts):
    reasons = (PartReason("anomalous", "a", 1), PartReason("missing", None, None))
    for expected in (None, 4, ("front", "back")):
        given = record(verdict="anomalous", reasons=reasons, expected=expected, corrects=7)
        stored = parts.close(given, add(store, "a"))
        assert parts.record(stored.id) == stored
        assert (stored.expected, stored.reasons, stored.root) == (expected, reasons, 7)
    assert parts.record(99) is None


def test_an_image_counts_in_one_part(store, parts):
    ids = add(store, "a", "b")
    assert parts.close(record(), ids) is not None
    with pytest.raises(TakenError, match="--name"):
        parts.close(record(), ids)
    assert len(parts.records(limit=9)) == 1


def test_a_part_whose_images_retention_has_removed_is_not_stored(store, parts):
    ids = add(store, "a")
    list(store.expire(before=NOON + timedelta(days=1)))
    assert parts.close(record(), ids) is None
    assert parts.records(limit=9) == []


def test_the_last_verdict_counts_and_its_age_is_that_of_the_closing(store, parts):
    closed = parts.close(record(), add(store, "a"))
    assert parts.last("17", since=NOON) == closed
    worse = record(verdict="anomalous", at=NOON + timedelta(hours=2), corrects=closed.id)
    correction = parts.add_late(closed.id, add(store, "b")[0], correction=worse)
    assert parts.last("17", since=NOON) == correction
    assert parts.last("17", since=NOON + timedelta(hours=1)) is None
    assert parts.last("18", since=NOON) is None
    assert parts.of(closed.id) == [closed, correction]


def test_marks_are_the_last_correction_and_the_decisions_that_count(store, parts):
    first, second = parts.close(record(), add(store, "a")), parts.close(record(part_id="18"), add(store, "a"))
    late = add(store, "b", "c")
    for id in late:
        worse = record(verdict="anomalous", corrects=first.id)
        correction = parts.add_late(first.id, id, correction=worse)
    store.review(late[0], accept(decision="reject"))
    store.review(late[1], accept())
    store.review(late[1], accept(decision="undo"))
    assert parts.marks({first.id, second.id}) == {first.id: Marks(correction.id, ("reject",)), second.id: Marks()}
    assert parts.marks(()) == {}


def test_pages_of_records(store, parts):
    made = [
        parts.close(record(part_id=str(n), verdict=("normal", "incomplete")[n % 2]), add(store, "a")) for n in range(4)
    ]
    ids = [one.id for one in made]
    assert [one.id for one in parts.records(limit=2)] == ids[:1:-1]
    assert [one.id for one in parts.records(after=ids[0], limit=2)] == ids[1:3]
    assert [one.id for one in parts.records(before=ids[1], limit=9)] == ids[:1]
    assert [one.id for one in parts.records(verdicts=["incomplete"], limit=9)] == [ids[3], ids[1]]
    assert [one.id for one in parts.records(part_id="2", line="", limit=9)] == [ids[2]]
    assert parts.records(line="Press 5", limit=9) == []


def test_old_records_are_removed(store, parts):
    parts.close(record(), add(store, "a"))
    kept = parts.close(record(at=NOON + timedelta(days=2)), add(store, "b"))
    parts.expire(before=NOON + timedelta(days=1))
    assert parts.records(limit=9) == [kept]
