"""Socket, TLS and timeouts; signals are tested in test_command.py."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn

from normweave.errors import ConfigError
from normweave.serve.config import ServeConfig
from normweave.serve.limits import LimitsMiddleware
from normweave.serve.process import MAX_HEADER_BYTES, check_certificate, listen, protocol_with_limits

MOST, LETTERS = 3000, b"a" * 65_536
"""Parts of an endless header, 200 MB; without a limit each of the last ones takes a tenth of a second."""


async def answers(scope, receive, send):
    """Minimal ASGI application."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


LARGE, ended = 50_000_000, []
"""Bytes of a large answer, and the requests for one that have ended."""


async def answers_at_length(scope, receive, send):
    """ASGI application whose answer to /large is large and sent in parts by the limits; it reads the body to /body."""
    if scope["type"] == "http" and scope["path"] == "/large":
        await LimitsMiddleware(large, config=ServeConfig())(scope, receive, send)
        ended.append(scope)
    else:
        while scope["path"] == "/body" and (await receive()).get("more_body"):
            pass
        await answers(scope, receive, send)


async def large(scope, receive, send):
    headers = [(b"content-length", str(LARGE).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(LARGE)})


@pytest.fixture
def port():
    """Port of a server with a timeout of 0.3 s for the request head."""
    with listen("127.0.0.1", 0) as listening:
        settings = uvicorn.Config(
            answers_at_length,
            http=protocol_with_limits(0.3, send_seconds=0.3),
            log_level="error",
            timeout_keep_alive=60,
        )
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


def closed_after(connection):
    begun = time.monotonic()
    connection.settimeout(10)
    while connection.recv(1000):
        pass
    return time.monotonic() - begun


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\n"])
def test_a_connection_without_a_complete_request_head_is_closed(port, head):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head)
        assert closed_after(connection) < 5


def test_a_connection_with_an_incomplete_second_request_is_closed(port):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in connection.recv(1000)
        time.sleep(0.1)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /")
        assert closed_after(connection) < 5


def answer_to(connection):
    """Return everything that the server sends until it closes the connection."""
    connection.settimeout(10)
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(2**20):
            received += part
    return received


def slowest_request(port, stop):
    """Send requests on new connections until `stop` is set; return the longest time of one."""
    slowest = 0.0
    while not stop.is_set():
        begun = time.monotonic()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert answer_to(connection).startswith(b"HTTP/1.1 200")
        slowest = max(slowest, time.monotonic() - begun)
    return slowest


@pytest.mark.parametrize(
    ("begin", "part"),
    [
        (b"GET / HTTP/1.1\r\nX: ", LETTERS),
        (b"GET /", LETTERS),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nX: ", LETTERS),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX: ", LETTERS),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 10_000),
        (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2_000),
    ],
    ids=["header", "url", "second request", "trailer", "small chunks", "requests"],
)
def test_an_endless_request_is_refused_and_delays_no_other_request(port, begin, part):
    stop, sent = threading.Event(), 0
    with ThreadPoolExecutor(1) as pool, socket.create_connection(("127.0.0.1", port)) as connection:
        slowest = pool.submit(slowest_request, port, stop)
        try:
            connection.sendall(begin)
            for _ in range(MOST):
                connection.sendall(part)
                sent += 1
        except OSError:  # the server has closed the connection
            pass
        finally:
            stop.set()
        assert slowest.result() < 2
    assert sent < MOST


@pytest.mark.parametrize("size", [500, 65_536])
def test_a_large_body_in_chunks_is_accepted(port, size):
    chunk = b"%x\r\n%s\r\n" % (size, b"b" * size)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /body HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(chunk * (10_000_000 // size) + b"0\r\n\r\n")
        assert answer_to(connection).startswith(b"HTTP/1.1 200 ")


def test_some_requests_ahead_of_their_answers_are_answered(port):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
        assert answer_to(connection).count(b"HTTP/1.1 200 ") == 10


def test_the_answer_to_too_large_headers(port):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * MAX_HEADER_BYTES)
        head, _, body = answer_to(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert b"content-type: application/problem+json" in head
    assert json.loads(body)["code"] == "headers_too_large"


def test_large_headers_below_the_limit_and_a_large_body_are_accepted(port):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 1000000\r\nX: "
        connection.sendall(head + b"a" * (MAX_HEADER_BYTES - 200) + b"\r\n\r\n" + b"b" * 1_000_000)
        assert answer_to(connection).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_does_not_read_is_closed_and_holds_little_memory(port):
    ended.clear()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        end = time.monotonic() + 10
        while not ended and time.monotonic() < end:
            time.sleep(0.02)
        assert ended
        assert len(answer_to(connection)) < LARGE


def test_a_client_that_reads_gets_a_large_answer(port):
    ended.clear()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert len(answer_to(connection).partition(b"\r\n\r\n")[2]) == LARGE


def test_a_port_in_use(port):
    with pytest.raises(ConfigError, match=f"Cannot listen on 127.0.0.1, port {port}: .*Choose another --port"):
        listen("127.0.0.1", port)


def test_an_invalid_certificate(tmp_path):
    with pytest.raises(ConfigError, match=r"TLS cannot use the certificate .*Give two readable PEM files"):
        check_certificate(tmp_path / "gone.pem", tmp_path / "key.pem")
    for name in ("a.pem", "b.pem"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match="TLS cannot use the certificate"):
        check_certificate(tmp_path / "a.pem", tmp_path / "b.pem")
