"""MQTT: the client of sources, triggers and outputs; and, for sources and triggers, the latest message of a broker."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from normweave.errors import ConfigError, MissingError, reason
from normweave.serve.line_config import login_rules, secret
from normweave.validation import check, checked

if TYPE_CHECKING:
    import aiomqtt

QUEUE = 8
"""Messages that arrived and are not handed on yet; with more, the oldest is dropped."""
CONNECT_SECONDS = 5.0
"""Longest wait for a broker."""
HEADER_BYTES = 64 * 2**10
"""Bytes of a packet beyond its payload."""


@checked
class Address:
    """An MQTT broker, and a login."""

    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65535)] = 1883
    """8883 is usual with TLS."""
    username: str = ""
    password_env: str = ""
    """Environment variable of the password."""
    password_file: str = ""
    """File of the password."""
    tls: bool = False
    tls_ca: str = ""
    """PEM file of the authority that signed the broker's certificate; empty: those of the system."""
    tls_certificate: str = ""
    """PEM file of a certificate of this client, with `tls_key`."""
    tls_key: str = ""

    def __post_init__(self) -> None:
        check(*self.rules())

    def rules(self) -> list[tuple[bool, str]]:
        """Return the rules for the login, and for the files of TLS."""
        files = self.tls_ca or self.tls_certificate or self.tls_key
        return [
            *login_rules(self),
            (self.tls or not files, "tls must be true with tls_ca, tls_certificate or tls_key"),
            (bool(self.tls_certificate) == bool(self.tls_key), "tls_certificate and tls_key must be given together"),
        ]


@checked
class Broker(Address):
    """An MQTT broker and a topic."""

    topic: Annotated[str, Field(min_length=1)]
    """May have wildcards, + and #."""


def client(address: Address, *, seconds: float, **given: Any) -> aiomqtt.Client:
    """Return a client of MQTT 5 that is not connected yet; must be called from a running event loop.

    Args:
        seconds: time limit of each step.
        given: further arguments of `aiomqtt.Client`.

    Raises:
        ConfigError: the password or a file of TLS cannot be read.
    """
    import aiomqtt

    password, context = read_files(address)
    made = aiomqtt.Client(
        address.host,
        address.port,
        protocol=aiomqtt.ProtocolVersion.V5,
        username=address.username or None,
        password=password,
        timeout=seconds,
        keepalive=10,
        tls_context=context,
        **given,
    )
    made._client.connect_timeout = seconds  # aiomqtt has no argument for it
    return made


def read_files(address: Address) -> tuple[str | None, ssl.SSLContext | None]:
    """Return the password and the settings of TLS.

    Raises:
        ConfigError: one of their files cannot be read.
    """
    password = secret("password", env=address.password_env, file=address.password_file)
    if not address.tls:
        return password, None
    for name in ("tls_ca", "tls_certificate", "tls_key"):
        path = getattr(address, name)
        try:
            if path:
                Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"The file {path}, named by {name}, cannot be read: {error.strerror}. Correct {name}, or leave it out."
            ) from error
    try:
        context = ssl.create_default_context(cafile=address.tls_ca or None)
        if address.tls_certificate:
            context.load_cert_chain(address.tls_certificate, address.tls_key)
    except ssl.SSLError as error:
        raise ConfigError(
            "tls_ca, tls_certificate or tls_key has no certificate or key, or they do not belong together: "
            f"{error.reason or error}. Give PEM files."
        ) from error
    return password, context


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
        why = "no answer" if self._error is None else reason(self._error)
        return ConnectionError(f"{where} cannot be used: {why}. Check host, port, login and tls, and its log.")

    async def _run(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            async with self._client() as connected:
                await connected.subscribe(self._broker.topic, qos=1)
                with self._changed:
                    self._connected = True
                    self._changed.notify_all()
                async for message in connected.messages:
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
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = self._max_bytes + HEADER_BYTES
        dropped = self._on_drop

        class LatestMessages(asyncio.Queue[Any]):
            def put_nowait(self, item: Any) -> None:
                if self.full():
                    self.get_nowait()
                    dropped(1)
                super().put_nowait(item)

        return client(
            self._broker,
            seconds=CONNECT_SECONDS,
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
