"""Triggers: which frames of a source are inspected."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from normweave.errors import MissingError
from normweave.serve.mqtt import Broker, Messages
from normweave.validation import PositiveFloat, PositiveInt, check, checked

SMALL = 32
"""Height and width of the grey frames that are compared."""


@checked
class FrameTrigger:
    """Each frame is inspected."""

    type: Literal["frame"] = "frame"


@checked
class SecondsTrigger:
    """A frame is inspected every so many seconds."""

    type: Literal["seconds"]
    seconds: PositiveFloat = 1.0


@checked
class StillTrigger:
    """A frame is inspected when the scene stands still after it has moved."""

    type: Literal["still"]
    difference: PositiveFloat = 4.0
    """Mean difference of two successive grey frames of 32 x 32 pixels above which the scene moves, 0 to 255."""
    frames: PositiveInt = 5
    """The scene stands still after this many frames below the difference."""


@checked
class MessageTrigger:
    """The first frame after a message is inspected. The text of the message, if any, is the id of the part."""

    type: Literal["message"]
    broker: Broker


@checked
class ModbusTrigger:
    """The first frame after a bit of a PLC has risen is inspected."""

    type: Literal["modbus"]
    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65535)] = 502
    device_id: Annotated[int, Field(ge=0, le=255)] = 1
    signal: Literal["coil", "discrete_input", "holding_register", "input_register"] = "coil"
    """What the bit is, or is in."""
    address: Annotated[int, Field(ge=0, le=65535)] = 0
    """Counted from 0."""
    bit: Annotated[int, Field(ge=0, le=15)] = 0
    """Of a register; 0 is the lowest."""
    poll_seconds: PositiveFloat = 0.02
    """Time between two looks. The bit must be high, and low, for more than twice as long."""
    timeout_seconds: PositiveFloat = 1.0
    """Longest wait for an answer."""

    def __post_init__(self) -> None:
        check((not self.bit or self.signal.endswith("register"), f"bit has no effect with signal {self.signal}"))


_Config = FrameTrigger | SecondsTrigger | StillTrigger | MessageTrigger | ModbusTrigger
TriggerConfig = Annotated[_Config, Field(discriminator="type")]


class Trigger(ABC):
    """Chooses frames of one connection to a source, in their order."""

    part: str | None = None
    """Id of the part that the chosen frame shows, if the trigger names it."""
    missed: int = 0
    """Number of signals so far that have no frame of their own, since the next one came before it."""

    @abstractmethod
    def chooses(self, grey: NDArray[np.float32] | None, *, at: float) -> bool:
        """Return whether a frame is inspected.

        Args:
            grey: the frame, (SMALL, SMALL) from 0 to 255; None unless `needs_grey`.
            at: time of the frame in seconds.
        """

    needs_grey = False

    def check(self) -> None:  # noqa: B027 - most triggers hold nothing
        """Raise OSError if the connection of the trigger is lost. Called while no frame comes."""

    def close(self) -> None:  # noqa: B027 - most triggers hold nothing
        """End the connections of the trigger."""


class EveryFrame(Trigger):
    """Chooses each frame."""

    def chooses(self, grey: NDArray[np.float32] | None, *, at: float) -> bool:
        """Return True."""
        return True


class EverySeconds(Trigger):
    """Chooses the first frame, and then the first one after each interval."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next: float | None = None

    def chooses(self, grey: NDArray[np.float32] | None, *, at: float) -> bool:
        """Return whether the interval is over; intervals that were missed are not made up for."""
        if self._next is not None and at < self._next:
            return False
        due = at if self._next is None else self._next
        self._next = max(due + self._seconds, at) if at - due < self._seconds else at + self._seconds
        return True


class Still(Trigger):
    """Chooses the frame with which the scene stands still, once after each motion."""

    needs_grey = True

    def __init__(self, config: StillTrigger) -> None:
        self._config = config
        self._before: NDArray[np.float32] | None = None
        self._moved = False
        self._quiet = 0

    def chooses(self, grey: NDArray[np.float32] | None, *, at: float) -> bool:
        """Return whether the scene has moved and now stands still for `frames` frames."""
        assert grey is not None  # needs_grey
        before, self._before = self._before, grey
        if before is None:
            return False
        if float(np.abs(grey - before).mean()) > self._config.difference:
            self._moved, self._quiet = True, 0
            return False
        self._quiet += 1
        if not self._moved or self._quiet < self._config.frames:
            return False
        self._moved = False
        return True


class OnMessage(Trigger):
    """Chooses the first frame after each message; of several messages between two frames the last counts."""

    def __init__(self, config: MessageTrigger) -> None:
        self._messages = Messages(config.broker)
        self._messages.start()

    def chooses(self, grey: NDArray[np.float32] | None, *, at: float) -> bool:
        """Return whether a message has come since the frame before.

        Raises:
            OSError: the broker cannot be reached.
        """
        message = self._messages.take()
        if message is None:
            return False
        text = message.payload.decode("utf-8", "surrogateescape").strip()
        self.part = text[:500] or None
        return True

    def check(self) -> None:
        """Raise OSError if the connection to the broker is lost."""
        self._messages.check()

    def close(self) -> None:
        """End the connection to the broker."""
        self._messages.stop()


class OnRisingEdge(Trigger):
    """Chooses the first frame after each rising edge; of several between two frames, all but one are missed."""

    def __init__(self, config: ModbusTrigger) -> None:
        if find_spec("pymodbus") is None:
            raise MissingError(
                'A trigger by Modbus needs pymodbus, which is not installed: pip install "normweave[line]"'
            )
        from normweave.serve.plc import RisingEdges

        self._edges = RisingEdges(config)
        self._edges.start()

    def chooses(self, grey: NDArray[np.float32] | None, *, at: float) -> bool:
        """Return whether the bit has risen since the frame before.

        Raises:
            OSError: the PLC cannot be reached.
        """
        count = self._edges.take()
        self.missed += max(0, count - 1)
        return count > 0

    def check(self) -> None:
        """Raise OSError if the connection to the PLC is lost."""
        self._edges.check()

    def close(self) -> None:
        """End the connection to the PLC."""
        self._edges.stop()


def trigger(config: _Config) -> Trigger:
    """Return the trigger of these settings."""
    match config:
        case SecondsTrigger():
            return EverySeconds(config.seconds)
        case StillTrigger():
            return Still(config)
        case MessageTrigger():
            return OnMessage(config)
        case ModbusTrigger():
            return OnRisingEdge(config)
        case _:
            return EveryFrame()
