"""Events reach another server at least once and in order, whatever it does meanwhile."""

import socket
import threading

import pytest

from normweave.errors import ConfigError
from normweave.serve.webhook import FIRST_WAIT, LONGEST_WAIT, MOST_WAITING, Webhook
from receiver import Receiver


@pytest.fixture
def receiver():
    made = []

    def start(*statuses):
        made.append(Receiver(*statuses))
        return made[-1]

    yield start
    for each in made:
        each.close()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_events_are_sent_in_their_order_as_json(receiver):
    other = receiver()
    webhook = Webhook(other.url)
    webhook.add({"number": 1, "cause": "focus or dirt"})
    webhook.add({"number": 2})
    assert webhook.deliver()
    assert other.got == [{"number": 1, "cause": "focus or dirt"}, {"number": 2}]
    assert other.headers[0]["Content-Type"] == "application/json"
    assert webhook.waiting == []
    assert not webhook.deliver()


@pytest.mark.parametrize("status", [500, 404, 307])
def test_a_refused_event_is_sent_again_after_a_wait(receiver, status):
    other, clock = receiver(status), Clock()
    webhook = Webhook(other.url, clock=clock)
    webhook.add({"number": 1})
    webhook.add({"number": 2})
    assert not webhook.deliver()
    assert not webhook.deliver()  # too early
    assert len(other.got) == 1
    clock.now = FIRST_WAIT
    assert webhook.deliver()
    assert other.got == [{"number": 1}, {"number": 1}, {"number": 2}]


def test_the_wait_doubles_up_to_a_limit():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    clock = Clock()
    webhook = Webhook(url, clock=clock)
    webhook.add({})
    waits = []
    for _ in range(9):
        webhook.deliver()
        waits.append(webhook._next - clock.now)
        clock.now = webhook._next
    assert waits == [min(FIRST_WAIT * 2**n, LONGEST_WAIT) for n in range(9)]
    assert webhook.waiting == [{}]


def test_what_is_no_http_is_a_failure_too():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            connection, _ = other.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"hello\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        webhook = Webhook(f"http://127.0.0.1:{other.getsockname()[1]}")
        webhook.add({"number": 1})
        assert not webhook.deliver()
        thread.join()
    assert webhook.waiting == [{"number": 1}]


def test_only_so_many_events_wait(caplog):
    webhook = Webhook("http://127.0.0.1:9")
    webhook.restore({"number": number} for number in range(MOST_WAITING + 1))
    assert [event["number"] for event in webhook.waiting] == list(range(1, MOST_WAITING + 1))
    assert "dropped" in caplog.text


@pytest.mark.parametrize("url", ["line-4", "file:///etc/passwd", "https://", "ftp://host/x"])
def test_other_addresses_are_refused(url):
    with pytest.raises(ConfigError, match="like https"):
        Webhook(url)
