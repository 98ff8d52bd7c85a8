"""A bit of a PLC as a trigger, with a Modbus server of pymodbus in another process."""

import socket
import struct
import threading
import time

import pytest

from feeders import Plc, until
from normweave.errors import ConfigError
from normweave.serve.plc import RisingEdges
from normweave.serve.trigger import ModbusTrigger, trigger
from ports import free_port


@pytest.fixture(scope="module")
def plc():
    with Plc() as server:
        yield server


def config(plc, **given):
    return ModbusTrigger(**({"type": "modbus", "host": "127.0.0.1", "port": plc.port, "poll_seconds": 0.005} | given))


def counted(edges, expected):
    """Wait until so many edges have come, and return whether they were exactly so many."""
    count = 0

    def enough():
        nonlocal count
        count += edges.take()
        return count >= expected

    until(enough)
    return count == expected


@pytest.mark.parametrize(
    ("signal", "bit"), [("coil", 0), ("discrete_input", 0), ("holding_register", 3), ("input_register", 15)]
)
def test_each_rise_counts_once_and_a_high_level_at_the_start_does_not(plc, signal, bit):
    plc.write(signal, 1 << bit)
    edges = RisingEdges(config(plc, signal=signal, address=8, bit=bit))
    edges.start()
    time.sleep(0.1)  # some polls of a level that is high
    for _ in range(2):
        plc.pulse(signal, 1 << bit)
    assert counted(edges, 2)
    assert edges.take() == 0
    edges.stop()


def test_of_several_rises_between_two_frames_all_but_one_are_missed(plc):
    chooser = trigger(config(plc, address=8))
    assert not chooser.chooses(None, at=0.0)
    for _ in range(3):
        plc.pulse("coil", 1)
    assert chooser.chooses(None, at=0.0)
    assert chooser.missed == 2
    assert not chooser.chooses(None, at=0.0)
    plc.pulse("coil", 1)
    until(lambda: chooser.chooses(None, at=0.0))
    assert chooser.missed == 2
    chooser.close()


def test_what_the_plc_refuses_and_one_that_is_not_there_are_named_with_the_cure(plc):
    for given, words in (
        ({"address": 9999}, r"coil 9999: it has no such address \(illegal data address\).*Check signal, address"),
        ({"port": free_port()}, "cannot be reached. Check host and port"),
    ):
        with pytest.raises(OSError, match=words):
            trigger(config(plc, **given))
    with pytest.raises(ConfigError, match="bit has no effect with signal coil"):
        config(plc, bit=3)


def test_a_connection_that_the_plc_resets_is_named_with_the_cure(plc):
    listening = socket.create_server(("127.0.0.1", 0))

    def reset():
        connection, _ = listening.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends a reset
        connection.recv(100)
        connection.close()

    thread = threading.Thread(target=reset)
    thread.start()
    with pytest.raises(OSError, match=r"does not answer: .*reset by peer\. Check the network and device_id"):
        trigger(config(plc, port=listening.getsockname()[1]))
    thread.join()
    listening.close()
