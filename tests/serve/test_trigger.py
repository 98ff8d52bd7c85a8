"""Which frames the triggers choose."""

import numpy as np
import pytest

from feeders import Mosquitto, until
from normweave.serve.mqtt import Broker
from normweave.serve.trigger import (
    SMALL,
    FrameTrigger,
    MessageTrigger,
    SecondsTrigger,
    StillTrigger,
    trigger,
)


def scene(level):
    return np.full((SMALL, SMALL), level, np.float32)


def test_every_frame():
    assert all(trigger(FrameTrigger()).chooses(None, at=0.0) for _ in range(3))


def test_seconds_keep_their_pace_and_do_not_make_up_for_a_gap():
    chooser = trigger(SecondsTrigger(type="seconds", seconds=1.0))
    chosen = [at for at in np.arange(0, 4, 0.3) if chooser.chooses(None, at=at)]
    np.testing.assert_allclose(chosen, [0.0, 1.2, 2.1, 3.0])
    assert [chooser.chooses(None, at=at) for at in (60.0, 60.3, 60.9, 61.0)] == [True, False, False, True]


def test_still_after_motion_is_chosen_once():
    chooser = trigger(StillTrigger(type="still", difference=4.0, frames=2))
    levels = [10, 10, 10, 50, 90, 91, 92, 92, 92, 50, 50, 50]
    assert [level for level in levels if chooser.chooses(scene(level), at=0.0)] == [92, 50]


def test_slow_change_of_light_is_no_motion():
    chooser = trigger(StillTrigger(type="still", frames=1))
    assert not any(chooser.chooses(scene(level), at=0.0) for level in range(0, 200, 3))


def test_a_message_chooses_one_frame_and_names_the_part(tmp_path):
    import paho.mqtt.publish as publish

    with Mosquitto(tmp_path) as mosquitto:
        broker = Broker(host="127.0.0.1", port=mosquitto.port, topic="line/trigger")
        chooser = trigger(MessageTrigger(type="message", broker=broker))
        assert not chooser.chooses(None, at=0.0)
        for text, part in ((" 17\n", "17"), ("", None)):
            publish.single("line/trigger", text, qos=1, hostname="127.0.0.1", port=mosquitto.port)
            until(lambda: chooser.chooses(None, at=0.0))
            assert chooser.part == part
            assert not chooser.chooses(None, at=0.0)
        chooser.check()
        mosquitto.stop()
        with pytest.raises(OSError, match="cannot be used"):
            until(lambda: chooser.chooses(None, at=0.0))
        with pytest.raises(OSError, match="cannot be used"):
            chooser.check()
        chooser.close()
