"""How far the outputs are, dead letters, and what retention removes too early."""

from dataclasses import replace
from datetime import timedelta

import pytest

from inspections import NOON, inspection
from normweave.serve.delivery_store import Delivery, DeliveryStore


@pytest.fixture
def deliveries(store):
    return DeliveryStore(store.database, line="Press 5")


def add(store, count, *, line="Press 5"):
    return [one.id for one in store.add([inspection(number, line=line) for number in range(count)])]


def test_a_new_output_begins_after_the_newest_inspection_or_with_the_oldest(store, deliveries):
    assert deliveries.begin("first", oldest=False).last_id == 0
    ids = add(store, 3) + add(store, 2, line="Press 6")
    assert deliveries.begin("new", oldest=False) == Delivery(name="new", last_id=ids[-1])
    assert deliveries.begin("old", oldest=True) == Delivery(name="old", last_id=0)
    assert deliveries.begin("old", oldest=False) == Delivery(name="old", last_id=0)  # it is no new one
    assert DeliveryStore(store.database, line="Press 6").begin("old", oldest=False).last_id == ids[-1]


def test_only_inspections_of_the_line_are_delivered_oldest_first(store, deliveries):
    first, _, second = add(store, 1), add(store, 2, line="Press 6"), add(store, 2)
    assert [one.id for one in deliveries.after(0, limit=2)] == [first[0], second[0]]
    assert [one.id for one in deliveries.after(second[0], limit=9)] == second[1:]
    assert (deliveries.behind(0), deliveries.behind(second[0]), deliveries.behind(second[1])) == (3, 1, 0)


def test_what_was_saved_is_read_again(store, deliveries):
    one = deliveries.begin("a", oldest=False)
    deliveries.begin("b", oldest=False)
    changed = replace(one, last_id=7, attempts=2, last_error="no answer", last_success_at=NOON)
    deliveries.save([changed])
    assert deliveries.begin("a", oldest=False) == changed
    assert deliveries.begin("b", oldest=False) == Delivery(name="b", last_id=0)


def test_undelivered_inspections_that_retention_removes_are_counted(store, deliveries):
    ids = add(store, 5)
    add(store, 2, line="Press 6")
    deliveries.begin("behind", oldest=True)
    far = deliveries.begin("far", oldest=True)
    far.last_id = ids[2]
    deliveries.save([far])
    list(store.expire(before=NOON + timedelta(seconds=4)))  # all but the fifth
    assert (deliveries.removed("behind"), deliveries.removed("far")) == (4, 1)
    deliveries.save([far])
    assert deliveries.removed("far") == 1
    assert deliveries.begin("far", oldest=False).removed == 1


def test_dead_letters(store, deliveries):
    for number in (1, 2):
        deliveries.add_dead_letter("a", inspection=number, reason="410", message={})
    deliveries.add_dead_letter("b", inspection=3, reason="404", message={})
    assert [one.inspection for one in deliveries.dead_letters("a", limit=9)] == [1, 2]
    assert deliveries.dead_letters("a", limit=9, again=True) == []
    assert deliveries.mark_again("a") == 2
    first, second = deliveries.dead_letters("a", limit=9, again=True)
    deliveries.remove_dead_letter(first.id)
    deliveries.keep_dead_letter(second.id, reason="still 410")
    (kept,) = deliveries.dead_letters("a", limit=9, again=False)
    assert (kept.inspection, kept.reason) == (2, "still 410")
    assert (deliveries.count_dead_letters("a"), deliveries.count_dead_letters("b")) == (1, 1)
    assert DeliveryStore(store.database, line="Press 6").count_dead_letters("a") == 0
