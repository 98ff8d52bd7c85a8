"""Real counterparts of outputs, and a proxy before them that can be dead, silent, slow, or send garbage."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiomqtt
import asyncua
import pytest
import standardwebhooks
from pymodbus.client import ModbusTcpClient
from pymodbus.exceptions import ModbusException

from inspections import inspection
from normweave.errors import ConfigError, NormweaveError
from normweave.serve import line_config
from normweave.serve.delivery import Deliveries
from normweave.serve.metrics import Metrics
from normweave.serve.outputs import modbus
from normweave.serve.part_store import PartStore
from normweave.serve.records import PartRecord
from normweave.serve.store import Store
from normweave.serve.verdict_codes import GOOD
from normweave.types import PartReason
from ports import free_port
from required import absent

SOON = 60.0
"""Seconds until something must have happened."""


def until(condition, what="it"):
    """Wait until a condition holds."""
    end = time.monotonic() + SOON
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} has not happened within {SOON:g} s"
        time.sleep(0.02)
    return found


class Station:
    """What deliveries need of an inspection service: a store of one line, listeners, and whether it can inspect."""

    def __init__(self, url, *, line="Press 5"):
        self.store = Store.open(url, line=line)
        self.metrics = Metrics(line=line)
        self.listeners = set()
        self.failure = None
        self.stored = 0

    def check_ready(self):
        if self.failure:
            raise NormweaveError(self.failure)

    def add(self, count=1, **changes):
        """Store inspections, and return their ids."""
        numbers = range(self.stored, self.stored + count)
        self.stored += count
        stored = self.store.add([inspection(number, **({"line": self.store.line} | changes)) for number in numbers])
        for notify in tuple(self.listeners):
            notify()
        return [one.id for one in stored]

    def add_part(self, part_id, *, verdict="normal", corrects=None, expected=2):
        """Store an image of a part and the verdict on it, or a correction, and return this."""
        seen = "normal" if verdict == "incomplete" else verdict
        (image,) = self.add(1, part_id=part_id, verdict=seen, received_at=datetime.now(UTC))
        record = PartRecord(
            at=datetime.now(UTC),
            part_id=part_id,
            line=self.store.line,
            verdict=verdict,
            reasons=() if verdict == "normal" else (PartReason("missing", None, None),),
            images=1,
            expected=expected,
            corrects=corrects,
        )
        parts = PartStore(self.store)
        stored = (
            parts.close(record, [image]) if corrects is None else parts.add_late(corrects, image, correction=record)
        )
        for notify in tuple(self.listeners):
            notify()
        return stored

    def begin(self, *outputs):
        """Start deliveries to these outputs."""
        deliveries = Deliveries(self, outputs)
        deliveries.start()
        return deliveries


def refusal(tmp_path, entry):
    """Return why the entry of an output is refused."""
    path = tmp_path / "line.yaml"
    path.write_text(f"outputs:\n- {{{entry}}}\n")
    with pytest.raises(ConfigError) as caught:
        line_config.read(path)
    return str(caught.value)


def make(type, *, line="Press 5", **settings):
    """Return an output with short waits."""
    short = {"timeout_seconds": 1.0, "first_wait_seconds": 0.05, "longest_wait_seconds": 0.2, "heartbeat_seconds": 0.1}
    module = line_config.load("outputs", type)
    return module.Output(module.Config(**({"type": type, "name": type} | short | settings)), line=line)


class Proxy:
    """A TCP proxy on a port that stays the same.

    Attributes:
        mode: pass; silent: connections are accepted and get nothing; garbage: they get random bytes.
    """

    def __init__(self, target):
        self._target, self.port, self.mode, self._listening = target, free_port(), "pass", None
        self._open = set()
        self.start()

    def start(self):
        self._listening = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()

    def switch(self, mode):
        """Change the mode, and end all connections."""
        self.mode = mode
        self._end()

    def stop(self):
        """Refuse connections from now on."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._end()

    def _end(self):
        for connection in tuple(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listening):
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            self._open.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, contextlib.suppress(OSError):
            if self.mode == "garbage":
                client.recv(4096)
                client.sendall(bytes(range(7, 250)) * 20)
                return
            if self.mode == "silent":
                while client.recv(4096):
                    pass
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                self._open.add(server)
                threading.Thread(target=self._copy, args=(server, client), daemon=True).start()
                self._copy(client, server)
        self._open.discard(client)

    def _copy(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class Counterpart:
    """What came, whatever the protocol.

    `results()`: of each message its type (or that of its data), the id, whether it is good, and the revision.
    """

    def ids(self):
        """Return the ids of the inspections that came, in their order."""
        return [id for of_part, id, _, _ in self.results() if not of_part]

    def parts(self):
        """Return id, whether it is good, and revision of the verdicts on parts that came, in their order."""
        return [one[1:] for one in self.results() if one[0]]


def read(message):
    """Return whether a message is of a part, its id, whether it is good, and its revision."""
    data = message["data"]
    good = data["verdict"] == "normal" and not data.get("corrected")
    return message["type"].startswith("part."), data["id"], good, data.get("revision", 0)


class Mosquitto(Counterpart):
    """The broker mosquitto, a proxy before it, and a subscriber behind it.

    Attributes:
        received: topic and text of each message.
    """

    type = "mqtt"

    def __init__(self, folder, *, settings="allow_anonymous true"):
        program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            absent("mosquitto", "mosquitto was not found: apt-get install mosquitto")
        self.port = free_port()
        configuration = folder / "mosquitto.conf"
        configuration.write_text(f"user root\nlistener {self.port} 127.0.0.1\n{settings}\n")
        self._process = subprocess.Popen([program, "-c", configuration], stderr=subprocess.DEVNULL)
        until(lambda: self._process.poll() is not None or answers(self.port), "the start of mosquitto")
        self.proxy = Proxy(self.port)
        self.received = []

    @property
    def pid(self):
        return self._process.pid

    def listen(self, *, tls=None, **login):
        """Subscribe to everything; `tls`: the certificate of the broker."""
        if tls is not None:
            login["tls_context"] = ssl.create_default_context(cafile=tls)
        self._subscribed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, kwargs=login)
        self._thread.start()
        assert self._subscribed.wait(SOON)

    def _run(self, **login):
        self._task = self._loop.create_task(self._subscribe(**login))
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    async def _subscribe(self, **login):
        async with aiomqtt.Client("127.0.0.1", self.port, protocol=aiomqtt.ProtocolVersion.V5, **login) as client:
            await client.subscribe("#", qos=1)
            self._subscribed.set()
            async for message in client.messages:
                self.received.append((str(message.topic), message.payload.decode()))

    def results(self):
        return [read(json.loads(text)) for topic, text in self.received if topic.endswith(("/inspection", "/part"))]

    def output(self, **settings):
        return make("mqtt", host="127.0.0.1", port=self.proxy.port, **settings)

    def close(self):
        self.proxy.stop()
        if hasattr(self, "_thread"):
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join()
        self._process.terminate()
        self._process.wait()


SECRET = "whsec_" + base64.b64encode(b"a secret of thirty two bytes ...").decode()


class Receiver(Counterpart):
    """An HTTP server that checks the signatures with the reference library, and a proxy before it.

    Attributes:
        statuses: answers of the next requests; then 204.
        received: headers and verified body of each request with the answer 204.
        refused: ids (`webhook-id`) of the other requests.
    """

    type = "webhook"

    def __init__(self, folder):
        self.statuses, self.received, self.refused, owner = [], [], [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = owner.statuses.pop(0) if owner.statuses else 204
                headers = {name.lower(): value for name, value in self.headers.items()}
                verified = standardwebhooks.Webhook(SECRET).verify(body, headers)
                if status == 204:
                    owner.received.append((headers, verified))
                else:
                    owner.refused.append(self.headers["webhook-id"])
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.proxy = Proxy(self._server.server_port)
        self._secret = folder / "secret"
        self._secret.write_text(SECRET)

    def listen(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def results(self):
        return [read(message) for _, message in self.received if message["type"] != "drift.alarm"]

    def output(self, **settings):
        url = f"http://127.0.0.1:{self.proxy.port}/events"
        return make("webhook", url=url, secret_file=str(self._secret), **settings)

    def close(self):
        self.proxy.stop()
        self._server.shutdown()
        self._server.server_close()


def answers(port):
    """Return whether something listens."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class Plc(Counterpart):
    """The program of a PLC: it reads the registers, and acknowledges each valid result.

    Attributes:
        taken: id, verdict, what it is of and revision of each result.
        acknowledges: whether it does.
    """

    type = "modbus"

    def __init__(self, folder):
        self.taken, self.acknowledges, self.seen = [], True, []

    def scan(self, registers, acknowledge):
        """Do what a PLC does in a cycle: `registers` as read; `acknowledge` writes the register."""
        self.seen.append(registers)
        _, _, status, sequence, high, low, verdict, _, _, of, revision, *_ = registers
        if status & modbus.VALID and self.acknowledges and registers[modbus.ACKNOWLEDGE] != sequence:
            self.taken.append((high << 16 | low, verdict, of, revision))
            acknowledge(sequence)

    def results(self):
        return [(of == modbus.OF_PART, id, verdict == GOOD, revision) for id, verdict, of, revision in self.taken]


class PlcServer(Plc):
    """A PLC whose registers normweave writes: a Modbus server of pymodbus in another process, and a proxy before it."""

    def __init__(self, folder):
        super().__init__(folder)
        self.port = free_port()
        self._process = subprocess.Popen([sys.executable, "-c", MODBUS_SERVER, str(self.port)])
        until(lambda: answers(self.port), "the start of the Modbus server")
        self.proxy = Proxy(self.port)

    def listen(self):
        self._ended = threading.Event()
        self._client = ModbusTcpClient("127.0.0.1", port=self.port)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._ended.wait(0.005):
            self.scan(
                self._client.read_holding_registers(100, count=modbus.COUNT).registers,
                lambda sequence: self._client.write_register(100 + modbus.ACKNOWLEDGE, sequence),
            )

    def output(self, **settings):
        short = {"acknowledge_seconds": 0.5, "max_age_seconds": 1e9}
        return make("modbus", role="client", host="127.0.0.1", port=self.proxy.port, address=100, **(short | settings))

    def close(self):
        self._ended.set()
        self._thread.join()
        self._client.close()
        self.proxy.stop()
        self._process.kill()
        self._process.wait()


class PlcClient(Plc):
    """A PLC that polls the registers of normweave, through a proxy."""

    def __init__(self, folder):
        super().__init__(folder)
        self.port = free_port()
        self.proxy = Proxy(self.port)

    def listen(self):
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._ended.is_set():
            client = ModbusTcpClient("127.0.0.1", port=self.proxy.port, timeout=0.5, retries=0)
            with contextlib.suppress(ModbusException, OSError):
                if client.connect():
                    while not self._ended.wait(0.005):
                        answer = client.read_holding_registers(0, count=modbus.COUNT)
                        if answer.isError():
                            break
                        self.scan(
                            answer.registers,
                            lambda sequence, to=client: to.write_register(modbus.ACKNOWLEDGE, sequence),
                        )
            client.close()
            self._ended.wait(0.02)

    def output(self, **settings):
        short = {"acknowledge_seconds": 0.5, "max_age_seconds": 1e9}
        return make("modbus", role="server", host="127.0.0.1", port=self.port, **(short | settings))

    def close(self):
        self._ended.set()
        self._thread.join()
        self.proxy.stop()


MODBUS_SERVER = """
import asyncio, sys
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

async def main():
    device = SimDevice(1, simdata=[SimData(100, count=17, values=0, datatype=DataType.REGISTERS)])
    await ModbusTcpServer(device, address=("127.0.0.1", int(sys.argv[1]))).serve_forever()

asyncio.run(main())
"""


OPCUA_PASSWORD = "correct horse battery"


class OpcuaClient(Counterpart):
    """A client of asyncua that subscribes to the events, and acknowledges each result; through a proxy.

    Attributes:
        taken: the events.
        acknowledges: whether it does.
    """

    type = "opcua"

    def __init__(self, folder):
        self.port = free_port()
        self.proxy = Proxy(self.port)
        self.taken, self.acknowledges = [], True
        self._password = folder / "opcua-password"
        self._password.write_text(OPCUA_PASSWORD)

    def listen(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        self._task = self._loop.create_task(self._follow())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    async def _follow(self):
        while True:
            with contextlib.suppress(Exception):
                await self._session()
            await asyncio.sleep(0.05)

    async def _session(self):
        client = asyncua.Client(f"opc.tcp://127.0.0.1:{self.proxy.port}/normweave", timeout=3, watchdog_intervall=0.5)
        client.set_user("line")
        client.set_password(OPCUA_PASSWORD)
        events = asyncio.Queue()

        class Handler:
            def event_notification(self, event):
                events.put_nowait(event)

        async with client:
            index = await client.get_namespace_index("urn:normweave:line")
            system = await client.nodes.objects.get_child(f"{index}:VisionSystem")
            results = await system.get_child(f"{index}:ResultManagement")
            event_type = await client.nodes.base_event_type.get_child(f"{index}:ResultReadyEventType")
            subscription = await client.create_subscription(20, Handler())
            await subscription.subscribe_events(system, event_type)
            while True:
                try:
                    async with asyncio.timeout(0.3):
                        event = await events.get()
                except TimeoutError:
                    await client.check_connection()
                    continue
                self.taken.append(event)
                if self.acknowledges:
                    # with asyncua's own limit: one around it, at the moment of the answer, would end this task
                    await results.call_method(f"{index}:AcknowledgeResults", [event.ResultId])

    def results(self):
        return [
            (
                one.ResultType.startswith("part."),
                one.InspectionId or one.PartVerdictId,
                one.VerdictCode == GOOD,
                one.Revision,
            )
            for one in tuple(self.taken)
        ]

    def output(self, **settings):
        short = {"acknowledge_seconds": 1.0, "max_age_seconds": 1e9, "timeout_seconds": 5.0, "security": "none"}
        login = {"username": "line", "password_file": str(self._password)}
        return make("opcua", host="127.0.0.1", port=self.port, **(login | short | settings))

    def close(self):
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
        self.proxy.stop()
