"""A bundle at work: REST, a page for the line, and a store that loses nothing. No torch."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from normweave import __version__
from normweave.errors import ConfigError
from normweave.serve.access import Access, Gate
from normweave.serve.api import add_api
from normweave.serve.limits import Limits
from normweave.serve.station import Station
from normweave.serve.watch import Watch

FILES = "files"
DATABASE = "store.sqlite"
"""In the folder of a server, beside its files."""


def create_app(
    station: Station,
    *,
    access: Access | None,
    watch: Watch | None = None,
    pages: bool = True,
    secure: bool = False,
) -> FastAPI:
    """The application of a server; stopping it finishes what the station has taken.

    Args:
        access: None: no token is asked for.
        watch: followed from the start.
        pages: with the page for people; only one application of a process can have it.
        secure: it is reached over TLS, so that cookies may say so.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if watch is not None:
            watch.start()
        yield
        if watch is not None:
            watch.stop()
        await asyncio.to_thread(station.stop)

    app = FastAPI(
        title="normweave",
        version=__version__,
        summary="Visual inspection that learns from good parts only",
        lifespan=lifespan,
        docs_url=None,  # its page would ask another host for its scripts
        redoc_url=None,
    )
    add_api(app, station, access)
    if pages:
        from normweave.serve.pages import add_pages

        add_pages(app, station, watch=watch)
    app.add_middleware(Gate, access=access, secure=secure)
    app.add_middleware(Limits, config=station.config)  # the last one is the outermost
    return app


def run(
    app: FastAPI,
    listening: socket.socket,
    *,
    stop_seconds: float,
    max_clients: int,
    certificate: tuple[Path, Path] | None = None,
) -> None:
    """Serve until a signal says to stop; then answer what was asked, for at most so long, and end.

    Args:
        certificate: of TLS, and its key.
    """
    import uvicorn

    settings = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=int(stop_seconds),
        limit_concurrency=max_clients,
        ssl_certfile=None if certificate is None else certificate[0],
        ssl_keyfile=None if certificate is None else str(certificate[1]),
    )
    uvicorn.Server(settings).run(sockets=[listening])


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
        listening.listen(2048)
        listening.setblocking(False)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ConfigError(
            f"Cannot listen on {host}, port {port}: {error}. Choose another --port, or stop what listens there."
        ) from error
    return listening
