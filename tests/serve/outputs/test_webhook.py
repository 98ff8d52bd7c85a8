"""Webhooks are signed, have an id of the inspection, and refused ones become dead letters."""

import base64
import socket
import threading

import pytest

from counterparts import SECRET, make, refusal, until
from normweave.errors import ConfigError
from normweave.serve.message import InspectionMessage


@pytest.fixture
def deliveries(station, receiver):
    made = station.begin(receiver.output(refusals=2))
    yield made
    made.stop()


def test_the_reference_library_verifies_the_message(station, receiver, deliveries):
    (id,) = station.add()
    ((headers, body),) = until(lambda: receiver.received)  # the receiver verifies
    message = InspectionMessage.of(station.store.inspection(id))
    assert InspectionMessage.model_validate(body) == message
    assert headers["webhook-id"] == message.id
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize("status", [500, 503, 408, 425, 429, 307])
def test_a_message_is_sent_again_with_the_same_id(station, receiver, deliveries, status):
    receiver.statuses = [status] * 4
    ids = station.add(2)
    until(lambda: len(receiver.received) == 2)
    assert receiver.ids() == ids
    assert receiver.refused == [receiver.received[0][0]["webhook-id"]] * 4
    assert deliveries.states()[0].dead_letters == 0


@pytest.mark.parametrize("status", [400, 404, 410, 422])
def test_a_refused_message_becomes_a_dead_letter(station, receiver, deliveries, status):
    receiver.statuses = [status] * 2
    ids = station.add(2)
    until(lambda: receiver.ids() == ids[1:])
    (letter,) = deliveries.dead_letters("webhook", limit=9)
    assert (letter.inspection, f"with status {status}" in letter.reason) == (ids[0], True)
    deliveries.send_again("webhook")
    until(lambda: receiver.ids() == [ids[1], ids[0]])
    assert receiver.received[-1][0]["webhook-id"] == receiver.refused[0]


def test_an_answer_that_never_ends_keeps_one_thread(station, tmp_path):
    """It sends a byte now and then, so that no step of the connection takes long."""
    (tmp_path / "secret").write_text(SECRET)
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def dribble():
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 204 No Content\r\nX: ")
                while not ended.wait(0.05):
                    connection.sendall(b"x")
                connection.sendall(b"\r\n\r\n")

        thread = threading.Thread(target=dribble)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        output = make("webhook", url=address, secret_file=str(tmp_path / "secret"), timeout_seconds=0.2)
        deliveries = station.begin(output)
        station.add(3)
        until(lambda: deliveries.states()[0].attempts > 2)
        assert sum(one.name == "webhook" for one in threading.enumerate()) == 1
        assert "has not ended its answer" in deliveries.states()[0].last_error
        deliveries.stop()
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("url: line-4, secret_env: S", "outputs[0].url must be an address like https"),
        ("url: http://mes/", "secret_env or secret_file must be given"),
        ("url: http://mes/, secret_env: S, secret_file: S", "secret_env and secret_file are both given"),
        ("secret_env: S", "outputs[0].url"),
    ],
)
def test_wrong_settings_are_named(tmp_path, entry, words):
    assert words in refusal(tmp_path, f"type: webhook, name: mes, {entry}")


@pytest.mark.parametrize(
    ("secret", "words"),
    [
        ("whsec_", "this one has 0 bytes"),
        ("whsec_aéb", "this is no base64 text"),
        ("x", "this is no base64 text"),
        ("whsec_" + base64.b64encode(bytes(23)).decode(), "24 to 64 random bytes in base64; this one has 23 bytes"),
        ("whsec_" + base64.b64encode(bytes(65)).decode(), "this one has 65 bytes"),
        (base64.b64encode(bytes(32)).decode(), "this one has 32 bytes, without whsec_"),
    ],
)
def test_a_wrong_secret_is_refused_and_not_printed(monkeypatch, secret, words):
    monkeypatch.setenv("MES_SECRET", secret)
    with pytest.raises(ConfigError) as caught:
        make("webhook", url="http://mes/", secret_env="MES_SECRET")
    assert words in str(caught.value)
    assert "openssl rand -base64 32" in str(caught.value)
    assert "é" not in str(caught.value)


def test_an_answer_that_is_no_success_is_named_with_the_cure(station, receiver, deliveries):
    receiver.statuses = [302] * 1000
    station.add()
    until(lambda: deliveries.states()[0].attempts)
    assert "status 302, a redirect, which is not followed. Give the address" in deliveries.states()[0].last_error
    receiver.proxy.stop()
    until(lambda: "Connection refused. Check url and secret" in deliveries.states()[0].last_error)
