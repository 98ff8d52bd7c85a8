"""Binding of the socket of a page to the login that opened the page."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

import socketio
from nicegui import core
from nicegui.client import Client

_RELOAD = "Implicit handshake failed"
"""Reason for a refusal upon which the script of NiceGUI loads the page again."""


def bind_sockets() -> None:
    """Let a socket act on pages of its own login only; to be called once per process.

    NiceGUI passes an event to whatever page it names. After a log-out and a login of another person in the same
    browser, a tab that stayed open connects again with the new login: this must not act as the person before.
    """
    handlers = core.sio.handlers["/"]
    for event, handler in list(handlers.items()):
        if event == "connect":
            handlers[event] = _bound_connect(handler)
        elif event != "disconnect":
            handlers[event] = _bound_event(handler)


def _bound_connect(handler: Callable[..., Any]) -> Callable[..., Any]:
    async def connect(sid: str, environ: dict[str, Any], *rest: Any) -> Any:
        (page, *_) = parse_qs(environ.get("QUERY_STRING", "")).get("client_id", [""])
        if not may_act(page, environ):
            raise socketio.exceptions.ConnectionRefusedError(_RELOAD)
        return await _result(handler(sid, environ, *rest))

    return connect


def _bound_event(handler: Callable[..., Any]) -> Callable[..., Any]:
    async def act(sid: str, message: dict[str, Any]) -> Any:
        if not may_act(str(message.get("client_id", "")), core.sio.get_environ(sid) or {}):
            return False  # the answer to a handshake, upon which the browser loads the page again
        return await _result(handler(sid, message))

    return act


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def may_act(page: str, environ: dict[str, Any]) -> bool:
    """Return whether a socket has the login of a page.

    Args:
        page: id of the page (of NiceGUI's client); a page that does not exist any more is left to NiceGUI.
        environ: of the socket, which has the scope of its first request.
    """
    client = Client.instances.get(page)
    if client is None:
        return True
    return bool(_login(client.request.scope) == _login(environ.get("asgi.scope", {})))


def _login(scope: Any) -> Any:
    return scope.get("state", {}).get("login")
