"""Parts are closed, kept over restarts, and corrected by late views; with a clock that the tests move."""

import asyncio
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feeders import until
from inspections import inspect_files, inspection
from normweave.outcome.parts import MAX_IMAGES, RANKS, PartRule, PartView, judge
from normweave.serve.config import ServeConfig
from normweave.serve.database import StoreError
from normweave.serve.parts import OpenParts, Parts
from normweave.serve.service import Upload
from normweave.serve.store import Store

VERDICTS = ("normal", "unknown", "anomalous", None)


class Line:
    """A store with the worker of parts, stepped by hand; its clock stands still unless a test moves it."""

    def __init__(self, store, rule, **settings):
        self.store, self.now, self.settings = store, 0.0, settings
        self.judged = set()
        self.service = SimpleNamespace(
            store=store, part_rule=rule, config=ServeConfig(), listeners=set(), waiting_parts=lambda: set(self.judged)
        )
        self.restart()

    def restart(self):
        self.parts = Parts(self.service, clock=lambda: self.now, **self.settings)

    def take(self, part, view, verdict="normal"):
        """Store an image of a part."""
        error = {"error": "torn"} if verdict is None else {}
        (stored,) = self.store.add([inspection(part_id=part, view=view, verdict=verdict, **error)])
        self.settle()
        return stored.id

    def settle(self):
        while self.parts.step():
            pass

    def wait(self, seconds):
        self.now += seconds
        self.settle()

    def closed(self, **query):
        return self.parts.records.records(after=0, limit=1000, **query)

    def verdicts(self):
        return [(one.part_id, one.verdict) for one in self.closed()]


@pytest.fixture
def line(store):
    return Line(store, PartRule(views=2, seconds=10))


def test_a_part_is_closed_with_its_last_view(line):
    line.take("17", "front")
    assert line.verdicts() == []
    line.take("18", "front")
    line.take("17", "back")
    assert line.verdicts() == [("17", "normal")]
    line.take("18", "back", "anomalous")
    assert line.verdicts() == [("17", "normal"), ("18", "anomalous")]
    assert [one.images for one in line.closed()] == [2, 2]


def test_a_part_is_closed_when_its_time_is_over(line):
    line.take("17", "front")
    line.wait(9)
    line.take("17", "front")
    line.wait(9)
    assert line.verdicts() == []
    line.wait(1)
    (closed,) = line.closed()
    assert (closed.verdict, [one.reason for one in closed.reasons], closed.images) == ("incomplete", ["missing"], 2)


def test_a_part_stays_open_while_more_of_its_images_are_judged(line):
    line.judged = {"17"}
    line.take("17", "front")
    line.take("17", "back")
    line.take("18", "front")
    line.wait(11)
    assert line.verdicts() == [("18", "incomplete")]
    line.judged = set()
    line.take("17", "back", "anomalous")
    assert line.verdicts() == [("18", "incomplete"), ("17", "anomalous")]
    assert [one.corrects for one in line.closed()] == [None, None]


def test_images_of_one_request_count_together(service, photos, monkeypatch):
    """None is stored before the last one is judged: a part that is closed on another server has all of them."""
    service.part_rule = PartRule(views=2, seconds=0.01)
    monkeypatch.setattr(type(service.detector), "batch_images", 1)
    last, score = threading.Event(), service.detector.scores
    calls = []

    def slow(images):
        calls.append(images)
        if len(calls) == 3:
            assert last.wait(20)
        return score(images)

    monkeypatch.setattr(service.detector, "scores", slow)
    parts = Parts(service)
    parts.start()
    uploads = [
        Upload(f"{n}.png", Path(photo).read_bytes(), "17", view)
        for n, (photo, view) in enumerate(zip(photos[:3], "aba", strict=True))
    ]
    thread = threading.Thread(target=lambda: asyncio.run(service.inspect(uploads, source="api", actor="test")))
    thread.start()
    until(lambda: len(calls) == 3)
    time.sleep(0.1)
    assert parts.records.open_views(after=0, limit=9) == parts.records.records(limit=9) == []
    last.set()
    thread.join()
    until(lambda: parts.records.records(limit=9))
    parts.stop()
    (closed,) = parts.records.records(limit=9)
    assert closed.images == 3


def test_a_late_view_is_kept_and_only_ever_makes_it_worse(line):
    first = line.take("17", "front")
    line.wait(10)
    good = line.take("17", "back")
    assert line.verdicts() == [("17", "incomplete")]
    bad = line.take("17", "back", "anomalous")
    line.take("17", "back", "unknown")
    closed, correction = line.closed()
    assert (correction.verdict, correction.corrects, correction.images) == ("anomalous", closed.id, 3)
    assert [(one.reason, one.inspection) for one in correction.reasons] == [("anomalous", bad)]
    found = line.parts.records.inspections(closed.id, limit=9)
    assert [one.id for one in found] == [first, good, bad, bad + 1]
    assert line.parts.records.of(closed.id) == [closed, correction]


def test_after_some_time_the_same_id_is_a_new_part(store):
    line = Line(store, PartRule(views=1, late_seconds=1e-6))
    line.take("17", "front", "anomalous")
    line.take("17", "front")
    assert line.verdicts() == [("17", "anomalous"), ("17", "normal")]


def test_open_parts_survive_a_restart_and_their_time_begins_again(line):
    line.take("17", "front")
    line.wait(9)
    line.restart()
    line.wait(9)
    assert line.verdicts() == []
    line.take("17", "back", "unknown")
    assert line.verdicts() == [("17", "unknown")]


def test_lines_of_one_database_do_not_see_each_other(line):
    other = Line(Store(line.store.database, line="Press 5"), PartRule(views=1))
    line.take("17", "front")
    other.settle()
    assert other.verdicts() == []


def test_two_servers_of_one_line_close_a_part_once_and_the_other_one_logs_why(line, caplog):
    other = Line(line.store, PartRule(views=2, seconds=10))
    line.take("17", "front")
    other.settle()
    line.take("17", "back")
    other.settle()
    assert line.verdicts() == [("17", "normal")]
    line.take("18", "front")
    other.wait(11)
    line.wait(11)
    assert line.verdicts() == [("17", "normal"), ("18", "incomplete")]
    assert "Give each its own --name" in caplog.text


def test_the_number_of_open_parts_and_of_images_of_a_part_is_bounded(store):
    line = Line(store, PartRule(seconds=10), most=3)
    for number in range(5):
        line.take(f"part {number}", "front")
    assert [one.part_id for one in line.closed()] == ["part 0", "part 1"]
    store.add([inspection(part_id="many", view=str(n), verdict="normal") for n in range(MAX_IMAGES + 5)])
    line.settle()
    assert [one.images for one in line.closed(part_id="many")] == [MAX_IMAGES]


def test_listeners_are_called_for_closed_parts_and_corrections(line):
    calls = []
    line.parts.listeners.add(lambda: calls.append(len(line.closed())))
    line.take("17", "front")
    line.take("17", "back")
    line.take("17", "back", "anomalous")
    assert calls == [1, 2]


def test_the_thread_closes_parts_of_a_running_service(service, photos):

    service.part_rule = PartRule(part="^([^_]+)_", views=2)
    parts = Parts(service)
    done = threading.Event()
    parts.listeners.add(done.set)
    parts.start()
    inspect_files(service, photos[0], photos[1], names=["17_a.png", "17_b.png"])
    assert done.wait(20)
    parts.stop()
    (closed,) = parts.records.records(limit=9)
    assert (closed.part_id, closed.images) == ("17", 2)
    assert {one.outcome.view for one in parts.records.inspections(closed.id, limit=9)} == {"17_a", "17_b"}


def test_after_the_store_failed_the_part_is_closed(line, monkeypatch):
    records, close, failures = line.parts.records, line.parts.records.close, [StoreError("The disk is full.")]

    def failing(*given):
        if failures:
            raise failures.pop()
        return close(*given)

    monkeypatch.setattr(records, "close", failing)
    line.store.add([inspection(part_id="17", view=view, verdict="normal") for view in ("front", "back")])
    done = threading.Event()
    line.parts.listeners.add(done.set)
    line.parts.start()
    assert done.wait(20)
    line.parts.stop()
    assert (line.verdicts(), failures) == ([("17", "normal")], [])


# ── any order, losses, doubles, late views, restarts ─────────────────────────────────────────────────────────────────

events = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("PQ"), st.sampled_from("abc"), st.sampled_from(VERDICTS)),
        st.just("restart"),
        st.sampled_from([1.0, 6.0, 20.0]),
    ),
    max_size=14,
)


@settings(max_examples=25)
@given(events=events, views=st.sampled_from([None, 2, ("a", "b")]))
def test_every_image_counts_once_in_the_right_part_whatever_comes(tmp_path_factory, events, views):
    store = Store.open(f"sqlite:///{tmp_path_factory.mktemp('line')}/store.db")
    line = Line(store, PartRule(views=views, seconds=10))
    taken = {}
    for event in events:
        if event == "restart":
            line.restart()
            line.settle()
        elif isinstance(event, float):
            line.wait(event)
        else:
            taken[line.take(*event)] = event
    line.wait(10)
    rows = line.closed()
    counted = Counter()
    for root in [one for one in rows if one.corrects is None]:
        found = line.parts.records.inspections(root.id, limit=99)
        counted.update(one.id for one in found)
        assert {one.outcome.part_id for one in found} == {root.part_id}
        history = line.parts.records.of(root.id)
        ranks = [RANKS[one.verdict] for one in history]
        assert ranks == sorted(set(ranks))
        images = [PartView(view, verdict, id) for id, (_, view, verdict) in taken.items() if id in dict(counted)]
        mine = [one for one in images if taken[one.inspection][0] == root.part_id]
        worst = max(RANKS[judge(mine[: root.images], views).verdict], RANKS[judge(mine, views).verdict])
        assert ranks[-1] == worst
        if history[-1].verdict == "normal":
            assert all(verdict == "normal" for _, _, verdict in (taken[one.id] for one in found))
            assert isinstance(views, int | None) or {one.outcome.view for one in found} >= set(views or ())
    assert counted == Counter(dict.fromkeys(taken, 1))
    store.close()


@given(
    order=st.permutations([(part, view) for part in range(4) for view in "ab"]),
    lost=st.sets(st.integers(0, 7), max_size=4),
)
def test_the_state_alone_closes_each_part_once_in_any_order(order, lost):
    state, closed = OpenParts(PartRule(views=2, seconds=10)), []
    came = [one for number, one in enumerate(order) if number not in lost]
    for now, (part, view) in enumerate(came):
        closed += state.add(str(part), PartView(view, "normal"), now=0.1 * now)
        closed += state.ready(now=0.1 * now)
    assert all(one.result.verdict == "normal" for one in closed)
    assert state.wait(now=0.0) == float("inf") or len(state)
    closed += state.ready(now=100.0)
    assert not state
    assert Counter(one.part_id for one in closed) == Counter({str(part) for part, _ in came})
    assert sum(len(one.images) for one in closed) == len(came)


def test_a_server_that_leads_again_reads_what_another_one_has_closed_in_the_meantime(service, photos):
    service.part_rule = PartRule(part="^([^_]+)_", views=2, seconds=30)
    first, second = Parts(service), Parts(service)
    first.start()
    inspect_files(service, photos[0], names=["17_a.png"])
    until(lambda: "17" in {one.part_id for one in first.records.open_views(after=0, limit=9)})
    first.stop()
    second.start()
    inspect_files(service, photos[1], names=["17_b.png"])
    until(lambda: len(second.records.records(limit=9)) == 1)
    second.stop()
    first.start()
    inspect_files(service, photos[2], photos[3], names=["18_a.png", "18_b.png"])
    until(lambda: [one.part_id for one in first.records.records(limit=9)] == ["18", "17"])
    first.stop()
