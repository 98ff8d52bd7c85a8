"""The state of the outputs by REST, and dead letters that are sent again."""

from datetime import timedelta

import pytest
from starlette.testclient import TestClient

from counterparts import until
from inspections import NOON, inspection
from normweave.serve import create_app
from normweave.serve.delivery import Deliveries


@pytest.fixture
def clients(service, access, keys, receiver):
    """A client for each role."""
    outputs = Deliveries(service, [receiver.output(refusals=1)])
    app = create_app(service, access=access, outputs=outputs, pages=False)
    with TestClient(app) as client:
        yield {role: (client, {"Authorization": f"Bearer {secret}"}) for role, secret in keys.items()}


def test_outputs_start_and_stop_with_the_application(service, clients, receiver):
    client, headers = clients["operator"]
    receiver.statuses = [410]
    ids = [one.id for one in service.store.add([inspection(number) for number in range(2)])]
    for notify in service.listeners:
        notify()
    until(lambda: receiver.ids() == ids[1:])

    def state():
        answer = client.get("/v1/line", headers=headers)
        assert answer.status_code == 200
        return answer.json()

    until(lambda: state()["outputs"][0]["behind"] == 0)
    (output,) = state()["outputs"]
    assert state()["line"] == ""
    assert (output["name"], output["type"], output["status"], output["dead_letters"]) == (
        "webhook",
        "webhook",
        "behind",
        1,
    )

    (letter,) = client.get("/v1/line/outputs/webhook/dead-letters", headers=headers).json()["dead_letters"]
    assert (letter["inspection"], letter["message"]["data"]["id"], letter["again"]) == (ids[0], ids[0], False)
    assert client.post("/v1/line/outputs/webhook/send-again", headers=headers).status_code == 403
    client, headers = clients["engineer"]
    assert client.post("/v1/line/outputs/webhook/send-again", headers=headers).json() == {"count": 1}
    until(lambda: receiver.ids() == [ids[1], ids[0]])
    until(lambda: state()["outputs"][0]["status"] == "working")


def test_an_engineer_acknowledges_a_loss(service, clients, receiver):
    client, headers = clients["operator"]
    receiver.proxy.stop()
    service.store.add([inspection(number) for number in range(2)])
    list(service.store.expire(before=NOON + timedelta(days=1)))

    def removed():
        return client.get("/v1/line", headers=headers).json()["outputs"][0]["removed"]

    assert removed() == 2
    path = "/v1/line/outputs/webhook/acknowledge-removed"
    assert client.post(path, headers=headers).status_code == 403
    engineer = clients["engineer"][1]
    assert client.post(path, headers=engineer).json() == {"count": 2}
    assert removed() == 0
    audit = client.get("/v1/audit", headers=engineer).json()["entries"]
    assert [one["event"] for one in audit[:2]] == ["delivery_loss_acknowledged", "delivery_lost"]
    assert audit[0]["actor"] == "engineer"


def test_an_unknown_output_is_named(clients):
    client, headers = clients["engineer"]
    for answer in (
        client.get("/v1/line/outputs/other/dead-letters", headers=headers),
        client.post("/v1/line/outputs/other/send-again", headers=headers),
        client.post("/v1/line/outputs/other/acknowledge-removed", headers=headers),
    ):
        assert (answer.status_code, "no output 'other'" in answer.json()["detail"]) == (404, True)


def test_a_server_without_outputs(client):
    assert client.get("/v1/line").json() == {
        "line": "",
        "leads": True,
        "leader": None,
        "sources": [],
        "outputs": [],
    }
