"""A socket acts on pages of its own login only."""

from types import SimpleNamespace

import pytest
from nicegui.client import Client

from normweave.serve.pages.sockets import may_act


@pytest.mark.parametrize(
    ("page", "socket", "allowed"),
    [
        ({"state": {"login": "a"}}, {"asgi.scope": {"state": {"login": "a"}}}, True),
        ({"state": {"login": "a"}}, {"asgi.scope": {"state": {"login": "b"}}}, False),
        ({"state": {"login": "a"}}, {"asgi.scope": {}}, False),
        ({"state": {"login": "a"}}, {}, False),
        ({"state": {"login": ""}}, {"asgi.scope": {"state": {"login": ""}}}, True),  # a server without tokens
    ],
)
def test_the_login_of_the_page_counts(monkeypatch, page, socket, allowed):
    monkeypatch.setitem(Client.instances, "1", SimpleNamespace(request=SimpleNamespace(scope=page)))
    assert may_act("1", socket) == allowed
    assert may_act("2", socket)  # no such page: NiceGUI refuses it
