"""Contract of every output (`normweave.serve.outputs`), against a real counterpart of each type.

Every inspection arrives at least once and in the order of the ids, whatever the counterpart does meanwhile.
"""

import time

import pytest

from counterparts import Mosquitto, OpcuaClient, PlcClient, PlcServer, Receiver, until
from normweave.serve import line_config
from normweave.serve.outputs import Output, OutputConfig

COUNTERPARTS = {
    "modbus client": PlcServer,
    "modbus server": PlcClient,
    "mqtt": Mosquitto,
    "opcua": OpcuaClient,
    "webhook": Receiver,
}
QUICK = sorted(COUNTERPARTS.keys() - {"opcua"})
"""Those that start within the time that a stop leaves."""
FAULTS = [(name, "dead") for name in sorted(COUNTERPARTS)]
FAULTS += [(name, fault) for name in QUICK for fault in ("silent", "garbage")]


@pytest.fixture(params=sorted(COUNTERPARTS))
def counterpart(request, tmp_path):
    made = COUNTERPARTS[request.param](tmp_path)
    made.listen()
    yield made
    made.close()


def firsts(ids):
    """Return the ids without repetitions."""
    return list(dict.fromkeys(ids))


def test_every_type_is_tested():
    assert sorted({name.split()[0] for name in COUNTERPARTS}) == line_config.types("outputs")


@pytest.mark.parametrize("type", line_config.types("outputs"))
def test_a_module_has_the_two_classes(type):
    module = line_config.load("outputs", type)
    assert issubclass(module.Config, OutputConfig)
    assert issubclass(module.Output, Output)


def test_inspections_arrive_in_order(counterpart, station, begin):
    station.add(2)  # before the output is new
    deliveries = begin(counterpart.output())
    sent = station.add(30) + station.add(1)
    until(lambda: sent[-1] in counterpart.ids(), "the delivery")
    assert firsts(counterpart.ids()) == sent
    deliveries.stop()
    (state,) = deliveries.states()
    assert (state.behind, state.attempts, state.last_error) == (0, 0, None)
    assert state.last_success_at is not None


def test_verdicts_on_parts_come_after_their_images_and_corrections_after_them(counterpart, station, begin):
    """A part is good only if it is complete and was not corrected in the meantime."""
    before = station.add_part("10")
    late = station.add_part("10", verdict="anomalous", corrects=before.id)
    begin(counterpart.output(deliver=("inspections", "parts"), start="oldest"))
    good = station.add_part("11")
    bad = [station.add_part("12", verdict=verdict) for verdict in ("incomplete", "unknown", "anomalous")]
    until(lambda: len(counterpart.parts()) == 6, "the delivery")
    correction = station.add_part("11", verdict="unknown", corrects=good.id)
    until(lambda: len(counterpart.parts()) == 7, "the correction")
    expected = [(before.id, False, 1), (late.id, False, 2), (good.id, True, 1)]
    expected += [(one.id, False, 1) for one in bad] + [(correction.id, False, 2)]
    assert counterpart.parts() == expected
    once = dict.fromkeys(counterpart.results())  # a slow client may get a result twice
    assert [of_part for of_part, *_ in once] == [False, True] * 7


@pytest.mark.parametrize(("counterpart", "fault"), FAULTS, indirect=["counterpart"])
def test_nothing_is_lost_while_the_counterpart_fails(counterpart, station, begin, fault):
    deliveries = begin(counterpart.output())
    sent = station.add(3)
    until(lambda: len(counterpart.ids()) >= 3, "the delivery")
    if fault == "dead":
        counterpart.proxy.stop()
    else:
        counterpart.proxy.switch(fault)
    sent += station.add(60)
    until(lambda: deliveries.states()[0].attempts >= 2, "failed attempts")
    (state,) = deliveries.states()
    assert (state.status, state.last_error is not None) == ("failing", True)
    assert state.behind >= 60
    if fault == "dead":
        counterpart.proxy.start()
    else:
        counterpart.proxy.switch("pass")
    sent += station.add(3)
    until(lambda: sent[-1] in counterpart.ids(), "the delivery of the last one")
    until(lambda: deliveries.states()[0].status == "working", "a working output")
    assert firsts(counterpart.ids()) == sent


def test_a_restart_continues(counterpart, station, begin):
    first = begin(counterpart.output())
    sent = station.add(5)
    until(lambda: first.states()[0].behind == 0, "the delivery")
    before = len(counterpart.ids())
    first.stop()
    sent += station.add(5)
    begin(counterpart.output())
    sent += station.add(5)
    until(lambda: sent[-1] in counterpart.ids(), "the delivery of the last one")
    assert firsts(counterpart.ids()) == sent
    assert sent[0] not in counterpart.ids()[before:]  # an orderly stop repeats nothing


@pytest.mark.parametrize("counterpart", QUICK, indirect=True)
def test_what_was_stored_right_before_the_stop_is_delivered(counterpart, station, begin):
    deliveries = begin(counterpart.output())
    sent = station.add(40)
    deliveries.stop(seconds=60)
    until(lambda: len(counterpart.ids()) >= 40, "the delivery")
    assert counterpart.ids() == sent


@pytest.mark.parametrize("counterpart", QUICK, indirect=True)
def test_a_stop_does_not_wait_for_a_silent_counterpart(counterpart, station, begin):
    deliveries = begin(counterpart.output())
    counterpart.proxy.switch("silent")
    station.add(3)
    start = time.monotonic()
    deliveries.stop()
    assert time.monotonic() - start < 30
