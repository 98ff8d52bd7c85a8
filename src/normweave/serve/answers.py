"""Large answers, whose memory is bounded while clients read them slowly or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from normweave.serve.problems import ProblemError


class HeldAnswers:
    """The images and maps that clients are reading.

    Args:
        most: bytes of all of them together. A single larger answer is sent if there is no other.
    """

    def __init__(self, most: int) -> None:
        self.held = 0
        self._most = most

    @contextmanager
    def expected(self, size: int) -> Iterator[None]:
        """Count an answer of about this size while it is computed.

        Raises:
            ProblemError: there are too many bytes already.
        """
        self._check(size)
        self.held += size
        try:
            yield
        finally:
            self.held -= size

    def answer(self, content: bytes, *, media_type: str, headers: Mapping[str, str]) -> Response:
        """Return a response that counts until it is sent or its client is gone.

        Raises:
            ProblemError: there are too many bytes already.
        """
        self._check(len(content))
        return _Held(self, content, media_type=media_type, headers=headers)

    def _check(self, size: int) -> None:
        if self.held and self.held + size > self._most:
            raise ProblemError(
                429,
                f"Clients are reading images and maps of {self.held:,} bytes, at most {self._most:,} may be read at a "
                "time. Send the request again in a moment.",
                code="too_many_readers",
            )


class _Held(Response):
    def __init__(self, answers: HeldAnswers, content: bytes, *, media_type: str, headers: Mapping[str, str]) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self._answers = answers
        answers.held += len(content)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.held -= len(self.body)
