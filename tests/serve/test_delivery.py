"""The loop that delivers: heartbeats, dead letters, states, metrics. With counterparts: tests/contracts."""

import asyncio
from datetime import timedelta
from typing import Literal

import pytest

from counterparts import Station, until
from inspections import NOON
from normweave.errors import NormweaveError
from normweave.serve import delivery
from normweave.serve.outputs import DeliveryError, Output, OutputConfig, RefusedError
from normweave.serve.records import NotFoundError
from normweave.validation import checked


@checked
class Config(OutputConfig):
    type: Literal["script"]


class Script(Output):
    """Takes what it is told to take.

    Attributes:
        answers: exception, or None, for each of the next messages; then all are taken.
    """

    def __init__(self, *, attempts=1, line="Press 5", **settings):
        short = {"timeout_seconds": 0.3, "first_wait_seconds": 0.01, "longest_wait_seconds": 0.02}
        config = Config(type="script", **({"name": "script", "heartbeat_seconds": 0.01} | short | settings))
        super().__init__(config, line=line)
        self.attempts = attempts
        self.answers, self.taken, self.tried, self.beats, self.steps = [], [], [], [], []
        self.hangs = False

    async def connect(self):
        self.steps.append("connect")

    async def deliver(self, message):
        if self.hangs:
            await asyncio.sleep(60)
        self.tried.append(message.data.id)
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer
        self.taken.append(message.data.id)

    async def heartbeat(self, ok):
        self.beats.append(ok)

    async def close(self):
        self.steps.append("close")


@pytest.fixture
def station(database_url):
    made = Station(database_url)
    yield made
    made.store.close()


@pytest.fixture
def script():
    return Script()


@pytest.fixture
def begin(station):
    started = []

    def begin(*outputs):
        started.append(station.begin(*outputs))
        return started[-1]

    yield begin
    for each in started:
        each.stop()


def test_a_message_that_is_not_taken_is_sent_again_on_the_same_connection(station, script, begin):
    deliveries = begin(script)
    script.answers = [None, DeliveryError("busy"), DeliveryError("busy")]
    ids = station.add(3)
    until(lambda: script.taken == ids)
    assert script.tried == [ids[0], ids[1], ids[1], ids[1], ids[2]]
    assert script.steps == ["connect"]
    assert deliveries.states()[0].last_error is None


def test_any_other_exception_ends_the_connection(station, script, begin):
    begin(script)
    script.answers = [ValueError("garbage"), None]
    ids = station.add(2)
    until(lambda: script.taken == ids)
    assert script.steps == ["connect", "close", "connect"]


def test_a_message_without_an_answer_ends_the_connection(station, script, begin):
    deliveries = begin(script)
    script.hangs = True
    ids = station.add(2)
    until(lambda: deliveries.states()[0].attempts)
    assert "no answer within 0.3 s (deliver)" in deliveries.states()[0].last_error
    script.hangs = False
    until(lambda: script.taken == ids)


def test_an_output_can_have_more_time_to_connect_than_to_deliver(station, begin):
    class Slow(Script):
        connect_seconds = 20.0

        async def connect(self):
            await super().connect()
            await asyncio.sleep(2 * self.config.timeout_seconds)

    slow = Slow()
    begin(slow)
    ids = station.add(1)
    until(lambda: slow.taken == ids)
    assert slow.steps == ["connect"]


def test_one_output_does_not_wait_for_another(station, script, begin):
    slow = Script(name="slow")
    slow.hangs = True
    begin(slow, script)
    ids = station.add(100)
    until(lambda: script.taken == ids)


def test_refused_messages_become_dead_letters_and_are_sent_again(station, begin):
    script = Script(attempts=2)
    deliveries = begin(script)
    gone = RefusedError("gone")
    script.answers = [None, gone, gone, None]
    ids = station.add(3)
    until(lambda: deliveries.states()[0].dead_letters == 1)
    until(lambda: script.taken == [ids[0], ids[2]])
    until(lambda: deliveries.states()[0].behind == 0)
    state = deliveries.states()[0]
    assert (state.status, state.last_error, state.attempts) == ("behind", None, 0)
    (letter,) = deliveries.dead_letters("script", limit=9)
    assert (letter.inspection, letter.reason, letter.again) == (ids[1], "gone", False)

    script.answers = [gone]
    assert deliveries.send_again("script") == 1
    until(lambda: len(script.tried) == 5)
    until(lambda: deliveries.dead_letters("script", limit=9)[0].again is False)
    assert deliveries.send_again("script") == 1
    until(lambda: deliveries.states()[0].dead_letters == 0)
    assert script.taken == [ids[0], ids[2], ids[1]]
    for call in (lambda: deliveries.send_again("other"), lambda: deliveries.dead_letters("other", limit=1)):
        with pytest.raises(NotFoundError, match="no output 'other'"):
            call()


@pytest.mark.parametrize("failure", [TimeoutError(), OSError("the connection is lost")])
def test_a_dead_letter_that_fails_again_stops_nothing(station, begin, failure):
    """Also where it costs the connection: it is kept, and later inspections are delivered."""
    script = Script()
    deliveries = begin(script)
    script.answers = [RefusedError("gone"), failure]
    first, *_ = station.add(1)
    until(lambda: deliveries.states()[0].dead_letters == 1)
    until(lambda: len(script.answers) == 1)
    assert deliveries.send_again("script") == 1
    until(lambda: not script.answers)
    until(lambda: deliveries.dead_letters("script", limit=9)[0].again is False)
    later = station.add(2)
    until(lambda: script.taken == later)
    assert script.tried == [first, first, *later]


def test_a_failure_that_lasts_is_logged_once(station, script, begin, caplog):
    """Also if each message becomes a dead letter."""
    deliveries = begin(script)
    script.answers = [RefusedError("gone")] * 4
    *_, last = station.add(5)
    until(lambda: script.taken == [last])
    assert deliveries.states()[0].dead_letters == 4
    assert caplog.text.count("The output script fails: gone") == 1


def test_dead_letters_that_were_to_be_sent_again_survive_a_restart(station, begin):
    first = Script()
    deliveries = begin(first)
    first.answers = [RefusedError("gone")]
    (id,) = station.add()
    until(lambda: deliveries.states()[0].dead_letters == 1)
    deliveries.stop()
    deliveries.store.mark_again("script")
    again = Script()
    begin(again)
    until(lambda: again.taken == [id])


def test_heartbeats_follow_the_readiness_of_the_server(station, script, begin, monkeypatch):
    monkeypatch.setattr(delivery, "READY_SECONDS", 0.02)
    begin(script)
    until(lambda: True in script.beats)
    station.failure = "The disk is full."
    until(lambda: script.beats[-1] is False)
    until(lambda: not any(script.beats[-5:]))
    station.failure = None
    until(lambda: script.beats[-1])


def test_no_heartbeat_while_a_message_is_not_taken(station, script, begin):
    begin(script)
    until(lambda: True in script.beats)
    script.answers = [DeliveryError("busy")] * 1000
    station.add()
    until(lambda: len(script.tried) > 3)
    script.beats.clear()
    until(lambda: len(script.beats) > 3)
    assert not any(script.beats)


def test_an_old_check_of_the_readiness_does_not_count(station, script, begin, monkeypatch):
    deliveries = begin(script)
    until(lambda: deliveries.readiness() is None)
    monkeypatch.setattr(delivery, "STALE_SECONDS", -1.0)
    assert "does not answer" in deliveries.readiness()


def test_an_output_that_cannot_connect_is_failing(station, begin, script):
    async def connect():
        raise OSError("no route")

    script.connect = connect
    deliveries = begin(script)
    state = until(lambda: deliveries.states()[0].attempts > 1 and deliveries.states()[0])
    assert (state.status, state.last_error, state.last_success_at) == (
        "failing",
        "no route. Check the address, and that the counterpart runs.",
        None,
    )


def test_what_retention_removed_is_shown(station, script, begin):
    deliveries = begin(script)
    script.answers = [DeliveryError("busy")] * 100_000
    station.add(3)
    until(lambda: script.tried)
    list(station.store.expire(before=NOON + timedelta(days=1)))
    state = deliveries.states()[0]
    assert state.removed == 3
    script.answers = []
    until(lambda: deliveries.states()[0].attempts == 0)
    assert deliveries.states()[0].status == "behind"
    assert deliveries.acknowledge_removed("script", actor="Ada") == 3
    assert (deliveries.states()[0].removed, deliveries.states()[0].status) == (0, "working")
    with pytest.raises(NotFoundError, match="no output 'other'"):
        deliveries.acknowledge_removed("other", actor="Ada")


def test_metrics(station, script, begin, monkeypatch):
    monkeypatch.setattr(delivery, "SAVE_SECONDS", 0.02)
    begin(script)
    station.add(3)
    until(lambda: len(script.taken) == 3)
    script.answers = [DeliveryError("busy")] * 100_000
    station.add(2)
    labels = '{name="script",type="script"}'
    for line in (
        f"normweave_output_delivered_total{labels} 3.0",
        f"normweave_output_behind{labels} 2.0",
        f"normweave_output_up{labels} 0.0",
        f"normweave_output_dead_letters{labels} 0.0",
        f"normweave_output_last_success_seconds{labels} 1.",
    ):
        until(lambda line=line: line in station.metrics.text().decode(), line)


def test_the_database_may_fail_for_a_while(station, script, begin, monkeypatch):
    monkeypatch.setattr(delivery, "SAVE_SECONDS", 0.02)
    deliveries = begin(script)
    works = deliveries.store.after

    def fails(*_, **__):
        raise NormweaveError("The database failed.")

    deliveries.store.after = fails
    ids = station.add(2)
    until(lambda: deliveries.states()[0].last_error == "The database failed.")
    deliveries.store.after = works
    until(lambda: script.taken == ids)


def test_without_outputs_nothing_runs(station):
    deliveries = station.begin()
    assert (deliveries.states(), station.listeners) == ([], set())
    deliveries.stop()


def test_a_server_that_does_not_deliver_shows_what_is_stored_and_can_begin_again(station, begin, monkeypatch):
    monkeypatch.setattr(delivery, "SAVE_SECONDS", 0.02)
    leader, waits = Script(attempts=1), Script(attempts=1)
    leading = begin(leader)
    standby = delivery.Deliveries(station, [waits])
    leader.answers = [None, RefusedError("gone")]
    ids = station.add(3)
    until(lambda: leader.taken == [ids[0], ids[2]])
    until(lambda: [one.behind for one in standby.states()] == [0])
    (state,) = standby.states()
    assert (state.status, state.dead_letters, state.last_success_at is None) == ("behind", 1, False)
    assert len(standby.dead_letters("script", limit=9)) == 1

    assert standby.send_again("script") == 1  # the one that delivers finds it
    until(lambda: leader.taken == [ids[0], ids[2], ids[1]])
    leading.stop(seconds=0)
    standby.start()
    (last,) = station.add()
    until(lambda: waits.taken == [last])
    standby.stop()
    leading.start()
    (last,) = station.add()
    until(lambda: leader.taken[-1] == last)
    assert waits.taken != [last]
