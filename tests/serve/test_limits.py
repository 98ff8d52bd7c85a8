"""How much may arrive, spoken to as a server speaks: message by message."""

import asyncio
import json

import pytest

from normweave.serve.config import ServeConfig
from normweave.serve.limits import LimitsMiddleware


async def reads_all(scope, receive, send):
    """An application that answers with the number of bytes it got."""
    count, more = 0, True
    while more:
        message = await receive()
        count += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"referrer-policy", b"own")]})
    await send({"type": "http.response.body", "body": str(count).encode()})


async def answers_whatever_happens(scope, receive, send):
    """One that makes a 500 of every error."""
    try:
        await reads_all(scope, receive, send)
    except Exception:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"oops"})
        raise


class Request:
    """A request whose body comes in parts, each when it is let."""

    def __init__(self, limits, *, headers=()):
        self.parts = asyncio.Queue()
        self.sent = []
        scope = {"type": "http", "method": "POST", "path": "/", "headers": list(headers)}
        self.done = asyncio.ensure_future(limits(scope, self.parts.get, self.send))

    async def send(self, message):
        self.sent.append(message)

    async def part(self, size, *, last=False):
        await self.parts.put({"type": "http.request", "body": b"x" * size, "more_body": not last})
        await asyncio.sleep(0.01)

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None

    @property
    def headers(self):
        return dict(self.sent[0]["headers"])

    @property
    def body(self):
        return b"".join(message["body"] for message in self.sent[1:])


@pytest.fixture(params=[reads_all, answers_whatever_happens])
def limits(request):
    config = ServeConfig(max_request_bytes=100, max_arriving_bytes=150, receive_seconds=0.2)
    return LimitsMiddleware(request.param, config=config)


async def ended(request):
    """Wait for the answer; an application may raise what it answered."""
    await asyncio.wait([request.done], timeout=5)
    request.done.exception()
    return request.status


def test_what_fits_passes(limits):
    async def walk():
        request = Request(limits)
        await request.part(60)
        await request.part(40, last=True)
        assert await ended(request) == 200
        assert request.body == b"100"
        assert limits._arriving == 0
        assert request.headers[b"x-content-type-options"] == b"nosniff"
        assert request.headers[b"referrer-policy"] == b"own"

    asyncio.run(walk())


def test_a_body_that_grows_too_large_is_cut_off(limits):
    async def walk():
        request = Request(limits)
        await request.part(60)
        await request.part(41)
        assert await ended(request) == 413
        assert "more than 100 bytes" in json.loads(request.body)["error"]
        assert limits._arriving == 0

    asyncio.run(walk())


def test_a_body_that_says_that_it_is_too_large_is_not_read(limits):
    async def walk():
        request = Request(limits, headers=[(b"content-length", b"101")])
        assert await ended(request) == 413
        assert request.headers[b"connection"] == b"close"

    asyncio.run(walk())


def test_all_together_are_bounded(limits):
    async def walk():
        first, second = Request(limits), Request(limits)
        await first.part(90)
        await second.part(70)
        assert await ended(second) == 429
        assert second.headers[b"retry-after"] == b"1"
        await first.part(10, last=True)
        assert await ended(first) == 200
        third = Request(limits)
        await third.part(100, last=True)
        assert await ended(third) == 200

    asyncio.run(walk())


def test_a_body_that_does_not_come(limits):
    async def walk():
        request = Request(limits)
        await request.part(10)
        assert await ended(request) == 408
        assert "had not arrived after 0.2 s" in json.loads(request.body)["error"]

    asyncio.run(walk())


def test_a_slow_answer_is_no_slow_request():
    async def slow(scope, receive, send):
        await receive()
        waiting = asyncio.ensure_future(receive())  # for the client to go away, as frameworks do
        await asyncio.sleep(0.5)
        waiting.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def walk():
        request = Request(LimitsMiddleware(slow, config=ServeConfig(receive_seconds=0.2)))
        await request.part(1, last=True)
        assert await ended(request) == 200

    asyncio.run(walk())


def test_an_error_of_the_application_is_its_own():
    async def broken(scope, receive, send):
        raise ValueError("broken")

    async def walk():
        request = Request(LimitsMiddleware(broken, config=ServeConfig()))
        with pytest.raises(ValueError, match="broken"):
            await request.done

    asyncio.run(walk())
