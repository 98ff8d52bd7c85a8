"""What is stored of the models of a line, in both databases."""

from dataclasses import replace
from datetime import timedelta

from bundles import ADA
from inspections import NOON, accept, inspection
from normweave.serve.model_store import Comparison, ModelStore, ShadowOutcome
from normweave.serve.store import Store
from normweave.types import DefectBox, Tile

A, B, C = "a" * 64, "b" * 64, "c" * 64


def active(records):
    return records.active().bundle_hash


def test_promotions_are_rolled_back_one_by_one(store):
    records = ModelStore(store)
    assert records.active() is None
    records.choose(A)
    for promoted in (B, C):
        records.start_shadow(promoted, active_hash=active(records), actor=ADA)
        records.promote(promoted, ADA)
        assert active(records) == promoted
        assert records.shadow() is None
    for earlier in (B, A):
        records.roll_back(records.before(records.active()), ADA)
        assert active(records) == earlier
    assert records.before(records.active()) is None


def test_lines_of_one_database_do_not_see_each_other(store):
    one, other = (ModelStore(Store(store.database, line=line)) for line in ("Press 4", "Press 5"))
    one.choose(A)
    other.choose(B)
    one.start_shadow(C, active_hash=A, actor=ADA)
    assert (active(one), active(other)) == (A, B)
    assert other.last_shadow() is None
    other.stop_shadow(ADA)
    assert one.shadow().bundle_hash == C


def test_one_candidate_at_a_time_and_its_end_has_a_reason(store):
    records = ModelStore(store)
    first = records.start_shadow(B, active_hash=A, actor=ADA)
    second = records.start_shadow(C, active_hash=A, actor=ADA)
    assert records.shadow() == second
    records.fail_shadow(first.id, "It has ended already.")
    assert records.shadow() == second
    records.fail_shadow(second.id, "No memory.")
    assert records.shadow() is None
    last = records.last_shadow()
    assert (last.bundle_hash, last.failure, last.actor) == (C, "No memory.", "Ada")
    records.stop_shadow(ADA)
    events = [one.event for one in store.audit(limit=9)]
    assert events == ["shadow_failed", "shadow_started", "shadow_stopped", "shadow_started"]


def judged(id, verdict, **changes):
    boxes = (DefectBox(1, 2, 3, 4, 0.5),)
    outcome = replace(inspection(verdict=verdict, bundle_hash=B, boxes=boxes).outcome, **changes)
    return ShadowOutcome(inspection=id, outcome=outcome)


def test_outcomes_are_counted_compared_and_go_with_their_inspections(store):
    records = ModelStore(store)
    run = records.start_shadow(B, active_hash=A, actor=ADA)
    stored = store.add(
        [
            inspection(0, verdict="normal", subclass="twill", bundle_hash=A),
            inspection(1, verdict="normal", subclass="plain", bundle_hash=A),
            inspection(2, verdict="anomalous", subclass="twill", bundle_hash=A),
            inspection(3, verdict="normal", subclass="twill", bundle_hash=C),  # another bundle inspected
        ]
    )
    ids = [one.id for one in stored]
    store.review(ids[0], accept())
    mapped = {"tiles": (Tile(0, 0, 3, 4),), "smoothing": 1.5, "map_threshold": 0.25, "grids": b"\x00\x01"}
    outcomes = [
        replace(judged(ids[0], "anomalous"), **mapped),
        judged(ids[1], "normal"),
        judged(ids[2], None, error="torn", pred_score=None),
        judged(ids[3], "anomalous"),
        judged(ids[3] + 1, "anomalous"),  # retention has removed its inspection
    ]
    records.add_outcomes(run.id, outcomes, skipped=2)
    records.add_outcomes(run.id, [], skipped=1)
    assert records.last_shadow().skipped == 3
    comparison = Comparison(active=A, candidate=B)
    assert [one[1:] for one in records.pairs(comparison)] == [
        ("plain", "normal", "normal", None, 1),
        ("twill", "anomalous", None, None, 1),
        ("twill", "normal", "anomalous", "accept", 1),
    ]
    found = records.differences(comparison, limit=9)
    assert [one.inspection.id for one in found] == [ids[2], ids[0]]
    assert found[1].candidate.grids == mapped["grids"]
    assert found[1].candidate.tiles == mapped["tiles"]
    assert found[1].candidate.outcome.boxes == outcomes[0].outcome.boxes
    assert found[0].candidate.outcome.error == "torn"
    assert [one.inspection.id for one in records.differences(comparison, before=ids[2], limit=9)] == [ids[0]]
    assert len(records.differences(comparison, limit=1)) == 1
    for narrowed, n in (
        (replace(comparison, subclass="plain"), 1),
        (replace(comparison, category="wood"), 0),
        (replace(comparison, since=NOON + timedelta(seconds=1)), 2),
    ):
        assert sum(one.n for one in records.pairs(narrowed)) == n
    assert records.outcome(ids[0], B) == found[1].candidate
    assert records.outcome(ids[0], C) is None
    list(store.expire(before=NOON + timedelta(seconds=1)))
    assert records.outcome(ids[0], B) is None
    assert records.outcome(ids[2], B) is not None
