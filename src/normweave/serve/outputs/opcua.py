"""OPC UA server: state, heartbeat, the current result, an event for each result, and a method that acknowledges it.

Names are those of OPC 40100-1 (Machine Vision, control and configuration) where it has them; docs/reference/line.md
lists what is not as there. The verdict is good only from the moment a result is written until a client has
acknowledged it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from asyncua import Node, Server, ua, uamethod
from asyncua.crypto.permission_rules import USER_TYPES
from asyncua.server.user_managers import User, UserRole
from pydantic import Field

from normweave.serve import outputs
from normweave.serve.line_config import login_rules, secret
from normweave.serve.message import DriftMessage, Message, PartMessage
from normweave.serve.verdict_codes import NO_RESULT, verdict_code
from normweave.validation import PositiveFloat, checked, unused

NAMESPACE = "urn:normweave:line"
STATES = {True: ("Operational", "ContinuousExecution"), False: ("Error", "")}
"""Values of CurrentState and AutomaticModeState of a server that can inspect, or not."""
START_SECONDS = 60.0
"""Time limit to make the nodes and to listen. With less, a slow processor would start again for ever."""
CHANGES = (
    ua.NodeId(ua.ObjectIds.WriteRequest_Encoding_DefaultBinary),
    ua.NodeId(ua.ObjectIds.CallRequest_Encoding_DefaultBinary),
)
"""Requests that need a login."""
EVENT = ("ResultId", "ResultType", "InspectionId", "PartVerdictId", "Revision", "VerdictCode", "ResultContent")
"""Fields of the event of a result."""


@checked
class Config(outputs.OutputConfig):
    """An address to listen on, and the login that acknowledges results."""

    type: Literal["opcua"]
    host: str
    """Address of this machine to listen on."""
    port: Annotated[int, Field(ge=1, le=65535)] = 4840
    username: Annotated[str, Field(min_length=1)]
    """Login of the client that acknowledges results. Without a login, a client can only read."""
    password_env: str = ""
    password_file: str = ""
    security: Literal["sign_and_encrypt", "none"] = "sign_and_encrypt"
    """sign_and_encrypt: Basic256Sha256, with `certificate` and `private_key`; none: the password is sent openly."""
    certificate: str = ""
    """PEM or DER file of the certificate of this server."""
    private_key: str = ""
    deliver: outputs.Results = ("inspections",)
    acknowledge_seconds: PositiveFloat = 2.0
    """Time in which the client must acknowledge a result; then the result is taken back and written again."""
    max_age_seconds: PositiveFloat = 10.0
    """Age from which a good result is written as stale."""

    needs_views: ClassVar[bool] = True

    def rules(self) -> list[tuple[bool, str]]:
        """Return that there is a password, and that the files of the encryption are there if it is used."""
        files = bool(self.certificate and self.private_key)
        return [
            *super().rules(),
            *login_rules(self),
            (bool(self.password_env or self.password_file), "password_env or password_file must be given"),
            (
                files or self.security == "none",
                "certificate and private_key must be given with security sign_and_encrypt",
            ),
            *(unused(self, "certificate private_key", why="security none") if self.security == "none" else ()),
            outputs.age_rule(self.acknowledge_seconds, self.max_age_seconds),
        ]


class Output(outputs.Output):
    """Shows one result after the other; the next one follows when a client has acknowledged it."""

    config: Config
    cure = "Check host, port, certificate and private_key. A running server holds the port."

    def __init__(self, config: Config, *, line: str) -> None:
        super().__init__(config, line=line)
        self._password = secret("password", env=config.password_env, file=config.password_file) or ""
        self._server: Server | None = None
        self._nodes: dict[str, Node] = {}
        self._beats = 0
        self._acknowledged: dict[str, asyncio.Event] = {}

    @property
    def connect_seconds(self) -> float:
        """Time limit to start: the nodes are made here, which takes 2 s, and longer on a busy or slow processor."""
        return START_SECONDS + self.config.timeout_seconds

    @property
    def deliver_seconds(self) -> float:
        """Time limit to deliver a message: that of the acknowledgement, and some more."""
        return self.config.acknowledge_seconds + self.config.timeout_seconds

    async def connect(self) -> None:
        """Listen, with no result and not ready."""
        config = self.config
        outputs.check_free(config.host, config.port)  # before the nodes are made, which takes seconds
        self._server = server = Server(user_manager=_Users(config.username, self._password))
        with _uncollected():
            await server.init()
        server.set_server_name("normweave")
        server.set_endpoint(f"opc.tcp://{config.host}:{config.port}/normweave")
        policy = ua.SecurityPolicyType.NoSecurity
        if config.security == "sign_and_encrypt":
            policy = ua.SecurityPolicyType.Basic256Sha256_SignAndEncrypt
            await server.load_certificate(config.certificate)
            await server.load_private_key(config.private_key)
        server.set_security_policy([policy], permission_ruleset=_Rules())
        await self._add_nodes(server)
        await server.start()

    async def _add_nodes(self, server: Server) -> None:
        index = await server.register_namespace(NAMESPACE)
        system = await server.nodes.objects.add_object(index, "VisionSystem")
        results = await system.add_object(index, "ResultManagement")
        current = await results.add_object(index, "CurrentResult")
        variables: list[tuple[Node, str, Any, ua.VariantType]] = [
            (system, "Line", self.line, ua.VariantType.String),
            (system, "CurrentState", STATES[False][0], ua.VariantType.String),
            (system, "AutomaticModeState", STATES[False][1], ua.VariantType.String),
            (system, "Ready", False, ua.VariantType.Boolean),
            (system, "Heartbeat", self._beats, ua.VariantType.UInt32),
            (current, "ResultId", "", ua.VariantType.String),
            (current, "PartId", "", ua.VariantType.String),
            (current, "ResultType", "", ua.VariantType.String),
            (current, "InspectionId", 0, ua.VariantType.Int64),
            (current, "PartVerdictId", 0, ua.VariantType.Int64),
            (current, "Revision", 0, ua.VariantType.UInt16),
            (current, "VerdictCode", NO_RESULT, ua.VariantType.UInt16),
            (current, "ResultContent", "", ua.VariantType.String),
        ]
        for parent, name, value, type in variables:
            self._nodes[name] = await parent.add_variable(ua.NodeId(name, index), f"{index}:{name}", value, type)
        text, id, number = ua.VariantType.String, ua.VariantType.Int64, ua.VariantType.UInt16
        types = dict(zip(EVENT, (text, text, id, id, number, number, text), strict=True))
        event = await server.create_custom_event_type(
            index, "ResultReadyEventType", ua.ObjectIds.BaseEventType, list(types.items())
        )
        self._events = await server.get_event_generator(event, system)

        def acknowledge(_: Any, ids: list[str]) -> int:
            for id in ids or []:
                if (waiting := self._acknowledged.get(str(id))) is not None:
                    waiting.set()
            return 0

        await results.add_method(
            ua.NodeId("AcknowledgeResults", index), f"{index}:AcknowledgeResults", uamethod(acknowledge),
            [ua.VariantType.String], [ua.VariantType.Int32],
        )  # fmt: skip

    async def deliver(self, message: Message) -> None:
        """Show a result, send its event, and wait until a client has acknowledged it."""
        assert not isinstance(message, DriftMessage)  # the settings refuse it
        code, part = verdict_code(message, max_age=self.config.max_age_seconds), isinstance(message, PartMessage)
        shown = {
            "ResultId": message.id,
            "ResultType": message.type,
            "PartId": message.data.part_id or "",
            "InspectionId": 0 if part else message.data.id,
            "PartVerdictId": message.data.id if part else 0,
            "Revision": message.data.revision if isinstance(message, PartMessage) else 0,
            "ResultContent": message.model_dump_json(),
            "VerdictCode": code,  # last, so that the others belong to it
        }
        acknowledged = self._acknowledged[message.id] = asyncio.Event()
        try:
            for name, value in shown.items():
                await self._write(name, value)
            for name in EVENT:
                setattr(self._events.event, name, shown[name])
            await self._events.trigger(message=f"Result {message.id}")
            try:
                async with asyncio.timeout(self.config.acknowledge_seconds):
                    await acknowledged.wait()
            except TimeoutError:
                raise outputs.DeliveryError(
                    f"No client has acknowledged the result {message.id} within {self.config.acknowledge_seconds:g} s: "
                    f"a client must log in as {self.config.username} and call AcknowledgeResults with it."
                ) from None
        finally:
            del self._acknowledged[message.id]
            await self._write("VerdictCode", NO_RESULT)

    async def heartbeat(self, ok: bool) -> None:
        """Write whether the server is ready, and the next number if it is."""
        if ok:
            self._beats = (self._beats + 1) % 2**32
            await self._write("Heartbeat", self._beats)
        for name, value in zip(("CurrentState", "AutomaticModeState"), STATES[ok], strict=True):
            await self._write(name, value)
        await self._write("Ready", ok)

    async def close(self) -> None:
        """Stop to listen."""
        server, self._server = self._server, None
        if server is not None:
            gc.unfreeze()
            await server.stop()

    async def _write(self, name: str, value: Any) -> None:
        node = self._nodes[name]
        await node.write_value(value, await node.read_data_type_as_variant_type())


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Make the nodes of the standard, 100,000s of objects, without garbage collection.

    Each full collection would stop all threads for up to 0.3 s, also later: it leaves out what is here at the end.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


class _Users:
    """One login; without it, a client is anonymous. A wrong one is refused."""

    def __init__(self, name: str, password: str) -> None:
        self._name, self._password = name, password

    def get_user(
        self, iserver: Any, username: str | None = None, password: str | None = None, certificate: Any = None
    ) -> User | None:
        """Return the user of a login, or None."""
        if username is None:
            return User(role=UserRole.Anonymous)
        right = hmac.compare_digest((password or "").encode(), self._password.encode())
        return User(role=UserRole.User, name=username) if right and username == self._name else None


class _Rules:
    """Everyone may read and subscribe; writes and calls need the login."""

    def __init__(self) -> None:
        self._allowed = {ua.NodeId(one) for one in USER_TYPES}

    def check_validity(self, user: User, action_type_id: ua.NodeId, body: Any) -> bool:
        """Return whether a user may send a request."""
        return action_type_id in self._allowed and (user.role == UserRole.User or action_type_id not in CHANGES)
