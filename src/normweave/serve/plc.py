"""A signal of a PLC, read by Modbus TCP in a thread of its own: its rising edges are counted until they are taken."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pymodbus.client import ModbusTcpClient
from pymodbus.exceptions import ModbusException

from normweave.serve.trigger import ModbusTrigger

_REASONS = {
    1: "it has no registers of this type (illegal function)",
    2: "it has no such address (illegal data address): check address, which counts from 0",
    3: "it refuses the value or the number of registers (illegal data value)",
    4: "it has failed (device failure): see its diagnosis",
    6: "it is busy (device busy)",
    10: "the gateway has no path to it: check device_id",
    11: "the device behind the gateway does not answer: check device_id",
}
"""What the exception codes of Modbus mean."""


def reason(answer: Any) -> str:
    """Return what the exception of a PLC means, and what to do."""
    code = getattr(answer, "exception_code", None)
    return f"{_REASONS.get(code, 'exception')}, exception code {code}" if code else str(answer)


class RisingEdges:
    """The rising edges of a bit of a PLC. A level that is high when the connection begins is no edge.

    Args:
        config: where the bit is.
    """

    def __init__(self, config: ModbusTrigger) -> None:
        self._config = config
        self._client = ModbusTcpClient(config.host, port=config.port, timeout=config.timeout_seconds, retries=0)
        self._lock = threading.Lock()
        self._count = 0
        self._error: OSError | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="modbus trigger", daemon=True)

    def start(self) -> None:
        """Connect, read the level, and follow it in a thread.

        Raises:
            OSError: the PLC does not answer, or refuses.
        """
        try:
            if not self._client.connect():  # type: ignore[no-untyped-call]
                raise OSError(f"{self._where} cannot be reached. Check host and port, and that the PLC runs.")
            self._high = self._read()
        except BaseException:
            self._client.close()  # type: ignore[no-untyped-call]
            raise
        self._thread.start()

    def take(self) -> int:
        """Return the number of edges since the last call.

        Raises:
            OSError: the connection was lost.
        """
        with self._lock:
            count, self._count = self._count, 0
        if not count:
            self.check()
        return count

    def check(self) -> None:
        """Raise OSError if the connection was lost."""
        with self._lock:
            if self._error is not None:
                raise self._error

    def stop(self) -> None:
        """End the thread and the connection."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._client.close()  # type: ignore[no-untyped-call]

    def _run(self) -> None:
        while not self._stopped.wait(self._config.poll_seconds):
            try:
                high = self._read()
            except OSError as error:
                with self._lock:
                    self._error = error
                return
            if high and not self._high:
                with self._lock:
                    self._count += 1
            self._high = high

    @property
    def _where(self) -> str:
        config = self._config
        return f"The trigger at {config.host}, port {config.port},"

    def _read(self) -> bool:
        config, client = self._config, self._client
        read: dict[str, Callable[..., Any]] = {
            "coil": client.read_coils,
            "discrete_input": client.read_discrete_inputs,
            "holding_register": client.read_holding_registers,
            "input_register": client.read_input_registers,
        }
        try:
            answer = read[config.signal](config.address, count=1, device_id=config.device_id)
        except (ModbusException, OSError) as error:  # such as a connection that the PLC has reset
            raise OSError(f"{self._where} does not answer: {error}. Check the network and device_id.") from error
        if answer.isError():
            raise OSError(
                f"{self._where} does not read the {config.signal} {config.address}: {reason(answer)}. Check signal, "
                "address and device_id."
            )
        if config.signal in ("coil", "discrete_input"):
            return bool(answer.bits[0])
        return bool(answer.registers[0] >> config.bit & 1)
