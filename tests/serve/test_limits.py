"""Limits of requests, tested with single ASGI messages."""

import asyncio
import json

import pytest
from starlette.requests import Request as StarletteRequest

from normweave.serve import limits as limits_module
from normweave.serve.config import ServeConfig
from normweave.serve.limits import LimitsMiddleware


async def reads_all(scope, receive, send):
    """ASGI application that answers the number of received bytes."""
    count, more = 0, True
    while more:
        message = await receive()
        count += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"referrer-policy", b"own")]})
    await send({"type": "http.response.body", "body": str(count).encode()})


async def answers_whatever_happens(scope, receive, send):
    """ASGI application that answers 500 to every error."""
    try:
        await reads_all(scope, receive, send)
    except Exception:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"oops"})
        raise


class Request:
    """Request whose body is sent in parts."""

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
    """Wait for the status of the answer; the application may also raise."""
    await asyncio.wait([request.done], timeout=5)
    request.done.exception()
    return request.status


def test_a_request_within_the_limits(limits):
    async def walk():
        request = Request(limits)
        await request.part(60)
        await request.part(40, last=True)
        assert await ended(request) == 200
        assert request.body == b"100"
        assert request.headers[b"x-content-type-options"] == b"nosniff"
        assert request.headers[b"referrer-policy"] == b"own"
        following = Request(limits)  # the bytes of the first request count no more
        await following.part(100, last=True)
        assert await ended(following) == 200

    asyncio.run(walk())


def test_a_body_that_exceeds_the_limit_is_refused(limits):
    async def walk():
        request = Request(limits)
        await request.part(60)
        await request.part(41)
        assert await ended(request) == 413
        assert "more than 100 bytes" in json.loads(request.body)["detail"]
        following = Request(limits)
        await following.part(100, last=True)
        assert await ended(following) == 200

    asyncio.run(walk())


def test_a_content_length_above_the_limit_is_refused_before_reading(limits):
    async def walk():
        request = Request(limits, headers=[(b"content-length", b"101")])
        assert await ended(request) == 413
        assert request.headers[b"connection"] == b"close"

    asyncio.run(walk())


def test_the_size_of_all_requests_is_limited(limits):
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


def test_a_body_that_does_not_arrive_in_time(limits):
    async def walk():
        request = Request(limits)
        await request.part(10)
        assert await ended(request) == 408
        assert "had not arrived after 0.2 s" in json.loads(request.body)["detail"]

    asyncio.run(walk())


def test_a_slow_answer_is_not_a_slow_request():
    async def slow(scope, receive, send):
        await receive()
        waiting = asyncio.ensure_future(receive())  # for the disconnect message, as frameworks do
        await asyncio.sleep(0.5)
        waiting.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def walk():
        request = Request(LimitsMiddleware(slow, config=ServeConfig(receive_seconds=0.2)))
        await request.part(1, last=True)
        assert await ended(request) == 200

    asyncio.run(walk())


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 25, 30])
def test_a_large_answer_is_sent_in_parts(monkeypatch, size):
    monkeypatch.setattr(limits_module, "PART_BYTES", 10)
    content = bytes(range(size))

    async def large(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content})

    async def walk():
        request = Request(LimitsMiddleware(large, config=ServeConfig()))
        assert await ended(request) == 200
        assert request.body == content
        assert [len(message["body"]) <= 10 for message in request.sent[1:]] == [True] * max(1, -(-size // 10))
        more = [message.get("more_body", False) for message in request.sent[1:]]
        assert more == [True] * (len(more) - 1) + [False]

    asyncio.run(walk())


def test_errors_of_the_application_are_raised():
    async def broken(scope, receive, send):
        raise ValueError("broken")

    async def walk():
        request = Request(LimitsMiddleware(broken, config=ServeConfig()))
        with pytest.raises(ValueError, match="broken"):
            await request.done

    asyncio.run(walk())


def test_a_client_that_leaves_in_the_middle_of_a_request_is_no_error():
    async def reads(scope, receive, send):
        await StarletteRequest(scope, receive).body()

    async def walk():
        request = Request(LimitsMiddleware(reads, config=ServeConfig()))
        await request.part(10)
        await request.parts.put({"type": "http.disconnect"})
        await asyncio.wait_for(request.done, timeout=5)
        assert request.sent == []

    asyncio.run(walk())


def test_every_answer_has_security_headers(browser):
    for path in ("/healthz", "/login", "/v1/model"):
        headers = browser.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "http" not in headers["content-security-policy"]
