"""Modbus TCP: each result in registers, of a PLC or of this server, with a handshake and a heartbeat.

The verdict is good only from the moment a result is written until the PLC has acknowledged it, at most
`acknowledge_seconds`. Before, after, and for good results older than `max_age_seconds` it never is.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from pymodbus.client import AsyncModbusTcpClient
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from normweave.serve import outputs
from normweave.serve.message import DriftMessage, InspectionMessage, Message, PartMessage
from normweave.serve.plc import reason
from normweave.serve.verdict_codes import NO_RESULT, verdict_code
from normweave.validation import PositiveFloat, checked

VERSION = 1
"""Version of the table of registers."""
HEARTBEAT, STATUS, SEQUENCE, RESULT = 1, 2, 3, 4
"""Offsets: the version is at 0; the result has the registers that `result` returns."""
VERDICT = 6
RESULT_COUNT = 9
OF_IMAGE, OF_PART = 0, 1
"""What a result is of."""
ACKNOWLEDGE = 16
"""Offset of the register that the PLC writes."""
COUNT = 17
READY, VALID = 1, 2
"""Bits of the status."""
AT_THRESHOLD = 1000
"""Value of the score at the threshold."""
POLL_SECONDS = 0.02
"""Time between two looks at the acknowledgement."""
READ, WRITE = 3, 16
"""Function codes: read holding registers, write multiple registers."""


@checked
class Config(outputs.OutputConfig):
    """A PLC, or an address to listen on."""

    type: Literal["modbus"]
    role: Literal["client", "server"]
    """client: write to registers of a PLC; server: hold the registers, which the PLC reads."""
    host: str
    """Of the PLC, or the address of this machine to listen on."""
    port: Annotated[int, Field(ge=1, le=65535)] = 502
    device_id: Annotated[int, Field(ge=1, le=247)] = 1
    address: Annotated[int, Field(ge=0, le=65536 - COUNT)] = 0
    """Of the first holding register, counted from 0."""
    deliver: outputs.Results = ("inspections",)
    acknowledge_seconds: PositiveFloat = 2.0
    """Time in which the PLC must acknowledge a result; then the result is taken back and written again."""
    max_age_seconds: PositiveFloat = 10.0
    """Age from which a good result is written as stale."""

    needs_views: ClassVar[bool] = True

    def rules(self) -> list[tuple[bool, str]]:
        """Return that a result is not older than good ones may be while it waits."""
        return [*super().rules(), outputs.age_rule(self.acknowledge_seconds, self.max_age_seconds)]


class Output(outputs.Output):
    """Writes one result after the other; the next one follows when the PLC has written its number."""

    config: Config
    cure = "Check host, port, device_id and address; with role server, that nothing else uses the port."

    def __init__(self, config: Config, *, line: str) -> None:
        super().__init__(config, line=line)
        self._registers: _Client | _Server | None = None
        self._sequence = self._beats = self._status = 0
        self._writes = False

    @property
    def deliver_seconds(self) -> float:
        """Time limit to deliver a message: that of the acknowledgement, and of the requests around it."""
        return self.config.acknowledge_seconds + self.config.timeout_seconds

    async def connect(self) -> None:
        """Connect or listen, and write that there is no result and the server is not ready."""
        await self._open()
        self._status, self._writes = 0, True
        await self._write(0, [VERSION, self._beats, 0, 0, *[0] * RESULT_COUNT])  # NO_RESULT is 0
        self._sequence = (await self._read(ACKNOWLEDGE))[0]

    async def _open(self) -> None:
        self._registers = _Client(self.config) if self.config.role == "client" else _Server(self.config)
        await self._registers.open()

    async def deliver(self, message: Message) -> None:
        """Write a result, and wait until the PLC has acknowledged it."""
        assert not isinstance(message, DriftMessage)  # the settings refuse it
        self._sequence = self._sequence % 0xFFFF + 1
        try:
            await self._write(SEQUENCE, [self._sequence, *result(message, max_age=self.config.max_age_seconds)])
            await self._set_status(VALID, on=True)
            try:
                async with asyncio.timeout(self.config.acknowledge_seconds):
                    while (await self._read(ACKNOWLEDGE))[0] != self._sequence:
                        await asyncio.sleep(POLL_SECONDS)
            except TimeoutError:
                raise outputs.DeliveryError(
                    f"The PLC has not acknowledged result {self._sequence} ({_what(message)} {message.data.id}) within "
                    f"{self.config.acknowledge_seconds:g} s: it must write {self._sequence} to register "
                    f"{self.config.address + ACKNOWLEDGE}."
                ) from None
        finally:
            await self._write(VERDICT, [NO_RESULT])
            await self._set_status(VALID, on=False)

    async def heartbeat(self, ok: bool) -> None:
        """Write the next number and that the server is ready; or only that it is not."""
        if ok:
            self._beats = (self._beats + 1) % 0x10000
            await self._write(HEARTBEAT, [self._beats])
        await self._set_status(READY, on=ok)

    async def check(self) -> None:
        """Read the registers, or listen for a moment. Writes nothing to a PLC."""
        await self._open()
        await self._read(0, COUNT)

    async def close(self) -> None:
        """Take back the result and the readiness, and close the connection."""
        registers = self._registers
        if registers is None:
            return
        try:
            if self._writes and self.config.role == "client" and registers.is_open:
                await self._write(STATUS, [0])
                await self._write(VERDICT, [NO_RESULT])
        finally:
            self._registers, self._writes = None, False
            await registers.close()

    async def _set_status(self, bit: int, *, on: bool) -> None:
        self._status = self._status | bit if on else self._status & ~bit
        await self._write(STATUS, [self._status])

    async def _read(self, offset: int, count: int = 1) -> list[int]:
        assert self._registers is not None  # connected
        return await self._registers.read(self.config.address + offset, count)

    async def _write(self, offset: int, values: Sequence[int]) -> None:
        assert self._registers is not None  # connected
        await self._registers.write(self.config.address + offset, list(values))


def result(message: InspectionMessage | PartMessage, *, max_age: float) -> list[int]:
    """Return the registers of a result.

    They are: id (high, low), verdict, score, number of boxes, what it is of, revision, id of the part as a number
    (high, low). The score is 1000 at the threshold, from 0 to 65535; 0 also without a score, and of a part. A good
    result older than `max_age` seconds is stale.
    """
    data = message.data
    verdict = verdict_code(message, max_age=max_age)
    score = boxes = revision = 0
    of = OF_IMAGE
    if isinstance(message, PartMessage):
        of, revision = OF_PART, min(message.data.revision, 0xFFFF)
    else:
        boxes = min(len(message.data.boxes), 0xFFFF)
        if message.data.score is not None and message.data.threshold is not None:
            # A share of the threshold, which is the same as score / threshold where this is above 0.
            beyond = (message.data.score - message.data.threshold) / max(abs(message.data.threshold), 1e-9)
            score = round(min(max(AT_THRESHOLD * (1 + beyond), 0), 0xFFFF))
    number = int(data.part_id) if data.part_id is not None and re.fullmatch("[0-9]{1,10}", data.part_id) else 0
    return [*_words(data.id), verdict, score, boxes, of, revision, *_words(number if number < 2**32 else 0)]


def _words(value: int) -> tuple[int, int]:
    """Return the high and the low 16 bits of the last 32."""
    return value >> 16 & 0xFFFF, value & 0xFFFF


def _what(message: InspectionMessage | PartMessage) -> str:
    return "verdict on a part" if isinstance(message, PartMessage) else "inspection"


class _Client:
    """Holding registers of a PLC."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._client = AsyncModbusTcpClient(
            config.host, port=config.port, timeout=config.timeout_seconds, retries=0, reconnect_delay=0
        )

    @property
    def is_open(self) -> bool:
        return bool(self._client.connected)

    async def open(self) -> None:
        if not await self._client.connect():
            raise OSError(f"no connection to {self._config.host}, port {self._config.port}")

    async def read(self, address: int, count: int) -> list[int]:
        answer = await self._client.read_holding_registers(address, count=count, device_id=self._config.device_id)
        self._check(answer, "read", address, count)
        if len(answer.registers) != count:
            raise OSError(f"the PLC has sent {len(answer.registers)} registers instead of {count}")
        return list(answer.registers)

    async def write(self, address: int, values: list[int]) -> None:
        answer = await self._client.write_registers(address, values, device_id=self._config.device_id)
        self._check(answer, "write", address, len(values))

    def _check(self, answer: Any, what: str, address: int, count: int) -> None:
        if answer.isError():
            registers = f"the holding registers {address} to {address + count - 1}"
            raise OSError(f"the PLC does not {what} {registers}: {reason(answer)}. Check address and device_id")

    async def close(self) -> None:
        self._client.close()


class _Server:
    """Holding registers of this server. A PLC can write only the acknowledgement with an effect."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._server: ModbusTcpServer | None = None

    @property
    def is_open(self) -> bool:
        return self._server is not None

    async def open(self) -> None:
        config = self._config
        outputs.check_free(config.host, config.port)  # pymodbus gives no reason why it cannot listen
        registers = SimData(config.address, count=COUNT, values=0, datatype=DataType.REGISTERS)
        device = SimDevice(config.device_id, simdata=[registers])
        self._server = ModbusTcpServer(device, address=(config.host, config.port))
        await self._server.serve_forever(background=True)

    async def read(self, address: int, count: int) -> list[int]:
        assert self._server is not None  # open
        return [
            int(value) for value in await self._server.async_getValues(self._config.device_id, READ, address, count)
        ]

    async def write(self, address: int, values: list[int]) -> None:
        assert self._server is not None  # open
        await self._server.async_setValues(self._config.device_id, WRITE, address, values)

    async def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await server.shutdown()  # type: ignore[no-untyped-call]
