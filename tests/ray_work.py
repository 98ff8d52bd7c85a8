"""Functions that tests give to Ray tasks, which import them."""

import os
import signal
from pathlib import Path


def write_or_fail(item):
    """Return the text of the item in capital letters; some items fail, or end the process."""
    folder, text = item
    attempts = Path(folder, f"{text}.attempts")
    with attempts.open("a") as file:
        file.write(".")
    if text == "raise":
        raise ValueError("not this one")
    if text == "end" or (text == "end once" and attempts.stat().st_size == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "token":
        return (
            f"{os.environ['RAY_AUTH_MODE']} {len(os.environ['RAY_AUTH_TOKEN'])} {os.environ['RAY_USAGE_STATS_ENABLED']}"
        )
    return text.upper()


def save(item, result):
    folder, text = item
    Path(folder, f"{text}.result").write_text(result)
