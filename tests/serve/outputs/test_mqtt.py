"""MQTT: topics, the retained state and the last will, logins and TLS."""

import asyncio
import json
import os
import signal
import subprocess

import aiomqtt
import pytest

from counterparts import Mosquitto, make, refusal, until
from normweave.errors import ConfigError
from normweave.serve import delivery
from normweave.serve.message import InspectionMessage


@pytest.fixture
def start(tmp_path):
    """Function that starts a broker with these settings."""
    started = []

    def start(settings="allow_anonymous true", **login):
        started.append(Mosquitto(tmp_path, settings=settings))
        started[-1].listen(**login)
        return started[-1]

    yield start
    for broker in started:
        broker.close()


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """The readiness is checked often."""
    monkeypatch.setattr(delivery, "READY_SECONDS", 0.02)


def texts(broker, topic):
    """Return what came to a topic of the line."""
    return [text for where, text in broker.received if where == f"normweave/Press_5/{topic}"]


def state(broker):
    """Return the last state."""
    found = texts(broker, "state")
    return json.loads(found[-1]) if found else None


def retained(broker):
    """Return the state that a new subscriber gets."""

    async def read():
        async with aiomqtt.Client("127.0.0.1", broker.port) as client:
            await client.subscribe("normweave/Press_5/state")
            return json.loads((await anext(client.messages)).payload)

    async def soon():
        return await asyncio.wait_for(read(), 10)

    return asyncio.run(soon())


ONLINE = {"state": "online", "ready": True}
OFFLINE = {"state": "offline", "ready": False}


def test_results_state_and_heartbeat(start, station):
    broker = start()
    deliveries = station.begin(broker.output())
    try:
        (id,) = station.add()
        until(lambda: texts(broker, "inspection"))
        assert InspectionMessage.model_validate_json(texts(broker, "inspection")[0]) == InspectionMessage.of(
            station.store.inspection(id)
        )
        until(lambda: state(broker) == ONLINE)
        until(lambda: len(texts(broker, "heartbeat")) > 2)
        station.failure = "The disk is full."
        until(lambda: state(broker) == {"state": "online", "ready": False})
        beats = [int(text) for text in texts(broker, "heartbeat")]
        assert beats == list(range(1, len(beats) + 1))
    finally:
        deliveries.stop()
    until(lambda: state(broker) == OFFLINE)


def test_the_broker_publishes_the_will_after_a_lost_connection(start, station):
    broker = start()
    deliveries = station.begin(broker.output())
    try:
        until(lambda: state(broker) == ONLINE)
        assert retained(broker) == ONLINE
        broker.proxy.stop()
        until(lambda: state(broker) == OFFLINE)
        assert retained(broker) == OFFLINE
    finally:
        broker.proxy.start()
        deliveries.stop()


def test_a_frozen_broker_is_noticed_without_a_result(start, station):
    broker = start()
    deliveries = station.begin(broker.output())
    try:
        until(lambda: deliveries.states()[0].status == "working")
        os.kill(broker.pid, signal.SIGSTOP)
        until(lambda: deliveries.states()[0].status == "failing")
        os.kill(broker.pid, signal.SIGCONT)
        until(lambda: deliveries.states()[0].status == "working")
    finally:
        os.kill(broker.pid, signal.SIGCONT)
        deliveries.stop()


def test_a_login_is_needed_where_the_broker_needs_one(start, station, tmp_path, monkeypatch):
    monkeypatch.setenv("BROKER", "correct horse")
    accounts = tmp_path / "accounts"
    accounts.touch(mode=0o644)
    subprocess.run(["mosquitto_passwd", "-b", accounts, "line", "correct horse"], check=True, stderr=subprocess.DEVNULL)
    broker = start(f"allow_anonymous false\npassword_file {accounts}", username="line", password="correct horse")
    deliveries = station.begin(
        broker.output(username="line", password_env="BROKER"), broker.output(name="without", topic="other")
    )
    try:
        (id,) = station.add()
        until(lambda: broker.ids() == [id])
        without = until(lambda: deliveries.states()[1].attempts and deliveries.states()[1])
        assert without.last_error.startswith("[code:135] Not authorized. Check host and port, username and password")
    finally:
        deliveries.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho leaves a refused socket open
def test_tls_checks_the_certificate(start, station, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-keyout",
        key,
    ]
    names = ["-subj", "/CN=broker", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "9", "-out", certificate]
    subprocess.run([*made, *names], check=True, stderr=subprocess.DEVNULL)
    key.chmod(0o644)
    broker = start(f"allow_anonymous true\ncertfile {certificate}\nkeyfile {key}", tls=certificate)
    trusting = broker.output(tls=True, tls_ca=str(certificate))
    deliveries = station.begin(trusting, broker.output(name="without", topic="other", tls=True))
    try:
        (id,) = station.add()
        until(lambda: broker.ids() == [id])
        without = until(lambda: deliveries.states()[1].attempts and deliveries.states()[1])
        assert "certificate verify failed" in without.last_error
    finally:
        deliveries.stop()


def test_doctor_publishes_to_its_own_topic(start):
    broker = start()
    asyncio.run(broker.output().check())
    until(lambda: texts(broker, "check") == ["normweave doctor"])
    assert texts(broker, "state") == []


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("host: h, topic: a/#", "outputs[0].topic must be a topic without +, # and empty levels"),
        ("host: h, topic: /a", "outputs[0].topic"),
        ("host: h, tls_ca: ca.pem", "outputs[0].tls must be true with tls_ca"),
        ("host: h, tls: true, tls_key: key.pem", "tls_certificate and tls_key must be given together"),
        ("host: h, port: 0", "outputs[0].port"),
        ("port: 1883", "outputs[0].host"),
    ],
)
def test_wrong_settings_are_named(tmp_path, entry, words):
    assert words in refusal(tmp_path, f"type: mqtt, name: broker, {entry}")


def test_the_password_is_read_at_the_start(monkeypatch):
    monkeypatch.delenv("BROKER", raising=False)
    with pytest.raises(ConfigError, match="BROKER, named by password_env, is not set"):
        make("mqtt", host="h", username="u", password_env="BROKER")


def test_files_of_tls_are_read_at_the_start(tmp_path):
    (tmp_path / "no.pem").write_text("no certificate")
    for name, words in (
        ("missing.pem", "missing.pem, named by tls_ca, cannot be read: No such file or directory. Correct tls_ca"),
        ("no.pem", "has no certificate or key, or they do not belong together"),
    ):
        with pytest.raises(ConfigError) as caught:
            make("mqtt", host="127.0.0.1", tls=True, tls_ca=str(tmp_path / name))
        assert words in str(caught.value)
