"""Webhook: each result as a signed POST request (https://www.standardwebhooks.com)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any, Literal
from urllib.parse import urlsplit

import standardwebhooks

from normweave.errors import ConfigError, reason
from normweave.serve import outputs
from normweave.serve.line_config import secret
from normweave.serve.message import Message
from normweave.validation import PositiveInt, checked

KEY_BYTES = 24, 64
"""Fewest and most bytes of a secret."""
AGAIN = (408, 425, 429)
"""Statuses 4xx after which the same request may succeed."""


@checked
class Config(outputs.OutputConfig):
    """An address and a secret."""

    type: Literal["webhook"]
    url: str
    secret_env: str = ""
    """Environment variable with the secret of the signature: `whsec_` and 24 to 64 bytes in base64."""
    secret_file: str = ""
    refusals: PositiveInt = 3
    """After how many refusals (status 4xx but 408, 425 and 429) a message becomes a dead letter."""

    def rules(self) -> list[tuple[bool, str]]:
        """Return that the address is one, and that there is one secret."""
        parts, env, file = urlsplit(self.url), self.secret_env, self.secret_file
        address = parts.scheme in ("http", "https") and bool(parts.hostname)
        return [
            *super().rules(),
            (address, f"url must be an address like https://host/path, got {self.url!r:.200}"),
            (bool(env or file), "secret_env or secret_file must be given: messages are signed"),
            (
                not (env and file),
                f"secret_env and secret_file are both given, got {env!r} and {file!r}. Keep one of them",
            ),
        ]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A message is sent to the address that was configured, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


class Output(outputs.Output):
    """Sends messages to another server, which has taken one when it answers 2xx."""

    config: Config
    cure = "Check url and secret, and that the other server runs."

    def __init__(self, config: Config, *, line: str) -> None:
        super().__init__(config, line=line)
        self.attempts = config.refusals
        self._signer = standardwebhooks.Webhook(_key(config))
        self._sending = False

    async def connect(self) -> None:
        """Do nothing: each message has a connection of its own."""

    async def deliver(self, message: Message) -> None:
        """Send a message. Its `webhook-id` is the same in each attempt."""
        await self._send(message.id, message.model_dump_json())

    async def check(self) -> None:
        """Send a message of the type line.test."""
        now = datetime.now(UTC)
        body = json.dumps({"type": "line.test", "timestamp": now.isoformat(), "data": {"line": self.line}})
        await self._send(f"test-{int(now.timestamp() * 1e6)}", body)

    async def close(self) -> None:
        """Do nothing."""

    async def _send(self, id: str, body: str) -> None:
        now = datetime.now(UTC)
        headers = {
            "webhook-id": id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._signer.sign(id, now, body),
        }
        seconds = self.config.timeout_seconds
        try:
            status = await self._in_thread(lambda: _post(self.config.url, body.encode(), headers, seconds=seconds))
        except (OSError, HTTPException) as error:
            raise outputs.DeliveryError(f"{self.config.url} does not answer: {reason(error)}. {self.cure}") from error
        if 400 <= status < 500 and status not in AGAIN:
            raise outputs.RefusedError(
                f"{self.config.url} refuses the message with status {status}. Look into the log of the other server."
            )
        if 300 <= status < 400:
            raise outputs.DeliveryError(
                f"{self.config.url} answers with status {status}, a redirect, which is not followed. Give the address "
                "that it leads to as url."
            )
        if not 200 <= status < 300:
            raise outputs.DeliveryError(
                f"{self.config.url} answers with status {status}. Look into the log of the other server."
            )

    async def _in_thread(self, work: Callable[[], int]) -> int:
        """Call `work` in a thread that nothing waits for: an answer that never ends must not keep the server."""
        if self._sending:
            raise outputs.DeliveryError(f"{self.config.url} has not ended its answer to the message before.")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[int] = loop.create_future()

        def settle(status: int | None, error: BaseException | None) -> None:
            if done.done():  # cancelled
                return
            if error is not None:
                done.set_exception(error)
            elif status is not None:
                done.set_result(status)

        def run() -> None:
            status, failure = None, None
            try:
                status = work()
            except BaseException as error:
                failure = error
            self._sending = False
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, status, failure)

        self._sending = True
        threading.Thread(target=run, name="webhook", daemon=True).start()
        return await done


def _key(config: Config) -> str:
    """Return the secret.

    Raises:
        ConfigError: it cannot be read, or is none as Standard Webhooks allows; the message does not have it.
    """
    given = secret("secret", env=config.secret_env, file=config.secret_file) or ""
    least, most = KEY_BYTES
    rule = f"The secret of the webhook {config.name} must be whsec_ and {least} to {most} random bytes in base64"
    cure = 'Make one with: echo "whsec_$(openssl rand -base64 32)"'
    try:
        size = len(base64.b64decode(given.removeprefix("whsec_"), validate=True))
    except ValueError:
        raise ConfigError(f"{rule}; this is no base64 text. {cure}") from None
    if not given.startswith("whsec_") or not least <= size <= most:
        began = "" if given.startswith("whsec_") else ", without whsec_"
        raise ConfigError(f"{rule}; this one has {size} bytes{began}. {cure}")
    return given


def _post(url: str, body: bytes, headers: Mapping[str, str], *, seconds: float) -> int:
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
