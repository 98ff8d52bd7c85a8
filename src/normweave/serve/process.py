"""The server process: socket, TLS, timeouts and orderly shutdown."""

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
    """Return a listening socket; port 0 selects a free port.

    Raises:
        ConfigError: the address is not valid or in use.
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
    """Check that TLS can use this certificate and key.

    Raises:
        ConfigError: they cannot be read or do not belong together.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:  # includes ssl.SSLError
        raise ConfigError(
            f"TLS cannot use the certificate {certificate} with the key {key}: {error}. Give two readable PEM files."
        ) from error


def run(
    app: FastAPI,
    listening: socket.socket,
    *,
    config: ServeConfig,
    certificate: tuple[Path, Path] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; then answer the open requests, and return.

    Args:
        certificate: the certificate for TLS and its key; None: no TLS.
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

    # uvicorn raises the signal again after stopping; this must not end the process before the store is closed.
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def protocol_with_timeout(seconds: float) -> type[asyncio.Protocol]:
    """Return the HTTP protocol of uvicorn with a time limit for the headers of a request, which uvicorn lacks.

    Args:
        seconds: limit for the first request of a connection; later requests have up to twice this time.
    """
    parent: Any = AutoHTTPProtocol

    class ProtocolWithTimeout(parent):  # type: ignore[misc]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.last_answered: Any = None
            self.timer = self.loop.call_later(seconds, self.close_if_idle)

        def connection_lost(self, exc: Exception | None) -> None:
            self.timer.cancel()
            super().connection_lost(exc)

        def handle_websocket_upgrade(self, *event: Any) -> None:
            self.timer.cancel()
            super().handle_websocket_upgrade(*event)

        def close_if_idle(self) -> None:
            """Close the connection if no request has begun since the check before."""
            if self.cycle is None or (self.cycle.response_complete and self.cycle is self.last_answered):
                self.transport.close()
                return
            self.last_answered = self.cycle if self.cycle.response_complete else None
            self.timer = self.loop.call_later(seconds, self.close_if_idle)

    return ProtocolWithTimeout
