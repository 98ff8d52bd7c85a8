"""Routes of the REST interface for the sources and outputs of a line."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from normweave.serve import delivery, source
from normweave.serve.delivery import Deliveries
from normweave.serve.message import Message
from normweave.serve.openapi import BODY, problem_responses
from normweave.serve.parameters import DEPENDENCIES, MAX_PAGE_SIZE, PAGE_SIZE, Engineer
from normweave.serve.service import InspectionService
from normweave.serve.source import SourceRunner

OutputName = Annotated[str, Path(max_length=60, description="`name` of an output.")]


class OutputOut(BaseModel):
    """What an output does."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    type: str
    status: Annotated[
        delivery.Status,
        Field(description="behind: it works, but has much to deliver, dead letters, or lost messages to retention."),
    ]
    behind: Annotated[int, Field(description="Messages that are not delivered yet.")]
    attempts: Annotated[int, Field(description="Failed attempts since the last success.")]
    last_error: Annotated[str | None, Field(description="Why the last attempt failed; null: it succeeded.")]
    last_success_at: datetime | None
    dead_letters: Annotated[int, Field(description="Messages that the counterpart has refused for good.")]
    removed: Annotated[
        int,
        Field(description="Messages that retention removed before they were delivered, since it was acknowledged."),
    ]


class SourceOut(BaseModel):
    """What a source does."""

    name: str
    type: str
    status: Annotated[
        source.Status,
        Field(
            description="running: images come; attention: connected, but see `text`; no images: not connected; idle: "
            "this server does not read it, but the one that leads the line."
        ),
    ]
    text: str
    inspected: int
    dropped: Annotated[int, Field(description="Frames that a newer one replaced before they were inspected.")]
    failed: Annotated[int, Field(description="Frames that could not be inspected.")]
    missed: Annotated[
        int, Field(description="Signals of a Modbus trigger that came before the frame of the one before.")
    ]

    @classmethod
    def of(cls, runner: SourceRunner) -> SourceOut:
        """Return the answer for a source."""
        status, text = runner.state
        config = runner.config
        return cls.model_validate(
            {"name": config.name, "type": config.type, "status": status, "text": text} | runner.counts
        )


class LeaderOut(BaseModel):
    """The server of a line that reads its sources, delivers to its outputs, and closes its parts."""

    model_config = ConfigDict(from_attributes=True)

    address: str
    since: datetime


class LineOut(BaseModel):
    """The sources and outputs of the line, in the order of line.yaml."""

    line: Annotated[str, Field(description="Name of the line.")]
    leads: Annotated[bool, Field(description="Whether this server leads the line; a single server does.")]
    leader: Annotated[
        LeaderOut | None,
        Field(description="The server that leads, of a line with several; null: there is one server, or none leads."),
    ]
    sources: list[SourceOut]
    outputs: list[OutputOut]


class DeadLetterOut(BaseModel):
    """A message that the counterpart of an output has refused for good."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    inspection: Annotated[
        int | None,
        Field(description="Id of the inspection, which retention may have removed; null: it is of a part or of drift."),
    ]
    at: datetime
    reason: str
    again: Annotated[bool, Field(description="Whether it is to be sent again.")]
    message: Annotated[Message, Field(discriminator="type")]


class DeadLettersOut(BaseModel):
    """Dead letters of an output, oldest first."""

    dead_letters: list[DeadLetterOut]


class AcknowledgedOut(BaseModel):
    """How many lost messages were acknowledged."""

    count: int


class SentAgainOut(BaseModel):
    """How many dead letters are sent again."""

    count: int


def line_routes(service: InspectionService, outputs: Deliveries, sources: Sequence[SourceRunner]) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["line"], dependencies=DEPENDENCIES, responses=problem_responses(401, 403, 422, 503))

    @router.get("/v1/line", summary="Read what the sources and outputs of the line do")
    async def line() -> LineOut:
        states = await asyncio.to_thread(outputs.states)
        leader = None if service.replica is None else await asyncio.to_thread(service.replica.leader)
        return LineOut(
            line=service.store.line,
            leads=service.replica is None or service.replica.leads,
            leader=None if leader is None else LeaderOut.model_validate(leader),
            sources=[SourceOut.of(one) for one in sources],
            outputs=[OutputOut.model_validate(one) for one in states],
        )

    @router.get(
        "/v1/line/outputs/{name}/dead-letters",
        summary="List the messages that the counterpart of an output has refused",
        responses=problem_responses(404),
    )
    async def dead_letters(
        name: OutputName, limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = PAGE_SIZE
    ) -> DeadLettersOut:
        found = await asyncio.to_thread(outputs.dead_letters, name, limit=limit)
        return DeadLettersOut(dead_letters=[DeadLetterOut.model_validate(one) for one in found])

    @router.post(
        "/v1/line/outputs/{name}/send-again",
        summary="Send the dead letters of an output again; for engineers",
        description="They come after newer inspections. Those that are refused again stay dead letters.",
        responses=problem_responses(*BODY, 404),
    )
    async def send_again(name: OutputName, engineer: Engineer) -> SentAgainOut:
        return SentAgainOut(count=await asyncio.to_thread(outputs.send_again, name))

    @router.post(
        "/v1/line/outputs/{name}/acknowledge-removed",
        summary="Acknowledge that messages were lost to retention; for engineers",
        description="`removed` counts from 0 again, and the audit keeps the number.",
        responses=problem_responses(*BODY, 404),
    )
    async def acknowledge_removed(name: OutputName, engineer: Engineer) -> AcknowledgedOut:
        count = await asyncio.to_thread(outputs.acknowledge_removed, name, actor=engineer.name, token=engineer.id)
        return AcknowledgedOut(count=count)

    return router
