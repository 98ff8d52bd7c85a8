"""Outputs for results, one module for each `type` of `outputs` in `line.yaml`.

A module has two classes: `Config`, its settings, and `Output`, which delivers messages. `normweave.serve.delivery`
calls it, in one event loop for all outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from normweave.errors import NormweaveError
from normweave.serve.line_config import EntryConfig, load
from normweave.serve.message import Message
from normweave.validation import PositiveFloat, checked


class DeliveryError(NormweaveError):
    """The counterpart has not taken a message; the connection can be used again, and the message is sent again."""

    exit_code = 3


class RefusedError(DeliveryError):
    """The counterpart refuses this message, and would refuse it again."""


@checked
class OutputConfig(EntryConfig):
    """Settings of every output."""

    start: Literal["newest", "oldest"] = "newest"
    """Where a new output begins: after the newest stored inspection, or with the oldest one."""
    timeout_seconds: PositiveFloat = 5.0
    """Time limit of each step: to connect, to deliver a message, to close."""
    first_wait_seconds: PositiveFloat = 1.0
    """Wait after the first failure; it doubles with each further one. A random part of up to half is taken off."""
    longest_wait_seconds: PositiveFloat = 60.0
    heartbeat_seconds: PositiveFloat = 1.0
    """Time between two heartbeats."""


class Output(ABC):
    """Delivers messages to one counterpart. All methods are called in one event loop, and none may block it.

    Any exception but `DeliveryError` means that the connection is lost: then `close` and `connect` follow.

    Args:
        config: the settings, of the class `Config` of the module.
        line: name of the line.

    Attributes:
        attempts: after how many refusals (`RefusedError`) a message is set aside as a dead letter.
        cure: what to do when the counterpart does not answer, for `doctor --line`.
    """

    attempts: int = 1
    cure: ClassVar[str] = "Check the address, and that the counterpart runs."

    def __init__(self, config: Any, *, line: str) -> None:
        self.config = config
        self.line = line

    @property
    def deliver_seconds(self) -> float:
        """Time limit to deliver a message."""
        return float(self.config.timeout_seconds)

    @abstractmethod
    async def connect(self) -> None:
        """Connect, or start to listen. No result of an earlier connection may be readable as good afterwards."""

    @abstractmethod
    async def deliver(self, message: Message) -> None:
        """Deliver a message; return when the counterpart has taken it.

        Raises:
            DeliveryError: it has not.
        """

    async def heartbeat(self, ok: bool) -> None:  # noqa: B027 - not every protocol has one
        """Tell the counterpart whether the server can inspect and deliver. Called while connected."""

    async def check(self) -> None:
        """Connect and test the counterpart without a result that a machine would act on; for `doctor --line`."""
        await self.connect()

    @abstractmethod
    async def close(self) -> None:
        """Close the connection. Also called if `connect` has failed; may be called twice."""


def build(configs: Iterable[OutputConfig], *, line: str) -> list[Output]:
    """Return the outputs of a line.

    Raises:
        ConfigError: a secret cannot be read.
    """
    return [load("outputs", config.type).Output(config, line=line) for config in configs]
