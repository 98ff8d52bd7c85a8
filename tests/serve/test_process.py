"""Socket, TLS and timeouts; signals are tested in test_command.py."""

import socket
import threading
import time

import pytest
import uvicorn

from normweave.errors import ConfigError
from normweave.serve.process import check_certificate, listen, protocol_with_timeout


async def answers(scope, receive, send):
    """Minimal ASGI application."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port():
    """Port of a server with a timeout of 0.3 s for the request head."""
    with listen("127.0.0.1", 0) as listening:
        settings = uvicorn.Config(answers, http=protocol_with_timeout(0.3), log_level="error", timeout_keep_alive=60)
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
