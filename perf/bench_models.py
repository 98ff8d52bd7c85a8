"""Promotions, roll backs and kills of a server under load, and the latency beside a shadow and beside a training.

Eight clients send images with unique bytes and an Idempotency-Key, again after an error, until each is answered. In the
meantime a candidate is promoted and rolled back, and the server is killed (SIGKILL) and started again. At the end every
answered image must be in the store exactly once, with the score, the threshold and the verdict that the bundle named in
its inspection gives. Exit code 1 if one is lost, doubled or wrong.

Before that the latency is measured in turn with nothing beside, with the candidate in the shadow, and, with --teach,
while the server trains a new product.

python perf/bench_models.py --library DIR --images DIR      # 50 promotions, 50 roll backs, 10 kills; one JSON line
python perf/bench_models.py --library DIR --images DIR --teach DIR    # good images of a subclass that no bundle knows
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import platform
import random
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx2

from normweave import bundle as bundles
from normweave.detector import Detector

RETRY_SECONDS = 0.05
SETTLING = 3.0
"""Seconds that are not measured after the server was told to do something else."""
KILL_DELAY = 1.0
"""A kill comes up to this many seconds after the beginning of a promotion or a roll back."""


class Server:
    """A server on one port that can be killed and started again."""

    def __init__(self, library: Path, data: Path, active: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._command = [sys.executable, "-m", "normweave", "serve", "--library", str(library), "--data", str(data)]
        self._command += ["--port", str(self.port), "--json", "--threads", "1", "--max-waiting", "64"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.tokens: dict[str, str] = {}
        self.start("--active", active)

    def start(self, *options: str) -> None:
        """Start it, and wait until it answers."""
        self.process = subprocess.Popen([*self._command, *options], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        started = json.loads(self.process.stdout.readline())
        self.tokens |= {made["role"]: made["token"] for made in started["tokens"]}

    def kill(self) -> None:
        """Stop it with SIGKILL."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def client(self, role: str) -> httpx2.AsyncClient:
        """Return a client with the token of this role."""
        headers = {"Authorization": f"Bearer {self.tokens[role]}"}
        return httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=120, trust_env=False)


class Load:
    """Clients that send images until `stop`.

    Attributes:
        answers: (number of the image, inspection) of each.
        seconds: from the first attempt to the answer.
    """

    def __init__(self, server: Server, photos: list[bytes]) -> None:
        self._server, self._photos = server, photos
        self._number = 0
        self.answers: list[tuple[int, dict]] = []
        self.seconds: list[float] = []
        self.sent_again = 0
        self.stop = asyncio.Event()

    async def client(self) -> None:
        """Send one image after the other."""
        async with self._server.client("operator") as http:
            while not self.stop.is_set():
                self._number += 1
                number = self._number
                which = number % len(self._photos)
                content = self._photos[which] + number.to_bytes(8, "big")
                start = time.perf_counter()
                inspection = await self._until_answered(http, f"image {number}", content)
                self.seconds.append(time.perf_counter() - start)
                self.answers.append((which, inspection))

    async def _until_answered(self, http: httpx2.AsyncClient, key: str, content: bytes) -> dict:
        while True:
            with contextlib.suppress(httpx2.HTTPError):
                files = {"images": (key, content)}
                answer = await http.post("/v1/inspect", files=files, headers={"Idempotency-Key": key})
                if answer.status_code == 200:
                    (inspection,) = answer.json()["inspections"]
                    return inspection
                if answer.status_code not in (429, 503):
                    raise AssertionError(f"{answer.status_code}: {answer.text}")
            self.sent_again += 1
            await asyncio.sleep(RETRY_SECONDS)

    async def during(self, seconds: float) -> list[float]:
        """Return how long each answer took in this time."""
        self.seconds = []
        await asyncio.sleep(seconds)
        return self.seconds


def latency(seconds: list[float]) -> dict[str, float]:
    """Return the number of answers and their latency."""
    times = sorted(seconds)
    p99 = times[int(0.99 * (len(times) - 1))]
    return {"images": len(times), "median_ms": 1000 * statistics.median(times), "p99_ms": 1000 * p99}


async def latencies(load: Load, http: httpx2.AsyncClient, candidate: str, options: argparse.Namespace) -> dict:
    """Return the latency with nothing beside, with the candidate in the shadow, and beside a training, in turn."""
    seconds: dict[str, list[float]] = {"calm": [], "shadow": [], "training": []}
    shadow = {"judged": 0, "skipped": 0, "differences": 0}
    paths = sorted(options.teach.glob("*.png"))[:20] if options.teach else []
    few = [base64.b64encode(path.read_bytes()).decode() for path in paths]
    request = {"category": options.category, "subclass": "added", "images": [{"data": each} for each in few]}
    for _ in range(options.rounds):
        seconds["calm"] += await load.during(options.seconds)
        (await http.post(f"/v1/models/{candidate}/shadow")).raise_for_status()
        await load.during(SETTLING)
        seconds["shadow"] += await load.during(options.seconds)
        compared = (await http.get("/v1/models/compare", params={"limit": 1})).json()
        shadow = {name: shadow[name] + compared[name] for name in shadow}
        (await http.delete(f"/v1/models/{candidate}/shadow")).raise_for_status()
        if few:
            started = await http.post("/v1/teach", json=request)
            started.raise_for_status()
            seconds["training"] += await load.during(options.seconds)
            job = (await http.get(f"/v1/teach/{started.json()['id']}")).json()
            assert job["state"] == "training", job
            (await http.delete(f"/v1/teach/{job['id']}")).raise_for_status()
        await load.during(SETTLING)
    return {"latency": {name: latency(each) for name, each in seconds.items() if each}, "shadow": shadow}


async def switch(server: Server, http: httpx2.AsyncClient, target: str, path: str) -> None:
    """Promote or roll back until the bundle is active, over any number of kills."""
    while True:
        with contextlib.suppress(httpx2.HTTPError):
            state = (await http.get("/v1/models")).json()
            if state.get("active") == target:
                return
            if path.endswith("promote") and state.get("candidate") != target:
                await http.post(f"/v1/models/{target}/shadow")
            await http.post(path)
        await asyncio.sleep(RETRY_SECONDS)


async def killed(server: Server, delay: float) -> None:
    """Kill the server after a time, and start it again."""
    await asyncio.sleep(delay)
    server.kill()
    await asyncio.to_thread(server.start)


async def measure(server: Server, photos: list[bytes], hashes: tuple[str, str], options: argparse.Namespace) -> dict:
    """Run everything, and return the numbers and all answers."""
    load, draw = Load(server, photos), random.Random(0)
    old, new = hashes
    clients = [asyncio.create_task(load.client()) for _ in range(options.clients)]
    async with server.client("engineer") as http:
        await load.during(SETTLING)
        found = await latencies(load, http, new, options)
        load.seconds = []
        kills = set(draw.sample(range(2 * options.switches), options.kills))
        for number in range(2 * options.switches):
            target, path = (old, "/v1/models/rollback") if number % 2 else (new, f"/v1/models/{new}/promote")
            work = [switch(server, http, target, path)]
            if number in kills:
                work.append(killed(server, draw.uniform(0, KILL_DELAY)))
            await asyncio.gather(*work)
        found["latency"]["switching"] = latency(load.seconds)
        load.stop.set()
        await asyncio.gather(*clients)
    return found | {"sent_again": load.sent_again, "answers": load.answers}


def faults(data: Path, answers: list[tuple[int, dict]], expected: dict[str, list[dict]]) -> dict[str, int]:
    """Count the answered images that are lost, doubled, or have results of another bundle than the one they name."""
    database = sqlite3.connect(f"file:{data}/store.sqlite?mode=ro", uri=True)
    try:
        rows = database.execute("SELECT id, name, image_hash, bundle_hash, pred_score FROM inspections").fetchall()
    finally:
        database.close()
    stored = {row[0]: row[1:] for row in rows}
    names = Counter(name for name, *_ in stored.values())
    wrong = lost = 0
    for which, one in answers:
        should = expected[one["bundle_hash"]][which]
        equal = abs(one["pred_score"] - should["pred_score"]) <= 1e-3 * abs(should["pred_score"])
        wrong += not (equal and (one["verdict"], one["threshold"]) == (should["verdict"], should["threshold"]))
        row = (one["name"], one["image_hash"], one["bundle_hash"], one["pred_score"])
        lost += stored.get(one["id"]) != row
    return {"wrong": wrong, "lost": lost, "doubled": sum(n > 1 for n in names.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="folder of two bundles, old and new")
    parser.add_argument("--images", type=Path, required=True, help="folder of PNG images")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--switches", type=int, default=50, help="promotions, and as many roll backs")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="in each of which all latencies are measured")
    parser.add_argument("--seconds", type=float, default=10, help="for each latency in a round")
    parser.add_argument("--teach", type=Path, help="folder of PNG images of a new subclass")
    parser.add_argument("--category", default="cloth", help="of this subclass")
    options = parser.parse_args()
    paths = sorted(options.images.rglob("*.png"))
    hashes = tuple(bundles.bundle_hash(options.library / name) for name in ("old", "new"))
    expected = {}
    for name, bundle_hash in zip(("old", "new"), hashes, strict=True):
        detector = Detector.load(options.library / name, threads=1)
        expected[bundle_hash] = [one.as_dict() for one in detector.stream(paths, maps=False)]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        server = Server(options.library, data, "old")
        try:
            photos = [path.read_bytes() for path in paths]
            found = asyncio.run(measure(server, photos, (hashes[0], hashes[1]), options))
        finally:
            server.process.terminate()
            server.process.wait(120)
        answers = found.pop("answers")
        counts = faults(data, answers, expected)
    by_bundle = Counter(one["bundle_hash"] for _, one in answers)
    found |= {"answered": len(answers), "by_bundle": [by_bundle[one] for one in hashes], **counts}
    found |= {"switches": 2 * options.switches, "kills": options.kills}
    print(json.dumps(found | {"machine": platform.platform(), "cores": os.cpu_count()}))
    return 1 if any(counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
