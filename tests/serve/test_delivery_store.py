"""How far the outputs are, dead letters, and what retention removes too early."""

from dataclasses import replace
from datetime import timedelta

import pytest

from inspections import NOON, inspection
from normweave.serve.delivery_store import Delivery, DeliveryStore
from normweave.serve.part_store import PartStore
from normweave.serve.records import DriftAlarm, PartRecord
from normweave.serve.store import Store

ALARM = DriftAlarm(
    time=NOON,
    line="Press 5",
    bundle_hash="c" * 64,
    cause="focus or dirt",
    subclass="cloth/twill",
    since="12:00",
    since_inspection=5,
    evidence=1e6,
    effect="sharpness -3 standard deviations",
    advice="Clean the lens.",
    inspections=(7, 6),
)


@pytest.fixture
def deliveries(store):
    return DeliveryStore(store.database, line="Press 5")


def add(store, count, *, line="Press 5"):
    return [one.id for one in store.add([inspection(number, line=line) for number in range(count)])]


def test_a_new_output_begins_after_the_newest_inspection_or_with_the_oldest(store, deliveries):
    assert deliveries.begin("first", oldest=False).last_ids == {"inspections": 0}
    ids = add(store, 3) + add(store, 2, line="Press 6")
    assert deliveries.begin("new", oldest=False) == Delivery(name="new", last_ids={"inspections": ids[-1]})
    assert deliveries.begin("old", oldest=True) == Delivery(name="old", last_ids={"inspections": 0})
    assert deliveries.begin("old", oldest=False) == Delivery(
        name="old", last_ids={"inspections": 0}
    )  # it is no new one
    assert DeliveryStore(store.database, line="Press 6").begin("old", oldest=False).last_ids == {"inspections": ids[-1]}


def test_only_inspections_of_the_line_are_delivered_oldest_first(store, deliveries):
    first, _, second = add(store, 1), add(store, 2, line="Press 6"), add(store, 2)
    assert [one.id for one in deliveries.after("inspections", 0, limit=2)] == [first[0], second[0]]
    assert [one.id for one in deliveries.after("inspections", second[0], limit=9)] == second[1:]
    assert [deliveries.behind({"inspections": id}) for id in (0, *second)] == [3, 1, 0]


def test_what_was_saved_is_read_again(store, deliveries):
    one = deliveries.begin("a", oldest=False)
    deliveries.begin("b", oldest=False)
    changed = replace(one, last_ids={"inspections": 7}, attempts=2, last_error="no answer", last_success_at=NOON)
    deliveries.save([changed])
    assert deliveries.begin("a", oldest=False) == changed
    assert deliveries.begin("b", oldest=False) == Delivery(name="b", last_ids={"inspections": 0})


def test_undelivered_inspections_that_retention_removes_are_counted(store, deliveries):
    ids = add(store, 5)
    add(store, 2, line="Press 6")
    deliveries.begin("behind", oldest=True)
    far = deliveries.begin("far", oldest=True)
    far.last_ids = {"inspections": ids[2]}
    deliveries.save([far])
    list(store.expire(before=NOON + timedelta(seconds=4)))  # all but the fifth
    assert (deliveries.removed("behind"), deliveries.removed("far")) == (4, 1)
    deliveries.save([far])
    assert deliveries.removed("far") == 1
    audit = store.audit(event="delivery_lost", limit=9)
    assert [(one.line, one.actor, one.detail) for one in audit] == [
        ("Press 5", "server", {"output": name, "subject": "inspections", "removed": count})
        for name, count in (("far", 1), ("behind", 4))
    ]
    list(store.expire(before=NOON + timedelta(seconds=9)))
    assert (deliveries.removed("behind"), deliveries.removed("far")) == (5, 2)
    assert len(store.audit(event="delivery_lost", limit=9)) == 2  # the first loss only


def test_a_loss_is_acknowledged_with_an_entry_in_the_audit(store, deliveries):
    add(store, 2)
    deliveries.begin("behind", oldest=True)
    list(store.expire(before=NOON + timedelta(days=1)))
    assert deliveries.acknowledge_removed("behind", actor="Ada", token=3) == 2
    assert (deliveries.removed("behind"), deliveries.acknowledge_removed("behind", actor="Ada", token=3)) == (0, 0)
    (entry,) = store.audit(event="delivery_loss_acknowledged", limit=9)
    assert (entry.actor, entry.token, entry.line, entry.detail) == (
        "Ada",
        3,
        "Press 5",
        {"output": "behind", "removed": 2},
    )
    add(store, 1)
    list(store.expire(before=NOON + timedelta(days=1)))
    assert [one.detail["removed"] for one in store.audit(event="delivery_lost", limit=9)] == [1, 2]


def part(number, **changes):
    given = {"part_id": "17", "line": "Press 5", "verdict": "normal", "reasons": (), "images": 1, "expected": 2}
    return PartRecord(**({"at": NOON + timedelta(seconds=number)} | given | changes))


def test_each_subject_has_its_own_place_and_what_is_not_delivered_any_more_is_forgotten(store, deliveries):
    parts = PartStore(Store(store.database, line="Press 5"))
    closed = parts.close(part(1), add(store, 1))
    assert deliveries.add_alarm(ALARM, newest=ALARM.time)
    one = deliveries.begin("a", oldest=True, subjects=("inspections", "parts", "drift"))
    assert one.last_ids == {"inspections": 0, "parts": 0, "drift": 0}
    assert deliveries.behind(one.last_ids) == 3
    (item,) = deliveries.after("parts", 0, limit=9)
    assert (item.record, item.time) == (closed, closed.at)
    one.advance(item)
    deliveries.save([one])
    assert deliveries.begin("a", oldest=True, subjects=("parts",)).last_ids == {"parts": closed.id}
    assert deliveries.begin("a", oldest=False, subjects=("parts", "drift")).last_ids == {"parts": closed.id, "drift": 1}
    (alarm,) = deliveries.after("drift", 0, limit=9)
    assert (deliveries.message(alarm).type, deliveries.message(alarm).data.inspections) == ("drift.alarm", [7, 6])


def test_a_correction_names_its_revision_and_the_verdict_before_it_is_known_to_be_corrected(store, deliveries):
    parts = PartStore(Store(store.database, line="Press 5"))
    first = parts.close(part(1), add(store, 1))

    def messages():
        return [deliveries.message(one) for one in deliveries.after("parts", 0, limit=9)]

    assert [(one.type, one.data.revision, one.data.corrected) for one in messages()] == [("part.closed", 1, False)]
    for number, verdict in ((2, "unknown"), (3, "anomalous")):
        correction = part(number, verdict=verdict, corrects=first.id)
        parts.add_late(first.id, add(store, 1)[0], correction=correction)
    assert [(one.type, one.data.revision, one.data.corrected, one.data.corrects) for one in messages()] == [
        ("part.closed", 1, True, None),
        ("part.corrected", 2, True, first.id),
        ("part.corrected", 3, False, first.id),
    ]
    assert len({one.id for one in messages()}) == 3


def test_undelivered_parts_that_retention_removes_are_counted(store, deliveries):
    parts = PartStore(Store(store.database, line="Press 5"))
    for number in range(3):
        parts.close(part(number), add(store, 1))
    deliveries.begin("behind", oldest=True, subjects=("parts",))
    parts.expire(before=NOON + timedelta(seconds=2))
    assert deliveries.removed("behind") == 2


def test_dead_letters(store, deliveries):
    def letter(id, type="inspection.stored"):
        return {"type": type, "data": {"id": id}}

    for number in (1, 2):
        deliveries.add_dead_letter("a", reason="410", message=letter(number))
    deliveries.add_dead_letter("b", reason="404", message=letter(3, "part.closed"))
    assert deliveries.dead_letters("b", limit=9)[0].inspection is None
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
