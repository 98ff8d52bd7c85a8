"""The runner of a source: what waits, what is counted, and what its state is; with a source that the tests feed."""

import queue
import threading
from typing import ClassVar, Literal

import pytest

from feeders import Plc, until
from inspections import ALL
from normweave.serve import line_config
from normweave.serve.pictures import frame
from normweave.serve.service import BusyError
from normweave.serve.source import SourceConfig, SourceRunner, check
from normweave.serve.trigger import ModbusTrigger
from normweave.validation import checked

END = object()


@checked
class Config(SourceConfig):
    type: Literal["camera"]


@checked
class Lossless(SourceConfig):
    type: Literal["video"]
    drops: ClassVar[bool] = False


class Script:
    """A source that yields what the tests put in: frames, None, END, or exceptions, which are raised."""

    def __init__(self):
        self.given = queue.Queue()
        self.connections = 0

    def frames(self, config, *, max_bytes, on_drop):
        self.connections += 1
        while (one := self.given.get()) is not END:
            if isinstance(one, Exception):
                raise one
            yield one

    def give(self, *items):
        for one in items:
            self.given.put(one)


class Gate:
    """A service whose inspections wait for the test, or fail."""

    def __init__(self, service):
        self.metrics, self.config = service.metrics, service.config
        self.service, self.open, self.errors, self.begun = service, threading.Event(), [], 0
        self.open.set()

    async def inspect(self, uploads, **given):
        self.begun += 1
        self.open.wait(20)
        if self.errors:
            raise self.errors.pop(0)
        return await self.service.inspect(uploads, **given)


@pytest.fixture
def script(monkeypatch):
    script = Script()
    monkeypatch.setattr(line_config, "load", lambda section, type: script)
    return script


@pytest.fixture
def gate(service):
    return Gate(service)


@pytest.fixture
def run(script, gate):
    """Function that starts a runner; all are stopped at the end."""
    started = []

    def run(config=None, **given):
        config = config or Config(type="camera", name="top", retry_seconds=0.02)
        started.append(SourceRunner(config, given.pop("service", gate), **given))
        started[-1].start()
        return started[-1]

    yield run
    gate.open.set()
    for runner in started:
        script.give(END)
        runner.stop()


@pytest.fixture
def picture(photos):
    with open(photos[0], "rb") as file:
        return frame(file.read(), part="17")


def total(runner):
    return sum(runner.counts.values())


def test_a_frame_becomes_an_inspection_with_the_name_of_its_source(run, script, picture, service):
    runner = run()
    script.give(None, picture)
    until(lambda: runner.counts["inspected"] == 1)
    (stored,) = service.store.inspections(ALL, limit=9)
    assert (stored.source, stored.actor, stored.outcome.part_id, stored.outcome.view) == ("camera", "top", "17", "top")
    assert stored.name.startswith("top 2")
    assert runner.last == stored
    assert runner.state == ("running", "1 inspected")
    text = service.metrics.text().decode()
    assert 'normweave_source_frames_total{name="top",result="inspected"} 1.0' in text
    assert 'normweave_source_connected{name="top"} 1.0' in text


def test_one_frame_is_inspected_for_each_rise_of_a_plc_also_after_it_was_dead(run, script, picture, gate):
    frames = threading.Event()

    def feed():
        while not frames.wait(0.02):
            script.give(picture)

    with Plc() as plc:
        at = ModbusTrigger(type="modbus", host="127.0.0.1", port=plc.port, address=8, poll_seconds=0.005)
        runner = run(Config(type="camera", name="top", retry_seconds=0.02, trigger=at))
        feeding = threading.Thread(target=feed)
        feeding.start()
        until(lambda: runner.state.status == "running")
        plc.pulse("coil", True)
        until(lambda: runner.counts["inspected"] == 1)
        frames.set()
        feeding.join()
        until(script.given.empty)
        for _ in range(3):
            plc.pulse("coil", True)
        script.give(picture)
        until(lambda: runner.counts["inspected"] == 2)
        until(lambda: runner.counts["missed"] == 2)
        plc.stop()
        until(lambda: script.give(None) or runner.state.status == "no images")
        assert "Check the network" in runner.state.text or "Check host and port" in runner.state.text
        plc.start()
        until(lambda: script.give(None) or runner.state.status != "no images")
        plc.pulse("coil", True)
        until(lambda: script.give(picture) or runner.counts["inspected"] == 3)
    assert 'normweave_source_frames_total{name="top",result="missed"} 2.0' in gate.metrics.text().decode()


def test_at_most_one_frame_waits_and_a_newer_one_replaces_it(run, script, picture, gate, service):
    gate.open.clear()
    runner = run()
    script.give(picture)
    until(lambda: gate.begun == 1)
    script.give(*[picture] * 50)
    until(lambda: runner.counts["dropped"] == 49)
    gate.open.set()
    until(lambda: total(runner) == 51)
    assert dict(runner.counts) == {"inspected": 2, "dropped": 49, "failed": 0, "missed": 0}
    assert service.store.count(ALL) == 2


def test_a_source_that_does_not_hurry_waits_and_loses_nothing(run, script, picture, gate, service):
    gate.open.clear()
    runner = run(Lossless(type="video", name="film"))
    script.give(*[picture] * 5, END)
    until(lambda: gate.begun == 1)
    gate.open.set()
    until(lambda: runner.state.text.startswith("the stream ended"))
    until(lambda: runner.counts["inspected"] == 5)
    assert runner.state == ("running", "the stream ended, 5 images were inspected")
    assert (dict(runner.counts), script.connections) == ({"inspected": 5, "dropped": 0, "failed": 0, "missed": 0}, 1)


def test_a_broken_connection_is_red_with_its_reason_and_made_again(run, script, picture):
    runner = run()
    script.give(picture)
    until(lambda: runner.counts["inspected"] == 1)
    script.give(*[ConnectionError("The cable is cut.")] * 3)
    until(lambda: script.connections == 4)
    assert runner.state == ("no images", "The cable is cut.")
    script.give(picture)
    until(lambda: runner.counts["inspected"] == 2)
    assert runner.state.status == "running"
    script.give(END)
    until(lambda: runner.state == ("no images", "the stream ended"))


def test_an_unexpected_error_is_logged_and_the_source_goes_on(run, script, picture, caplog):
    runner = run()
    script.give(ZeroDivisionError("a bug"), picture)
    until(lambda: runner.counts["inspected"] == 1)
    assert "a bug" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_frame_that_cannot_be_inspected_counts_as_failed_and_the_next_is_tried(run, script, picture, gate):
    runner = run()
    gate.errors.append(OSError("The disk is full."))
    script.give(picture)
    until(lambda: runner.counts["failed"] == 1)
    assert runner.state == ("attention", "an image was not inspected: The disk is full.")
    script.give(picture)
    until(lambda: runner.counts["inspected"] == 1)
    assert runner.state == ("running", "1 inspected, 1 failed")


def test_a_busy_server_is_asked_again_until_a_newer_frame_comes(run, script, picture, gate):
    gate.errors += [BusyError("64 images are waiting.")] * 2
    runner = run()
    script.give(picture)
    until(lambda: runner.counts["inspected"] == 1)
    gate.errors += [BusyError("64 images are waiting.")] * 1000
    script.give(picture)
    until(lambda: gate.begun >= 4)
    script.give(picture)
    until(lambda: runner.counts["dropped"] == 1)
    gate.errors.clear()
    until(lambda: runner.counts["inspected"] == 2)
    assert total(runner) == 3


def test_a_quiet_source_is_amber(run, script, picture):
    now = [0.0]
    runner = run(clock=lambda: now[0])
    assert runner.state.status == "no images"
    script.give(None)
    until(lambda: runner.state == ("attention", "connected, no image yet"))
    script.give(picture)
    until(lambda: runner.counts["inspected"] == 1)
    now[0] = 61.0
    assert runner.state == ("attention", "no image for 61 s")


def test_a_stopped_source_has_counted_every_frame(run, script, picture, gate):
    gate.open.clear()
    runner = run()
    script.give(picture)
    until(lambda: gate.begun == 1)
    script.give(picture, picture)
    until(lambda: runner.counts["dropped"] == 1)
    script.give(END)
    threading.Timer(0.2, gate.open.set).start()
    runner.stop()
    assert dict(runner.counts) == {"inspected": 1, "dropped": 2, "failed": 0, "missed": 0}


def test_a_check_tells_what_came(script, picture):
    config = Config(type="camera", name="top")
    script.give(None, picture)
    assert check(config).startswith("first image after 0.")
    script.give(None, None)
    assert check(config, seconds=0.0) == "connected, no image yet"


def test_ten_thousand_frames_are_counted_exactly_and_at_most_one_is_in_the_service(run, script, picture, service):
    """The short form of perf/eight_hours.py."""
    runner = run()
    waiting = []
    for _ in range(10_000):
        script.give(picture)
        waiting.append(service.waiting)
    until(lambda: total(runner) >= 9_999)
    until(lambda: total(runner) == 10_000)
    assert max(waiting) <= 1
    assert runner.counts["failed"] == 0
    assert service.store.count(ALL) == runner.counts["inspected"] > 0


def test_a_stopped_source_can_begin_again(run, script, picture):
    runner = run()
    script.give(None, picture)
    until(lambda: runner.counts["inspected"] == 1)
    script.give(END)
    runner.stop()
    assert runner.state == ("idle", "this server does not read it")
    runner.start()
    script.give(None, picture)
    until(lambda: runner.counts["inspected"] == 2)
    assert runner.state.status == "running"
