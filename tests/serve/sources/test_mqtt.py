"""Images as messages, with mosquitto."""

import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from feeders import until
from inspections import ALL
from normweave.serve.mqtt import Broker
from normweave.serve.source import SourceRunner, check
from normweave.serve.sources.mqtt import Config


def source(mosquitto, **given):
    broker = Broker(host="127.0.0.1", port=mosquitto.port, topic="line/+/image")
    return Config(type="mqtt", name="top", broker=broker, retry_seconds=0.05, **given)


@pytest.fixture
def publish(mosquitto):
    """Function that publishes an image and waits until the broker has it."""
    clients = []

    def publish(content, **properties):
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        client.connect("127.0.0.1", mosquitto.port)
        client.loop_start()
        clients.append(client)
        given = Properties(PacketTypes.PUBLISH)
        given.UserProperty = list(properties.items())
        client.publish("line/4/image", content, qos=1, properties=given).wait_for_publish(10)

    yield publish
    for client in clients:
        client.disconnect()
        client.loop_stop()


def test_images_come_with_their_parts_also_after_the_broker_was_dead(run, mosquitto, publish, contents, service):
    runner = run(source(mosquitto))
    until(lambda: runner.state.text == "connected, no image yet")
    publish(contents[0], part="17", view="front")
    until(lambda: runner.counts["inspected"] == 1)
    publish(b"no image")
    until(lambda: runner.counts["inspected"] == 2)
    second, first = service.store.inspections(ALL, limit=9)
    assert (first.outcome.part_id, first.outcome.view, first.source) == ("17", "front", "mqtt")
    assert (second.outcome.verdict, second.outcome.part_id) == (None, None)
    mosquitto.stop()
    until(lambda: runner.state.status == "no images")
    assert f"127.0.0.1:{mosquitto.port} cannot be used" in runner.state.text
    mosquitto.start()
    until(lambda: runner.state.status != "no images")
    publish(contents[1])
    until(lambda: runner.counts["inspected"] == 3)
    runner.stop()
    again = run(source(mosquitto))  # a restart of ours
    until(lambda: again.state.status == "attention")
    publish(contents[2])
    until(lambda: again.counts["inspected"] == 1)
    assert check(source(mosquitto), seconds=0.1) == "connected, no image yet"


def test_larger_messages_than_allowed_do_not_arrive(start, mosquitto, publish, contents):
    service = start(max_image_bytes=100_000)
    runner = SourceRunner(source(mosquitto), service)
    runner.start()
    until(lambda: runner.state.status == "attention")
    publish(b"x" * 1_000_000)  # mosquitto does not send it, since it is larger than the packets of this client
    publish(b"x" * 110_000)
    publish(contents[0])
    until(lambda: runner.counts["inspected"] == 1)
    assert dict(runner.counts) == {"inspected": 1, "dropped": 1, "failed": 0, "missed": 0}
    runner.stop()


def test_a_flood_is_counted_exactly(run, mosquitto, contents):
    runner = run(source(mosquitto))
    until(lambda: runner.state.status == "attention")
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.connect("127.0.0.1", mosquitto.port)
    client.loop_start()
    for number in range(300):
        last = client.publish("line/4/image", contents[number % 6], qos=1)
    last.wait_for_publish(20)
    until(lambda: sum(runner.counts.values()) == 300)
    assert runner.counts["failed"] == 0
    assert runner.counts["inspected"] > 0
    client.disconnect()
    client.loop_stop()
