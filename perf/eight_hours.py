"""Eight hours of a line with one camera, sped up: memory stays flat, at most one frame waits, and all are counted.

    python perf/eight_hours.py BUNDLE IMAGE [HOURS]

A source yields 30 frames for each second of line time, 160 times as fast as a line. Its trigger chooses one frame
each second of this time, more than can be inspected at this speed. The inspections are real, in a store and files of
their own. Prints a line for each hour.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from normweave.detector import Detector
from normweave.serve import line_config
from normweave.serve.config import ServeConfig
from normweave.serve.files import Files
from normweave.serve.pictures import frame
from normweave.serve.records import Filter
from normweave.serve.service import InspectionService
from normweave.serve.source import Frame, SourceRunner
from normweave.serve.sources.http import Config
from normweave.serve.store import Store
from normweave.serve.trigger import SecondsTrigger

RATE = 30
EVERY = 1.0
SPEED = 160
LIMIT_MIB = 20
"""Growth of the memory after the first hour that is refused."""


class Line:
    """A source module whose frames have the time of the line."""

    def __init__(self, content: bytes, *, hours: float) -> None:
        self.content, self.frames_of_line = content, int(hours * 3600 * RATE)
        self.done, self.ended = 0, False

    def frames(self, config, *, max_bytes, on_drop) -> Iterator[Frame | None]:
        """Yield the frames, then None for ever."""
        began = time.monotonic()
        for number in range(self.frames_of_line):
            self.done = number + 1
            if number % RATE == 0:
                time.sleep(max(0.0, began + number / RATE / SPEED - time.monotonic()))
            yield frame(self.content)._replace(at=number / RATE)
        self.ended = True
        while True:
            yield None
            time.sleep(0.1)


def main(bundle: str, image: str, hours: float = 8.0) -> None:
    process = psutil.Process(os.getpid())
    line = Line(Path(image).read_bytes(), hours=hours)
    line_config.load = lambda section, type: line
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder) / "store.sqlite")
        files = Files(Path(folder) / "files")
        service = InspectionService(
            Detector.load(bundle, threads=1, device="cpu"), store=store, files=files, config=ServeConfig()
        )
        config = Config(type="http", name="top", url="http://a", trigger=SecondsTrigger(type="seconds", seconds=EVERY))
        runner = SourceRunner(config, service)
        began, memory, waiting = time.monotonic(), [], 0
        runner.start()
        while not line.ended or sum(runner.counts.values()) < hours * 3600 / EVERY:
            waiting = max(waiting, service.waiting)
            if line.done >= (len(memory) + 1) * 3600 * RATE:
                memory.append(process.memory_info().rss / 2**20)
                print(f"hour {len(memory)}: {memory[-1]:.0f} MiB, {dict(runner.counts)}", flush=True)
            time.sleep(0.01)
        runner.stop()
        seconds = time.monotonic() - began
        chosen, counts = int(hours * 3600 / EVERY), dict(runner.counts)
        stored = store.count(Filter())
        service.stop()
        store.close()
        files.close()
    print(f"{line.done:,} frames in {seconds:.0f} s, {chosen:,} chosen, {counts}, at most {waiting} in the service")
    assert sum(counts.values()) == chosen, "a frame was not counted, or twice"
    assert stored == counts["inspected"], "an inspection was not stored"
    assert waiting <= 1, "more than one image was in the service"
    assert len(memory) < 2 or memory[-1] - memory[0] < LIMIT_MIB, f"memory grows: {memory}"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:4]))
