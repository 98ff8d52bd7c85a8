"""The latest message of a broker, with mosquitto."""

import paho.mqtt.publish as publish
import pytest

from feeders import Mosquitto, until
from normweave.errors import ConfigError
from normweave.serve.mqtt import Broker, Messages
from ports import free_port


def test_a_newer_message_replaces_one_that_waits(tmp_path):
    dropped = []
    with Mosquitto(tmp_path) as mosquitto:
        messages = Messages(Broker(host="127.0.0.1", port=mosquitto.port, topic="a"), on_drop=dropped.append)
        messages.start()
        for text in ("1", "2", "3"):
            publish.single("a", text, qos=1, hostname="127.0.0.1", port=mosquitto.port)
        until(lambda: sum(dropped) == 2)
        message = messages.take(5)
        assert (message.topic, message.payload, message.properties) == ("a", b"3", {})
        assert messages.take() is None
        messages.stop()


def test_a_retained_message_from_before_is_left_out(tmp_path):
    dropped = []
    with Mosquitto(tmp_path) as mosquitto:
        where = {"hostname": "127.0.0.1", "port": mosquitto.port, "qos": 1}
        publish.single("a", "old", retain=True, **where)
        messages = Messages(Broker(host="127.0.0.1", port=mosquitto.port, topic="a"), on_drop=dropped.append)
        messages.start()
        until(lambda: dropped == [1])
        publish.single("a", "new", retain=True, **where)  # it comes now, so it is no retained one
        assert messages.take(5).payload == b"new"
        messages.stop()


def test_a_broker_that_is_not_there(monkeypatch):
    messages = Messages(Broker(host="127.0.0.1", port=free_port(), topic="a"))
    with pytest.raises(OSError, match="Check host, port, login and tls"):
        messages.start()
    messages.stop()


def test_a_password_that_is_not_set_is_named():
    messages = Messages(Broker(host="127.0.0.1", topic="a", username="ada", password_env="NORMWEAVE_NOT_SET"))
    with pytest.raises(OSError, match="NORMWEAVE_NOT_SET"):
        messages.start()
    with pytest.raises(ConfigError, match="port"):
        Broker(host="a", port=0, topic="a")
