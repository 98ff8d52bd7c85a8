"""Webhook: events are sent to another server as JSON, again and again until it has taken them."""

from __future__ import annotations

import json
import logging
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from normweave.errors import ConfigError

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10.0
FIRST_WAIT, LONGEST_WAIT = 5.0, 300.0
"""Seconds until the next attempt after a failed one; the wait doubles each time."""
MOST_WAITING = 100
"""Events that wait; beyond it the oldest is dropped, with a warning."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An event is sent to the address that was configured, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def check_url(url: str) -> str:
    """Return an address of http or https.

    Raises:
        ConfigError: it is not such an address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"A webhook must be an address like https://host/path, got {url!r:.200}.")
    return url


def post(url: str, body: bytes, headers: Mapping[str, str], *, seconds: float) -> int:
    """Send JSON as the body of a POST request and return the status of the answer. Redirects are not followed.

    Args:
        seconds: time limit for each step of the connection.

    Raises:
        OSError, HTTPException: there is no answer, or it is not HTTP.
    """
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers}, method="POST")
    try:
        with _opener.open(request, timeout=seconds) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


class Webhook:
    """Sends events in their order, at least once, each as the body of a POST request.

    Not thread-safe: one thread adds and delivers.

    Args:
        url: http or https.
        clock: seconds, for the waits.

    Raises:
        ConfigError: not such an address.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = check_url(url)
        self._clock = clock
        self._waiting: deque[dict[str, Any]] = deque()
        self._wait, self._next = FIRST_WAIT, 0.0

    @property
    def waiting(self) -> list[dict[str, Any]]:
        """Events that were not taken yet, oldest first."""
        return list(self._waiting)

    def add(self, event: Mapping[str, Any]) -> None:
        """Add an event of JSON values."""
        if len(self._waiting) == MOST_WAITING:
            log.warning("The webhook has taken no event for long; the oldest is dropped: %s", self._waiting.popleft())
        self._waiting.append(dict(event))

    def restore(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Take over the events that waited before a restart."""
        for event in events:
            self.add(event)

    def deliver(self) -> bool:
        """Send what waits, unless it is too early after a failure; return whether anything was taken."""
        taken = False
        while self._waiting and self._clock() >= self._next:
            reason = self._send(self._waiting[0])
            if reason is None:
                self._waiting.popleft()
                self._wait, taken = FIRST_WAIT, True
                continue
            log.warning("The webhook has not taken an event: %s. Next attempt in %.0f s.", reason, self._wait)
            self._next = self._clock() + self._wait
            self._wait = min(2 * self._wait, LONGEST_WAIT)
        return taken

    def _send(self, event: Mapping[str, Any]) -> str | None:
        """Return why an event was not taken; None: it was."""
        try:
            status = post(self._url, json.dumps(event).encode(), {}, seconds=TIMEOUT_SECONDS)
        except (OSError, HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        return None if 200 <= status < 300 else f"status {status}"
