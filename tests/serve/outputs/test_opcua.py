"""OPC UA: who may do what, the state, the events, and that nothing is good by default."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import asyncua
import pytest
from asyncua import ua

from counterparts import OPCUA_PASSWORD, OpcuaClient, make, refusal
from inspections import inspection
from normweave.errors import ConfigError
from normweave.serve.message import InspectionMessage
from normweave.serve.outputs import DeliveryError
from normweave.serve.verdict_codes import DEFECTIVE, GOOD, NO_RESULT
from required import absent

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries of asyncua
MESSAGE = InspectionMessage.of(inspection(id=7, line="Press 5", part_id="p1"))


@contextlib.asynccontextmanager
async def session(output, *, username="line", password=OPCUA_PASSWORD, security=None):
    """A client, and the nodes by their names."""
    client = asyncua.Client(f"opc.tcp://127.0.0.1:{output.config.port}/normweave", timeout=4)
    if username:
        client.set_user(username)
        client.set_password(password)
    if security:
        client.application_uri = "urn:example.org:FreeOpcUa:opcua-asyncio"
        await client.set_security_string(security)
    async with client:
        index = await client.get_namespace_index("urn:normweave:line")
        names = (
            "Ready",
            "Heartbeat",
            "CurrentState",
            "VerdictCode",
            "ResultId",
            "PartId",
            "InspectionId",
            "ResultContent",
        )
        nodes = {name: client.get_node(ua.NodeId(name, index)) for name in names}
        system = await client.nodes.objects.get_child(f"{index}:VisionSystem")
        results = await system.get_child(f"{index}:ResultManagement")

        async def acknowledge(id):
            return await results.call_method(f"{index}:AcknowledgeResults", [id])

        yield nodes, acknowledge


def run(work, output):
    async def whole():
        await output.connect()
        try:
            await work(output)
        finally:
            await output.close()

    asyncio.run(whole())


def test_a_result_is_shown_until_a_client_with_a_login_acknowledges_it(tmp_path):
    async def work(output):
        async with session(output) as (nodes, acknowledge), session(output, username="") as (anonymous, may_not):
            assert await nodes["Ready"].read_value() is False
            assert await nodes["VerdictCode"].read_value() == NO_RESULT
            await output.heartbeat(True)
            assert (await nodes["Ready"].read_value(), await nodes["Heartbeat"].read_value()) == (True, 1)
            assert await nodes["CurrentState"].read_value() == "Operational"
            await output.heartbeat(False)
            assert (await nodes["Ready"].read_value(), await nodes["Heartbeat"].read_value()) == (False, 1)
            assert await nodes["CurrentState"].read_value() == "Error"

            delivering = asyncio.create_task(output.deliver(MESSAGE))
            while await anonymous["VerdictCode"].read_value() != DEFECTIVE:
                await asyncio.sleep(0.01)
            shown = [await anonymous[name].read_value() for name in ("ResultId", "PartId", "InspectionId")]
            assert shown == [MESSAGE.id, "p1", 7]
            assert InspectionMessage.model_validate_json(await anonymous["ResultContent"].read_value()) == MESSAGE
            with pytest.raises(ua.UaStatusCodeError):
                await may_not(MESSAGE.id)
            for client in (anonymous, nodes):
                with pytest.raises(ua.UaStatusCodeError):
                    await client["VerdictCode"].write_value(1, ua.VariantType.UInt16)
            assert not delivering.done()
            await acknowledge("another")
            await acknowledge(MESSAGE.id)
            await delivering
            assert await nodes["VerdictCode"].read_value() == NO_RESULT

        with pytest.raises(ua.UaStatusCodeError):
            async with session(output, password="wrong"):
                pass

    run(work, OpcuaClient(tmp_path).output(acknowledge_seconds=5.0, max_age_seconds=1e9))


def test_encrypted_and_a_result_that_nobody_acknowledges_is_taken_back(tmp_path):
    files = {}
    for who, uri in (("server", "urn:freeopcua:python:server"), ("client", "urn:example.org:FreeOpcUa:opcua-asyncio")):
        files[who] = key, certificate = tmp_path / f"{who}-key.pem", tmp_path / f"{who}.pem"
        names = ["-subj", f"/CN={who}", "-addext", f"subjectAltName=URI:{uri},IP:127.0.0.1", "-days", "9"]
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate]
        subprocess.run([*command, *names], check=True, stderr=subprocess.DEVNULL)
    (key, certificate), (client_key, client_certificate) = files["server"], files["client"]
    output = OpcuaClient(tmp_path).output(
        security="sign_and_encrypt", certificate=str(certificate), private_key=str(key), acknowledge_seconds=0.2
    )
    encrypted = f"Basic256Sha256,SignAndEncrypt,{client_certificate},{client_key},{certificate}"

    async def work(output):
        with pytest.raises(ua.UaError):
            async with session(output):
                pass
        async with session(output, security=encrypted) as (nodes, _):
            with pytest.raises(DeliveryError, match="call AcknowledgeResults"):
                await output.deliver(MESSAGE)
            assert await nodes["VerdictCode"].read_value() == NO_RESULT

    run(work, output)


def node_finds(name):
    """Return whether node.js is installed and finds a package, for example in NODE_PATH."""
    if shutil.which("node") is None:
        return False
    return (
        subprocess.run(["node", "-e", f"require.resolve({name!r})"], stderr=subprocess.DEVNULL, check=False).returncode
        == 0
    )


def test_a_second_implementation_follows_and_acknowledges(tmp_path):
    """The client of node-opcua."""
    if not node_finds("node-opcua-client"):
        absent("node-opcua", "node-opcua-client was not found: npm install node-opcua-client, and set NODE_PATH")

    async def work(output):
        url = f"opc.tcp://127.0.0.1:{output.config.port}/normweave"
        command = ["node", Path(__file__).parent / "opcua_client.js", url, "line", OPCUA_PASSWORD, "3"]
        home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}  # it writes a certificate there
        client = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, env=os.environ | home)
        while not (line := await client.stdout.readline()).startswith(b"{"):
            assert line, "the client has ended"
        assert json.loads(line) == {"ready": False}
        for id in (1, 2, 3):
            message = InspectionMessage.of(inspection(id=id, line="Press 5", verdict="normal"))
            while True:
                with contextlib.suppress(DeliveryError):  # until it has subscribed
                    await output.deliver(message)
                    break
        lines, _ = await client.communicate()
        got = [json.loads(line) for line in lines.splitlines() if line.startswith(b"{")]
        assert [one["verdict"] for one in got] == [GOOD] * 3
        assert [one["status"] for one in got] == ["Good"] * 3
        assert client.returncode == 0

    run(work, OpcuaClient(tmp_path).output(acknowledge_seconds=2.0, max_age_seconds=1e9))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("username: a, security: none", "password_env or password_file must be given"),
        ("username: a, password_env: P", "certificate and private_key must be given with security sign_and_encrypt"),
        ("password_env: P, security: none", "outputs[0].username"),
        (
            "username: a, password_env: P, security: none, acknowledge_seconds: 20",
            "acknowledge_seconds must be at most max_age_seconds",
        ),
    ],
)
def test_wrong_settings_are_named(tmp_path, entry, words):
    assert words in refusal(tmp_path, f"type: opcua, name: scada, host: 127.0.0.1, {entry}")


def test_the_password_is_read_at_the_start(monkeypatch):
    monkeypatch.delenv("SCADA", raising=False)
    with pytest.raises(ConfigError, match="SCADA, named by password_env, is not set"):
        make("opcua", host="127.0.0.1", username="a", password_env="SCADA", security="none")
