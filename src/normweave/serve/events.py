"""New inspections as server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html

Nothing is queued for a client: each stream reads the store from the last inspection that it has sent. So a slow client
needs no memory, and one that reconnects with Last-Event-ID misses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from normweave.errors import NormweaveError
from normweave.serve import schemas
from normweave.serve.problems import ProblemError
from normweave.serve.records import Filter
from normweave.serve.service import InspectionService

MAX_STREAMS = 32
"""Streams at a time; further ones are refused."""
STREAM_SECONDS = 600.0
"""Length of a stream; the client then connects again, and its token is checked again."""
HEARTBEAT_SECONDS = 15.0
"""Longest time without a byte, so that proxies and clients see that the connection works."""
CHUNK = 100
"""Inspections read at a time."""
_TICK_SECONDS = 0.5
MEDIA_TYPE = "text/event-stream"


class EventStreams:
    """The event streams of one server."""

    def __init__(self, service: InspectionService) -> None:
        self._service = service
        self._count = 0
        self._ended = False

    def end(self) -> None:
        """End all streams soon, so that the server can stop; may be called from a signal handler."""
        self._ended = True

    async def start(self, after: int | None) -> AsyncIterator[str]:
        """Return a stream of the inspections with a higher id than `after`; None: of those stored from now on.

        Raises:
            ProblemError: there are too many streams.
            StoreError: the database failed.
        """
        if self._count >= MAX_STREAMS:
            raise ProblemError(
                503, f"{self._count} event streams are open, at most {MAX_STREAMS} may be.", code="too_many_streams"
            )
        if after is None:
            newest = await asyncio.to_thread(self._service.store.inspections, Filter(), limit=1)
            after = newest[0].id if newest else 0
        return self._stream(after)

    async def _stream(self, after: int) -> AsyncIterator[str]:
        if self._count >= MAX_STREAMS:  # others have begun since `start`; the client connects again and is refused
            return
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(news.set)

        end, last = loop.time() + STREAM_SECONDS, loop.time()
        self._count += 1
        self._service.listeners.add(notify)
        try:
            yield "retry: 1000\n\n"
            news.set()
            while not self._ended and loop.time() < end:
                if news.is_set():
                    news.clear()
                    try:
                        found = await asyncio.to_thread(
                            self._service.store.inspections, Filter(), after=after, limit=CHUNK
                        )
                    except NormweaveError:  # the client connects again
                        return
                    for one in found:
                        after, last = one.id, loop.time()
                        data = schemas.InspectionOut.of(one).model_dump_json()
                        yield f"id: {one.id}\nevent: inspection\ndata: {data}\n\n"
                    if len(found) == CHUNK:
                        news.set()
                    continue
                if loop.time() - last >= HEARTBEAT_SECONDS:
                    last = loop.time()
                    yield ":\n\n"
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TICK_SECONDS):
                        await news.wait()
        finally:
            self._service.listeners.discard(notify)
            self._count -= 1
