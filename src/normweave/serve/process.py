"""A server as a process: the socket, TLS, and an end in good order."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from normweave.errors import ConfigError
from normweave.serve.config import ServeConfig

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on, at any free port for 0.

    Raises:
        ConfigError: the address cannot be had.
    """
    listening = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ConfigError(
            f"Cannot listen on {host}, port {port}: {error}. Choose another --port, or stop what listens there."
        ) from error
    return listening


def check_certificate(certificate: Path, key: Path) -> None:
    """Try what will be needed, before anything else is done.

    Raises:
        ConfigError: it is no certificate with its key.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:  # ssl's own errors are of this kind
        raise ConfigError(
            f"{certificate} and {key} are no certificate with its key: {error}. Give two PEM files that may be read."
        ) from error


def run(
    app: FastAPI,
    listening: socket.socket,
    *,
    config: ServeConfig,
    certificate: tuple[Path, Path] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; then answer what was asked, and return.

    Args:
        certificate: of TLS, and its key.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=protocol_with_timeout(config.receive_seconds),
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=int(config.answer_seconds),
            limit_concurrency=config.max_clients,
            ssl_certfile=None if certificate is None else certificate[0],
            ssl_keyfile=None if certificate is None else str(certificate[1]),
        )
    )

    def stop(*_: Any) -> None:
        server.should_exit = True

    # uvicorn raises a signal again when it has stopped: it must not end the process before the store is closed.
    before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def protocol_with_timeout(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which would wait for ever for a request to begin, with an end to its patience.

    Args:
        seconds: for the head of the first request; a later one has up to twice as long.
    """
    parent: Any = AutoHTTPProtocol

    class Impatient(parent):  # type: ignore[misc]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.answered_before: Any = None
            self.look = self.loop.call_later(seconds, self.give_up)

        def connection_lost(self, exc: Exception | None) -> None:
            self.look.cancel()
            super().connection_lost(exc)

        def handle_websocket_upgrade(self, *event: Any) -> None:
            self.look.cancel()
            super().handle_websocket_upgrade(*event)

        def give_up(self) -> None:
            """Close a connection on which nothing is asked, now or when it was last looked at."""
            if self.cycle is None or (self.cycle.response_complete and self.cycle is self.answered_before):
                self.transport.close()
                return
            self.answered_before = self.cycle if self.cycle.response_complete else None
            self.look = self.loop.call_later(seconds, self.give_up)

    return Impatient
