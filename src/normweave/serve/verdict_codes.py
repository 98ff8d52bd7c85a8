"""Verdicts as numbers, for the outputs that a machine reads."""

from __future__ import annotations

from datetime import UTC, datetime

from normweave.serve.message import Message

NO_RESULT, GOOD, DEFECTIVE, UNKNOWN, UNREADABLE, STALE = range(6)
_CODES = {"normal": GOOD, "anomalous": DEFECTIVE, "unknown": UNKNOWN, None: UNREADABLE}


def verdict_code(message: Message, *, max_age: float) -> int:
    """Return the number of a verdict; a good result older than `max_age` seconds is `STALE`."""
    code = _CODES[message.data.verdict]
    if code == GOOD and (datetime.now(UTC) - message.data.time).total_seconds() > max_age:
        return STALE
    return code
