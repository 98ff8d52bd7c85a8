"""The stream of new inspections."""

import asyncio
import json
import threading

import httpx2
import pytest

from inspections import inspect_files, inspection
from normweave.serve import events
from normweave.serve.events import EventStreams
from normweave.serve.problems import ProblemError


async def take(stream, count):
    """Return the next inspections of a stream, by id."""
    found = {}
    async with asyncio.timeout(20):
        while len(found) < count:
            part = await anext(stream)
            if part.startswith("id:"):
                fields = dict(line.split(": ", 1) for line in part.strip().split("\n"))
                assert fields["event"] == "inspection"
                found[int(fields["id"])] = json.loads(fields["data"])
    return found


def test_a_stream_begins_with_the_next_inspection_or_after_an_id(service, photos, monkeypatch):
    monkeypatch.setattr(events, "CHUNK", 3)
    service.store.add([inspection(n, experts=()) for n in range(7)])

    async def walk():
        streams = EventStreams(service)
        old = await streams.start(2)
        assert list(await take(old, 5)) == [3, 4, 5, 6, 7]
        new = await streams.start(None)
        waiting = asyncio.ensure_future(take(new, 2))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(inspect_files, service, *photos[:2])
        assert list(await waiting) == [8, 9]
        assert list(await take(old, 2)) == [8, 9]
        await old.aclose()
        await new.aclose()
        assert service.listeners == set()

    asyncio.run(walk())


def test_heartbeats_and_the_end(service, monkeypatch):
    monkeypatch.setattr(events, "HEARTBEAT_SECONDS", 0.0)

    async def walk():
        streams = EventStreams(service)
        stream = await streams.start(None)
        assert await anext(stream) == "retry: 1000\n\n"
        assert await anext(stream) == ":\n\n"
        streams.end()
        assert [part async for part in stream] == []
        monkeypatch.setattr(events, "STREAM_SECONDS", 0.0)
        assert len([part async for part in await EventStreams(service).start(0)]) == 1

    asyncio.run(walk())


def test_the_number_of_streams_is_bounded(service, monkeypatch):
    monkeypatch.setattr(events, "MAX_STREAMS", 1)

    async def walk():
        streams = EventStreams(service)
        stream = await streams.start(None)
        await anext(stream)
        with pytest.raises(ProblemError, match="1 event streams are open, at most 1 may be"):
            await streams.start(None)
        await stream.aclose()
        first, second = await streams.start(None), await streams.start(None)  # at the same time
        await anext(first)
        assert await anext(second, None) is None

    asyncio.run(walk())


def test_a_client_that_connects_again_misses_nothing(live, service, keys, photos):
    headers = {"Authorization": f"Bearer {keys['operator']}"}
    with httpx2.Client(base_url=live, headers=headers, trust_env=False, timeout=20) as client:
        inspect_files(service, *photos[:3])

        def follow(last):
            with client.stream("GET", "/v1/inspections/events", headers={"Last-Event-ID": str(last)}) as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                for line in answer.iter_lines():
                    if line.startswith("id: "):
                        yield int(line[4:])

        stream = follow(0)
        assert [next(stream), next(stream)] == [1, 2]
        stream.close()
        thread = threading.Timer(0.2, inspect_files, args=(service, photos[3]))
        thread.start()
        stream = follow(2)
        assert [next(stream), next(stream)] == [3, 4]
        thread.join()
        stream.close()
        assert client.get("/v1/inspections/events", headers={"Last-Event-ID": "x"}).status_code == 422
