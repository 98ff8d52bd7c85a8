"""A process of its own at the lowest priority, in which a candidate scores images: its failure ends nothing else.

Both sides send blocks of bytes with their length before them. A request is an image file. The answer is a JSON object
and the patch scores of the map as .npy (empty if there are none). Nothing that is received is executed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from normweave.detector import Detector
from normweave.errors import DataError, NormweaveError
from normweave.serve.library import warm_up
from normweave.serve.rendering import grids_file
from normweave.types import Outcome

ANSWER_SECONDS = 300.0
"""Time limit for one image, and for loading the bundle. A busy machine leaves the lowest priority little time."""
LOWEST_PRIORITY = 19
_LENGTH = struct.Struct(">Q")
_MOST_BYTES = 2**30


class CandidateError(NormweaveError):
    """The candidate cannot be loaded, has failed, or gives no answer."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a candidate computed for an image."""

    outcome: dict[str, Any]
    """Fields of `Outcome` as JSON values."""
    seconds: float
    """Time of a processor that it took."""
    tiles: list[list[int]]
    smoothing: float
    map_threshold: float | None
    """None: the image could not be scored."""
    grids: bytes
    """The patch scores of each tile, (n, h, w) float32, as .npy; empty if the image could not be scored."""


class CandidateProcess:
    """A candidate in a process, which begins to load the bundle.

    Args:
        path: the bundle.
        device: as in `Detector.load`.
    """

    def __init__(self, path: Path, *, device: str) -> None:
        code = f"import sys; from {__name__} import main; main(*sys.argv[1:])"
        command = [sys.executable, "-c", code, str(path), device]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def wait_ready(self) -> None:
        """Return when the bundle is loaded.

        Raises:
            CandidateError: it cannot be loaded.
        """
        self._answer()

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    def judge(self, content: bytes) -> Judgement:
        """Return what the candidate computes for an image file.

        Raises:
            CandidateError: it failed, or gives no answer.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the process has ended; `_answer` has the reason
            _send(self._process.stdin, content)
        header, grids = self._answer()
        return Judgement(**header, grids=grids)

    def _answer(self) -> tuple[dict[str, Any], bytes]:
        assert self._process.stdout is not None
        limit = threading.Timer(ANSWER_SECONDS, self._process.kill)
        limit.start()
        try:
            header = json.loads(_receive(self._process.stdout))
            grids = _receive(self._process.stdout)
        except (EOFError, ValueError) as error:
            slow = limit.finished.is_set()
            self._process.kill()
            code = self._process.wait()
            reason = f"gave no answer for {ANSWER_SECONDS:g} s" if slow else f"ended with exit code {code}"
            raise CandidateError(f"The process of the candidate {reason}. Read the log of the server.") from error
        finally:
            limit.cancel()
        if "failure" in header:
            raise CandidateError(header["failure"])
        return header, grids

    def kill(self) -> None:
        """End the process; a call of another thread that waits for an answer fails."""
        self._process.kill()

    def close(self) -> None:
        """End the process, after the calls of all other threads."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):  # what was not sent yet
            self._process.stdin.close()
        self._process.stdout.close()


def _send(stream: BinaryIO | Any, *blocks: bytes) -> None:
    for block in blocks:
        stream.write(_LENGTH.pack(len(block)))
        stream.write(block)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> bytes:
    """Return the next block.

    Raises:
        EOFError: the stream has ended.
        ValueError: it is larger than any answer.
    """
    start = stream.read(_LENGTH.size)
    if len(start) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(start)
    if length > _MOST_BYTES:
        raise ValueError(f"a block of {length} bytes")
    block = stream.read(length)
    if len(block) < length:
        raise EOFError
    return bytes(block)


# ── in the process ───────────────────────────────────────────────────────────────────────────────────────────────────


def judge(detector: Detector, content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the answer for an image, as `InspectionService` computes it."""
    start = time.process_time()
    opened = detector.open(content)
    (scored,) = detector.scores([opened])
    opened, scored = detector.regions.choose(opened, scored)
    try:
        outcome = detector.outcome(opened, scored, maps=False)
        if outcome.verdict in ("anomalous", "unknown"):
            outcome = detector.outcome(opened, scored, maps=True)
    except DataError as error:  # of this image only
        outcome, scored = Outcome(image_path=None, error=str(error), model=detector.model), None
    header = {
        "outcome": {name: value for name, value in outcome.as_dict().items() if name != "image_path"},
        "tiles": [list(tile) for tile in opened.tiles],
        "smoothing": detector.smoothing,
        "map_threshold": None if scored is None else detector.box_threshold(outcome),
        "seconds": time.process_time() - start,
    }
    return header, b"" if scored is None else grids_file(opened, scored)


def main(path: str, device: str) -> None:
    """Load the bundle, and answer until the end of the input."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server ends this process
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "win32":
        os.setpriority(os.PRIO_PROCESS, 0, LOWEST_PRIORITY)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is not an answer
    try:
        detector = warm_up(Detector.load(path, threads=1, device=device))
        _send(answers, b"{}", b"")
        while True:
            header, grids = judge(detector, _receive(sys.stdin.buffer))
            _send(answers, json.dumps(header).encode(), grids)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        reason = str(error) if isinstance(error, NormweaveError) else f"{type(error).__name__}: {error}"
        _send(answers, json.dumps({"failure": reason}).encode(), b"")
