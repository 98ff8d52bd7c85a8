"""Outputs for results, one module for each `type` of `outputs` in `line.yaml`.

A module has two classes: `Config`, its settings, and `Output`, which delivers messages. `normweave.serve.delivery`
calls it, in one event loop for all outputs.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator

from normweave.errors import ConfigError, NormweaveError
from normweave.outcome.parts import PartRule
from normweave.serve.line_config import EntryConfig, load
from normweave.serve.message import Message
from normweave.serve.records import Subject
from normweave.validation import PositiveFloat, check, checked, joined

T = TypeVar("T")


def _different(values: tuple[T, ...]) -> tuple[T, ...]:
    given = ", ".join(map(str, values)) or "none"
    check((0 < len(values) == len(set(values)), f"must name at least one, each once, got {given}"))
    return values


Results = Annotated[tuple[Literal["inspections", "parts"], ...], AfterValidator(_different)]
"""`deliver` of outputs that a machine reads."""


def age_rule(acknowledge: float, age: float) -> tuple[bool, str]:
    """Return the rule for `acknowledge_seconds` and `max_age_seconds`."""
    return (
        acknowledge <= age,
        f"acknowledge_seconds must be at most max_age_seconds, got {acknowledge:g} and {age:g}",
    )


class DeliveryError(NormweaveError):
    """The counterpart has not taken a message; the connection can be used again, and the message is sent again."""

    exit_code = 3


class RefusedError(DeliveryError):
    """The counterpart refuses this message, and would refuse it again."""


@checked
class OutputConfig(EntryConfig):
    """Settings of every output."""

    deliver: Annotated[tuple[Subject, ...], AfterValidator(_different)] = ("inspections",)
    """What is delivered: inspections, verdicts on parts, alarms of drift."""
    start: Literal["newest", "oldest"] = "newest"
    """Where a new output begins: after the newest that is stored, or with the oldest."""
    timeout_seconds: PositiveFloat = 5.0
    """Time limit of each step: to connect, to deliver a message, to close."""
    first_wait_seconds: PositiveFloat = 1.0
    """Wait after the first failure; it doubles with each further one. A random part of up to half is taken off."""
    longest_wait_seconds: PositiveFloat = 60.0
    heartbeat_seconds: PositiveFloat = 1.0
    """Time between two heartbeats."""

    needs_views: ClassVar[bool] = False
    """Whether a machine acts on the verdicts, so that parts need `parts.views`: without it none is known to be
    complete."""

    def rules(self) -> list[tuple[bool, str]]:
        """Return that no wait is longer than the longest."""
        first, longest = self.first_wait_seconds, self.longest_wait_seconds
        return [
            *super().rules(),
            (
                first <= longest,
                f"first_wait_seconds must be at most longest_wait_seconds, got {first:g} and {longest:g}",
            ),
        ]

    def contradictions(self, parts: PartRule) -> list[str]:
        """Return that the views of parts must be known, if they must and are not."""
        if parts.views is not None or not self.needs_views or "parts" not in self.deliver:
            return []
        return [
            "deliver has parts, so parts.views must name or number the expected views: without them no part is known "
            "to be complete, and none would ever be good. For example: parts: {views: 2}"
        ]


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
    def connect_seconds(self) -> float:
        """Time limit to connect."""
        return float(self.config.timeout_seconds)

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
        ConfigError: secrets or other files cannot be read, all together.
    """
    made, wrong = list[Output](), list[str]()
    for config in configs:
        try:
            made.append(load("outputs", config.type).Output(config, line=line))
        except ConfigError as error:
            wrong.append(f"{config.name}: {error}")
    if wrong:
        raise joined(wrong, source="outputs")
    return made


def check_free(host: str, port: int) -> None:
    """Check that this machine can listen on an address.

    Raises:
        OSError: it cannot.
    """
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(address[0], socket.SOCK_STREAM) as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(address[4])
    except OSError as error:
        raise OSError(
            f"this machine cannot listen on {host}, port {port}: {error.strerror or error}. host must be an address of "
            "this machine, and nothing else may use the port; those below 1024 need a right of the system"
        ) from error
