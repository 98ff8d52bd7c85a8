"""MQTT 5: each message to a topic of the line with QoS 1, and a retained state with a last will."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import uuid
from typing import Annotated, Literal

import aiomqtt
from pydantic import AfterValidator, Field

from normweave.serve import mqtt, outputs
from normweave.serve.message import Message, slug
from normweave.serve.records import Subject
from normweave.validation import check, checked

TOPICS: dict[Subject, str] = {"inspections": "inspection", "parts": "part", "drift": "drift"}
"""Last level of the topic of each message."""


def _topic(value: str) -> str:
    check((not re.search(r"[+#\0]|^/|/$|//", value), f"must be a topic without +, # and empty levels, got {value!r}"))
    return value


@checked
class Config(outputs.OutputConfig, mqtt.Address):
    """A broker and a topic."""

    type: Literal["mqtt"]
    topic: Annotated[str, Field(max_length=200), AfterValidator(_topic)] = ""
    """First levels of the topics; empty: normweave/NAME-OF-THE-LINE. Below it: the `TOPICS`, state, heartbeat."""

    def rules(self) -> list[tuple[bool, str]]:
        """Return the rules of outputs and of addresses of brokers."""
        return [*outputs.OutputConfig.rules(self), *mqtt.Address.rules(self)]


class Output(outputs.Output):
    """Publishes messages to a broker. A message is delivered when the broker has acknowledged it."""

    config: Config
    cure = "Check host and port, username and password, tls and tls_ca, and that the broker runs."

    def __init__(self, config: Config, *, line: str) -> None:
        super().__init__(config, line=line)
        self.topic = config.topic or f"normweave/{slug(line)}"
        mqtt.read_files(config)  # so that the server does not start without them
        self._client: aiomqtt.Client | None = None
        self._connected = False
        self._ready: bool | None = None
        self._beats = 0

    async def connect(self) -> None:
        """Connect, and replace the retained state, which is `offline` after a lost connection."""
        self._client = self._make(f"normweave-{slug(self.line)}-{self.config.name}")
        await self._client.__aenter__()
        self._connected, self._ready = True, None
        await self.heartbeat(False)

    def _make(self, identifier: str, *, will: bool = True) -> aiomqtt.Client:
        # To connect has two steps, and should not be cancelled in one.
        last = aiomqtt.Will(f"{self.topic}/state", _state("offline", ready=False), qos=1, retain=True) if will else None
        return mqtt.client(self.config, seconds=self.config.timeout_seconds / 2, identifier=identifier, will=last)

    async def deliver(self, message: Message) -> None:
        """Publish a message."""
        await self._publish(TOPICS[message.subject], message.model_dump_json())

    async def heartbeat(self, ok: bool) -> None:
        """Publish a change of the state, and the next number of the heartbeat if the server can inspect."""
        if ok != self._ready:
            await self._publish("state", _state("online", ready=ok), retain=True)
            self._ready = ok
        if ok:
            self._beats += 1
            await self._publish("heartbeat", str(self._beats))

    async def check(self) -> None:
        """Publish a message to the topic `check`, as a client of its own."""
        async with self._make(f"normweave-check-{uuid.uuid4().hex[:8]}", will=False) as client:
            await client.publish(f"{self.topic}/check", "normweave doctor", qos=1)

    async def close(self) -> None:
        """Publish that the line is offline, and disconnect."""
        client, self._client = self._client, None
        if client is None:
            return
        try:
            if self._connected:
                await client.publish(f"{self.topic}/state", _state("offline", ready=False), qos=1, retain=True)
                await client.__aexit__(None, None, None)
        finally:
            self._connected = False
            _drop(client)

    async def _publish(self, topic: str, payload: str, *, retain: bool = False) -> None:
        assert self._client is not None  # connected
        await self._client.publish(f"{self.topic}/{topic}", payload, qos=1, retain=retain)


def _drop(client: aiomqtt.Client) -> None:
    """End a connection whose broker does not answer; aiomqtt would keep its socket and its task."""
    if isinstance(connection := client._client.socket(), socket.socket):
        with contextlib.suppress(OSError):  # it is closed already
            connection.shutdown(socket.SHUT_RDWR)
        client._client.loop_read()  # notices it


def _state(state: str, *, ready: bool) -> str:
    return json.dumps({"state": state, "ready": ready})
