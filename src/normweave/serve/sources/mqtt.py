"""Images as MQTT messages: the payload is an image file. Part and view may be user properties (MQTT 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from normweave.serve.mqtt import Broker, Messages
from normweave.serve.pictures import frame
from normweave.serve.source import Frames, SourceConfig
from normweave.validation import checked


@checked
class Config(SourceConfig):
    """A topic of images."""

    type: Literal["mqtt"]
    broker: Broker


def frames(config: Config, *, max_bytes: int, on_drop: Callable[[int], None]) -> Frames:
    """Yield the latest image of the topic."""
    messages = Messages(config.broker, max_bytes=max_bytes, on_drop=on_drop)
    try:
        messages.start()
        yield None
        while True:
            message = messages.take(timeout=1.0)
            if message is None:
                yield None
            else:
                properties = message.properties
                yield frame(message.payload, part=properties.get("part"), view=properties.get("view"))
    finally:
        messages.stop()
