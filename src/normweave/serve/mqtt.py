"""Messages of an MQTT broker, for sources and triggers: the latest one waits, a newer one replaces it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from normweave.errors import MissingError
from normweave.serve.line_config import secret
from normweave.validation import checked

if TYPE_CHECKING:
    import aiomqtt

QUEUE = 8
"""Messages that arrived and are not handed on yet; with more, the oldest is dropped."""
CONNECT_SECONDS = 5.0
"""Longest wait for a broker."""
HEADER_BYTES = 64 * 2**10
"""Bytes of a packet beyond its payload."""


@checked
class Broker:
    """An MQTT broker and a topic."""

    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65535)] = 1883
    topic: Annotated[str, Field(min_length=1)]
    """May have wildcards, + and #."""
    username: str = ""
    password_env: str = ""
    """Environment variable of the password."""
    password_file: str = ""
    """File of the password."""
    tls: bool = False
    ca_file: str = ""
    """PEM file of the certificate authority; empty: those of the system."""


class Message(NamedTuple):
    """A message of a topic."""

    topic: str
    payload: bytes
    properties: dict[str, str]
    """User properties (MQTT 5)."""


class Messages:
    """The latest message of a broker, read in a thread of its own.

    Args:
        max_bytes: larger messages are refused by the broker, which is told this size, or are dropped here.
        on_drop: called with the number of messages that a newer one has replaced, or that were too large.

    Raises:
        MissingError: aiomqtt is not installed.
    """

    def __init__(
        self, broker: Broker, *, max_bytes: int = 2**20, on_drop: Callable[[int], None] = lambda count: None
    ) -> None:
        if find_spec("aiomqtt") is None:
            raise MissingError('MQTT needs aiomqtt, which is not installed: pip install "normweave[line]"')
        self._broker = broker
        self._max_bytes = max_bytes
        self._on_drop = on_drop
        self._changed = threading.Condition()
        self._latest: Message | None = None
        self._connected = self._ended = False
        self._error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="mqtt", daemon=True)

    def start(self) -> None:
        """Connect, and return when the topic is subscribed.

        Raises:
            OSError: the broker refuses, or cannot be reached.
        """
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._connected or self._ended, 2 * CONNECT_SECONDS)
            if not self._connected:
                raise self._failure()

    def stop(self) -> None:
        """End the connection."""
        if self._loop is not None and self._task is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._task.cancel)
        if self._thread.ident is not None:
            self._thread.join(2 * CONNECT_SECONDS)

    def take(self, timeout: float = 0.0) -> Message | None:
        """Return the latest message that was not taken; None if none comes in this time.

        Raises:
            OSError: the connection was lost.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._latest is not None or self._ended, timeout)
            message, self._latest = self._latest, None
            if message is None and self._ended:
                raise self._failure()
        return message

    def check(self) -> None:
        """Raise OSError if the connection was lost and no message waits."""
        with self._changed:
            if self._ended and self._latest is None:
                raise self._failure()

    def _failure(self) -> OSError:
        where = f"The MQTT broker {self._broker.host}:{self._broker.port}"
        return ConnectionError(f"{where} cannot be used: {self._error or 'no answer'}. Check its address and log.")

    async def _run(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            async with self._client() as client:
                await client.subscribe(self._broker.topic, qos=1)
                with self._changed:
                    self._connected = True
                    self._changed.notify_all()
                async for message in client.messages:
                    self._put(message)
        except asyncio.CancelledError:
            pass
        except Exception as error:  # of any type: whoever waits must learn of it
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _client(self) -> aiomqtt.Client:
        import aiomqtt
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        broker = self._broker
        password = secret("password", env=broker.password_env, file=broker.password_file)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = self._max_bytes + HEADER_BYTES
        dropped = self._on_drop

        class LatestMessages(asyncio.Queue[Any]):
            def put_nowait(self, item: Any) -> None:
                if self.full():
                    self.get_nowait()
                    dropped(1)
                super().put_nowait(item)

        return aiomqtt.Client(
            broker.host,
            broker.port,
            username=broker.username or None,
            password=password,
            protocol=aiomqtt.ProtocolVersion.V5,
            timeout=CONNECT_SECONDS,
            keepalive=10,
            tls_context=ssl.create_default_context(cafile=broker.ca_file or None) if broker.tls else None,
            properties=properties,
            queue_type=LatestMessages,
            max_queued_incoming_messages=QUEUE,
        )

    def _put(self, message: aiomqtt.Message) -> None:
        payload = message.payload if isinstance(message.payload, bytes) else b""
        if message.retain or len(payload) > self._max_bytes:  # a retained one was there before, maybe for days
            self._on_drop(1)
            return
        given = {} if message.properties is None else dict(getattr(message.properties, "UserProperty", []))
        with self._changed:
            replaced = self._latest is not None
            self._latest = Message(str(message.topic), payload, given)
            self._changed.notify_all()
        if replaced:
            self._on_drop(1)
