"""Verdicts as numbers, for the outputs that a machine reads."""

from __future__ import annotations

from datetime import UTC, datetime

from normweave.serve.message import InspectionMessage, PartMessage

NO_RESULT, GOOD, DEFECTIVE, UNKNOWN, UNREADABLE, STALE, INCOMPLETE = range(7)
_CODES = {"normal": GOOD, "anomalous": DEFECTIVE, "unknown": UNKNOWN, None: UNREADABLE, "incomplete": INCOMPLETE}


def verdict_code(message: InspectionMessage | PartMessage, *, max_age: float) -> int:
    """Return the number of a verdict.

    A good result is `STALE` if it is older than `max_age` seconds, or was corrected in the meantime. A part is good
    only if it is known to be complete: without expected views it is `INCOMPLETE`.
    """
    data = message.data
    code = _CODES[data.verdict]
    if code != GOOD:
        return code
    if isinstance(message, PartMessage) and message.data.expected is None:
        return INCOMPLETE
    corrected = isinstance(message, PartMessage) and message.data.corrected
    return STALE if corrected or (datetime.now(UTC) - data.time).total_seconds() > max_age else GOOD
