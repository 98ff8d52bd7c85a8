"""Modbus: the registers of a result, the handshake, the heartbeat, and that nothing is good by default."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from pymodbus.client import ModbusTcpClient

from counterparts import PlcClient, PlcServer, make, refusal, until
from inspections import inspection, unreadable
from normweave.serve import delivery
from normweave.serve.delivery_store import DeliveryStore
from normweave.serve.message import InspectionMessage
from normweave.serve.outputs import modbus
from normweave.serve.verdict_codes import DEFECTIVE, GOOD, INCOMPLETE, NO_RESULT, STALE, UNKNOWN, UNREADABLE


@pytest.fixture(params=[PlcServer, PlcClient], ids=["client", "server"])
def plc(request, tmp_path):
    made = request.param(tmp_path)
    made.listen()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """The readiness is checked often."""
    monkeypatch.setattr(delivery, "READY_SECONDS", 0.02)


def message(*, age=0.0, **fields):
    at = datetime.now(UTC) - timedelta(seconds=age)
    return InspectionMessage.of(inspection(id=0x12345678, received_at=at, **fields))


def test_the_registers_of_a_result():
    registers = modbus.result(message(pred_score=3.0, threshold=2.0), max_age=10)
    assert registers == [0x1234, 0x5678, DEFECTIVE, 1500, 2, modbus.OF_IMAGE, 0, 0, 0]
    for value, registers in (("normal", GOOD), ("unknown", UNKNOWN), ("anomalous", DEFECTIVE)):
        assert modbus.result(message(verdict=value), max_age=10)[2] == registers
    assert modbus.result(InspectionMessage.of(unreadable(id=1)), max_age=10)[:5] == [0, 1, UNREADABLE, 0, 0]
    assert modbus.result(message(pred_score=1e9, threshold=1.0), max_age=10)[3] == 0xFFFF
    assert modbus.result(message(pred_score=-1.0, threshold=1.0), max_age=10)[3] == 0
    for score, register in ((-0.5, 1000), (-0.25, 1500), (-0.75, 500), (-9.0, 0), (0.5, 3000)):
        assert modbus.result(message(pred_score=score, threshold=-0.5), max_age=10)[3] == register
    assert [modbus.result(message(pred_score=s, threshold=0.0), max_age=10)[3] for s in (-1, 0, 1)] == [0, 1000, 0xFFFF]


def test_the_id_of_a_part_is_a_number_if_it_has_only_digits():
    numbers = {"70000": [1, 4464], "4294967295": [0xFFFF, 0xFFFF], "4294967296": [0, 0], "A-17": [0, 0], None: [0, 0]}
    for id, registers in numbers.items():
        assert modbus.result(message(part_id=id), max_age=10)[-2:] == registers


def test_the_registers_of_a_part(station):
    first = station.add_part("70000", verdict="incomplete")
    correction = station.add_part("70000", verdict="anomalous", corrects=first.id)
    store = DeliveryStore(station.store.database, line=station.store.line)
    one, two = (modbus.result(store.message(each), max_age=10) for each in store.after("parts", 0, limit=9))
    assert one == [0, first.id, INCOMPLETE, 0, 0, modbus.OF_PART, 1, 1, 4464]
    assert two == [0, correction.id, DEFECTIVE, 0, 0, modbus.OF_PART, 2, 1, 4464]


def test_an_old_result_is_never_good():
    assert modbus.result(message(verdict="normal", age=11), max_age=10)[2] == STALE


def test_a_result_is_good_only_until_it_is_acknowledged(plc, station, begin):
    begin(plc.output())
    ids = station.add(3, verdict="normal") + station.add(1)
    until(lambda: len(plc.taken) == 4)
    assert [one[:2] for one in plc.taken] == [(id, GOOD) for id in ids[:3]] + [(ids[3], DEFECTIVE)]
    until(lambda: plc.seen[-1][modbus.VERDICT] == NO_RESULT and not plc.seen[-1][modbus.STATUS] & modbus.VALID)
    assert plc.seen[-1][0] == modbus.VERSION


def test_a_result_without_an_acknowledgement_is_taken_back_and_written_again(plc, station, begin):
    plc.acknowledges = False
    deliveries = begin(plc.output(acknowledge_seconds=0.1))
    (id,) = station.add(verdict="normal")
    until(lambda: any(registers[modbus.STATUS] & modbus.VALID for registers in plc.seen))
    until(lambda: deliveries.states()[0].attempts)
    assert "has not acknowledged result 1" in deliveries.states()[0].last_error
    until(lambda: plc.seen[-1][modbus.VERDICT] == NO_RESULT)
    plc.acknowledges = True
    until(lambda: plc.ids() == [id])
    until(lambda: deliveries.states()[0].status == "working")


def test_the_heartbeat_counts_only_while_the_server_can_inspect(plc, station, begin):
    begin(plc.output(heartbeat_seconds=0.02))
    until(lambda: plc.seen and plc.seen[-1][modbus.STATUS] & modbus.READY)
    first = plc.seen[-1][modbus.HEARTBEAT]
    until(lambda: plc.seen[-1][modbus.HEARTBEAT] > first + 3)
    station.failure = "The disk is full."
    until(lambda: not plc.seen[-1][modbus.STATUS] & modbus.READY)
    stopped, cycles = plc.seen[-1][modbus.HEARTBEAT], len(plc.seen)
    until(lambda: len(plc.seen) > cycles + 20)
    assert plc.seen[-1][modbus.HEARTBEAT] == stopped
    station.failure = None
    until(lambda: plc.seen[-1][modbus.HEARTBEAT] > stopped)


def test_what_an_earlier_run_left_in_the_plc_is_removed(tmp_path, station, begin):
    plc = PlcServer(tmp_path)
    left = ModbusTcpClient("127.0.0.1", port=plc.port)
    left.write_registers(100, [modbus.VERSION, 7, modbus.READY | modbus.VALID, 41, 0, 1, GOOD, 0, 0])
    left.write_register(100 + modbus.ACKNOWLEDGE, 41)
    output = plc.output()

    async def connect():
        await output.connect()
        found = left.read_holding_registers(100, count=modbus.COUNT).registers
        await output.close()
        return found

    found = asyncio.run(connect())
    assert (found[modbus.STATUS], found[modbus.SEQUENCE], found[modbus.VERDICT]) == (0, 0, NO_RESULT)
    plc.listen()
    begin(plc.output())
    station.add()
    until(lambda: plc.taken)
    assert 42 in {registers[modbus.SEQUENCE] for registers in plc.seen}  # another number than the acknowledged one
    left.close()
    plc.close()


def test_an_orderly_stop_takes_back_the_readiness(tmp_path, station):
    plc = PlcServer(tmp_path)
    plc.listen()
    deliveries = station.begin(plc.output())
    until(lambda: plc.seen and plc.seen[-1][modbus.STATUS] & modbus.READY)
    deliveries.stop()
    until(lambda: plc.seen[-1][modbus.STATUS] == 0)
    plc.close()


def test_doctor_writes_nothing_to_a_plc(tmp_path):
    plc = PlcServer(tmp_path)
    plc.listen()
    until(lambda: plc.seen)

    async def check(output):
        try:
            await output.check()
        finally:
            await output.close()

    asyncio.run(check(plc.output()))
    with pytest.raises(OSError, match=r"does not read the holding registers 0 to 16"):
        asyncio.run(check(make("modbus", role="client", host="127.0.0.1", port=plc.port)))
    with pytest.raises(OSError, match="no connection to"):
        asyncio.run(check(make("modbus", role="client", host="127.0.0.1", port=1)))
    with pytest.raises(OSError, match="in use"):
        asyncio.run(check(make("modbus", role="server", host="127.0.0.1", port=plc.port)))
    assert all(not any(registers[: modbus.ACKNOWLEDGE]) for registers in plc.seen[:-1])
    plc.close()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("role: master, host: h", "outputs[0].role"),
        ("role: client, host: h, acknowledge_seconds: 20", "acknowledge_seconds must be at most max_age_seconds"),
        ("role: client, host: h, address: 65520", "outputs[0].address"),
        ("role: client, host: h, deliver: [parts]", "outputs[0].deliver has parts, so parts.views must name or number"),
        (
            "role: client, host: h, deliver: [drift]",
            "outputs[0].deliver[0] must be 'inspections' or 'parts', got 'drift'",
        ),
        ("role: client, host: h, deliver: []", "outputs[0].deliver must name at least one, each once, got none"),
    ],
)
def test_wrong_settings_are_named(tmp_path, entry, words):
    assert words in refusal(tmp_path, f"type: modbus, name: plc, {entry}")
