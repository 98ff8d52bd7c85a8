"""The server process: socket, TLS, timeouts and orderly shutdown."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import ssl
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from normweave.errors import ConfigError
from normweave.serve import problems
from normweave.serve.config import ServeConfig

BACKLOG = 2048
MAX_HEADER_BYTES = 32 * 2**10
BODY_SHARE = 32
"""Of a body in chunks, their sizes may take this part of its bytes, beyond `MAX_HEADER_BYTES`."""
MAX_PIPELINED = 16
"""Requests of one connection that wait for the answer to the one before."""
LINGER_SECONDS = 0.5
"""How long a connection with too large headers stays open after its answer."""


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
            http=protocol_with_limits(config.receive_seconds, send_seconds=config.send_seconds),
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
        app.state.streams.end()

    # uvicorn raises the signal again after stopping; this must not end the process before the store is closed.
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _TooManyRequestsError(Exception):
    """A connection has sent more than `MAX_PIPELINED` requests ahead of their answers."""


class LimitedProtocol(HttpToolsProtocol):
    """The HTTP protocol of uvicorn with limits of the bytes and the time for the headers of a request, which it lacks.

    The parser holds an unfinished header and copies it with every part that arrives, so an endless one would fill the
    memory and stop all other requests. Here at most `MAX_HEADER_BYTES` arrive that are neither complete headers nor a
    body (trailers and the sizes of chunks count, beyond a share of the body); then the answer is 431. A connection that
    sends more than `MAX_PIPELINED` requests ahead of their answers is closed.

    Attributes:
        seconds: time limit for the first request of a connection; later requests have up to twice this time.
        send_seconds: time limit for the client to read a part of an answer; then the connection is closed.
    """

    seconds: float
    send_seconds: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer."""
        super().connection_made(transport)
        self.last_answered: Any = None
        self.unfinished = 0
        self.refused = False
        self.stalled: asyncio.TimerHandle | None = None
        self.timer = self.loop.call_later(self.seconds, self.close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self.timer.cancel()
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        """Stop the timer; the connection now belongs to another protocol."""
        self.timer.cancel()
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        """Wait for a client that does not read, but not for ever: it holds memory and one of the connections."""
        super().pause_writing()
        self._stop_waiting()
        self.stalled = self.loop.call_later(self.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().resume_writing()

    def _stop_waiting(self) -> None:
        if self.stalled is not None:
            self.stalled.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse the bytes in parts, and refuse the request when too many of them complete nothing."""
        for start in range(0, len(data), MAX_HEADER_BYTES):
            if self.refused or self.transport.is_closing() or self.transport.get_protocol() is not self:
                return
            part = data[start : start + MAX_HEADER_BYTES]
            self.unfinished += len(part)
            super().data_received(part)
            if self.unfinished >= MAX_HEADER_BYTES:
                self.refuse_headers()

    def on_headers_complete(self) -> None:
        """Begin to count anew, and close a connection with too many requests; the exception stops the parser."""
        self.unfinished = 0
        if len(self.pipeline) >= MAX_PIPELINED:
            self.refused = True
            self.transport.abort()
            raise _TooManyRequestsError
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count no body, and less of the sizes of its chunks: each costs a call, so many small ones stop the server."""
        self.unfinished = max(0, self.unfinished - len(body) - len(body) // BODY_SHARE)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Begin to count anew."""
        self.unfinished = 0
        super().on_message_complete()

    def refuse_headers(self) -> None:
        """Answer 431, and close the connection a moment later, so that the client can read the answer.

        A request whose trailers do not end has an answer under way: then the connection is closed at once.
        """
        self.refused = True
        self.timer.cancel()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            return
        self.transport.pause_reading()
        detail = (
            f"The headers, or the sizes of the chunks of the body, have more than {MAX_HEADER_BYTES:,} bytes, the "
            "maximum of this server. Send fewer headers, or larger chunks."
        )
        body = json.dumps(problems.content(431, detail)).encode()
        head = f"content-type: {problems.MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\n" + head.encode() + body)
        self.timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def close_if_idle(self) -> None:
        """Close the connection if no request has begun since the check before."""
        if self.cycle is None or (self.cycle.response_complete and self.cycle is self.last_answered):
            self.transport.close()
            return
        self.last_answered = self.cycle if self.cycle.response_complete else None
        self.timer = self.loop.call_later(self.seconds, self.close_if_idle)


def protocol_with_limits(seconds: float, *, send_seconds: float) -> type[LimitedProtocol]:
    """Return the protocol with these time limits for the headers and for a client that reads."""
    return type("Protocol", (LimitedProtocol,), {"seconds": seconds, "send_seconds": send_seconds})
