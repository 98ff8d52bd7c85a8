"""Memory of large answers."""

import asyncio

import pytest

from normweave.serve.answers import HeldAnswers
from normweave.serve.problems import ProblemError


def answer(held, size):
    return held.answer(bytes(size), media_type="image/png", headers={"Cache-Control": "private"})


def test_answers_that_clients_read_slowly_are_bounded():
    held = HeldAnswers(100)

    async def walk():
        free, sent = asyncio.Event(), []

        async def send(message):
            sent.append(message)
            await free.wait()

        slow = asyncio.ensure_future(answer(held, 80)({"type": "http"}, None, send))
        await asyncio.sleep(0)
        with pytest.raises(ProblemError, match="at most 100"), held.expected(30):  # before it is computed
            pass
        with pytest.raises(ProblemError, match="of 80 bytes, at most 100 may be read at a time") as refused:
            answer(held, 30)
        assert (refused.value.status_code, refused.value.code) == (429, "too_many_readers")
        free.set()
        await slow
        assert sent[0]["status"] == 200
        with held.expected(70), pytest.raises(ProblemError):
            answer(held, 40)
        assert held.held == 0

    asyncio.run(walk())


def test_a_client_that_goes_away_counts_no_more_and_one_large_answer_is_sent():
    held = HeldAnswers(100)

    async def gone(message):
        raise ConnectionError

    with pytest.raises(ConnectionError):
        asyncio.run(answer(held, 1000)({"type": "http"}, None, gone))
    assert held.held == 0
