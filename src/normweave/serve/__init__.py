"""A bundle at work: REST, a page for the line, and a store that loses nothing. No torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from normweave.serve.access import Access
from normweave.serve.api import add_api
from normweave.serve.authentication import AuthenticationMiddleware
from normweave.serve.limits import LimitsMiddleware
from normweave.serve.service import InspectionService
from normweave.serve.watch import Watch

FILES = "files"
DATABASE = "store.sqlite"
"""In the folder of a server, beside its files."""


def create_app(
    service: InspectionService,
    *,
    access: Access | None,
    watch: Watch | None = None,
    pages: bool = True,
) -> FastAPI:
    """The application of a server; stopping it finishes what the service has taken.

    Args:
        access: None: no token is asked for.
        watch: followed from the start.
        pages: with the page for people; only one application of a process can have it.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if watch is not None:
            watch.start()
        yield
        if watch is not None:
            watch.stop()
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="normweave",
        version=version("normweave"),
        summary="Visual inspection that learns from good parts only",
        lifespan=lifespan,
        docs_url=None,  # its page would ask another host for its scripts
        redoc_url=None,
    )
    add_api(app, service, access)
    if pages:
        from normweave.serve.pages import add_pages

        add_pages(app, service, watch=watch)
    app.add_middleware(AuthenticationMiddleware, access=access)
    app.add_middleware(LimitsMiddleware, config=service.config)  # the last one is the outermost
    return app
