"""Inspection server: REST interface, pages for operators and engineers, and a store of all results. No torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from normweave.serve.access import Access
from normweave.serve.api import add_api
from normweave.serve.authentication import AuthenticationMiddleware
from normweave.serve.delivery import Deliveries
from normweave.serve.drift import DriftWatch
from normweave.serve.handlers import HeadMiddleware
from normweave.serve.limits import LimitsMiddleware
from normweave.serve.parts import Parts
from normweave.serve.replicas import Replica
from normweave.serve.retention import Retention
from normweave.serve.service import InspectionService
from normweave.serve.source import SourceRunner
from normweave.serve.store import DATABASE as DATABASE
from normweave.serve.teach import Teaching
from normweave.serve.watch import Watch

FILES = "files"
"""Folder of the images, inside the data folder of a server."""
DRIFT = "drift.json"
"""State of the tests for drift, inside the data folder of a server."""
SEEN = "watched.sqlite"
"""SQLite file of the watched folder, inside the data folder of a server."""


def create_app(
    service: InspectionService,
    *,
    access: Access | None,
    watch: Watch | None = None,
    outputs: Deliveries | None = None,
    sources: Sequence[SourceRunner] = (),
    replica: Replica | None = None,
    pages: bool = True,
) -> FastAPI:
    """Return the ASGI application of a server. On shutdown it first finishes all accepted images.

    Args:
        access: None: requests need no token.
        watch: started and stopped with the application.
        outputs: started and stopped with the application; the last results are delivered.
        sources: started and stopped with the application.
        replica: outputs and sources are then started when this server becomes the leader; closed with the application.
        pages: add the pages for people; at most one application of a process can have them.
    """
    service.replica = replica
    drift = DriftWatch(service, service.folder / DRIFT, leads=lambda: replica is None or replica.leads)
    teaching = Teaching(service)
    parts = Parts(service)
    outputs = Deliveries(service, []) if outputs is None else outputs
    parts.listeners.add(outputs.notify)
    drift.listeners.add(outputs.notify)
    retention = Retention(service)

    def lead() -> None:
        retention.start()
        parts.start()
        outputs.start()
        for source in sources:
            source.start()
        service.metrics.leader.set(1)

    def lead_no_longer() -> None:
        service.metrics.leader.set(0)
        for source in sources:
            source.stop()
        outputs.stop(seconds=0)
        parts.stop()
        retention.stop()

    def follow() -> None:
        service.detectors.follow_rates()
        if service.models is not None:
            service.models.follow()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if watch is not None:
            watch.start()
        drift.start()
        if replica is None:
            lead()
        else:
            replica.start(news=service.notify, follow=follow, leads=lead, follows=lead_no_longer)
        yield
        if replica is not None:
            await asyncio.to_thread(replica.stop)
        for source in sources:
            await asyncio.to_thread(source.stop)
        if watch is not None:
            await watch.finish()
        await asyncio.to_thread(teaching.stop)
        await asyncio.to_thread(service.stop)
        await asyncio.to_thread(parts.stop)
        await asyncio.to_thread(retention.stop)
        await asyncio.to_thread(drift.stop)
        await asyncio.to_thread(outputs.stop)
        if replica is not None:
            await asyncio.to_thread(replica.close)
        if access is not None:
            await asyncio.to_thread(access.close)

    app = FastAPI(
        title="normweave",
        version=version("normweave"),
        summary="Visual inspection that learns from good parts only",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
    )
    add_api(app, service, access, watch, teaching, outputs, sources)
    if pages:
        from normweave.serve.pages import add_pages

        add_pages(
            app,
            service,
            access=access,
            watch=watch,
            drift=drift,
            teaching=teaching,
            outputs=outputs,
            sources=sources,
        )
    app.add_middleware(HeadMiddleware)
    app.add_middleware(AuthenticationMiddleware, access=access)
    app.add_middleware(LimitsMiddleware, config=service.config)  # the last middleware is the outermost
    return app
