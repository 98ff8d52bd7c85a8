"""One and two servers of a line behind nginx against one and two replicas of the same application in Ray Serve.

    python perf/bench_ray_serve.py --database postgresql://… --bundle DIR --images DIR [--seconds 20] [--rounds 2]

Each server or replica inspects with one thread and stores in the database, which must be empty and is cleared. 8
clients send one image a request with a key, and send it again until it is answered. With two, one process is killed
at the end. Needs nginx and `ray[serve]`, which is no dependency of normweave.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np
import psutil

from bench_ray import processor_s
from bench_replicas import Servers, clear
from normweave import serve as server
from normweave.detector import Detector
from normweave.serve.access import Access
from normweave.serve.config import ServeConfig
from normweave.serve.files import Files
from normweave.serve.replicas import Replica
from normweave.serve.service import InspectionService
from normweave.serve.store import Store

CLIENTS, IDLE_SECONDS, PORT = 8, 5, 18090
PROGRAM = {"nginx": "-m normweave serve", "Ray Serve": "ServeReplica"}
"""In the command line of a server or replica."""


def application(bundle: str, database: str, folder: Path) -> Any:
    """Return the application that `normweave serve` runs, for one replica."""
    store, files, config = Store.open(database), Files(folder / "images", shared=True), ServeConfig()
    own, detector = Path(tempfile.mkdtemp(dir=folder)), Detector.load(bundle, threads=1)
    service = InspectionService(detector, store=store, files=files, config=config, folder=own)
    replica = Replica(store.database, line="", images=files.identity, server=store.server)
    return server.create_app(service, access=Access(store, session_hours=config.session_hours), replica=replica)


def serve(bundle: str, database: str, folder: Path, count: int) -> None:
    """Run replicas until stdin ends, and after its first line print how many run."""
    import ray
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    ray.init("local", num_cpus=count + 1, include_dashboard=False, log_to_driver=False)
    ray_serve.start(http_options=HTTPOptions(host="127.0.0.1", port=PORT))
    logs = LoggingConfig(enable_access_log=False, log_level="WARNING")
    deployment = ray_serve.deployment(num_replicas=count, max_ongoing_requests=64, logging_config=logs)(
        ray_serve.ingress(lambda: application(bundle, database, folder))()
    )
    ray_serve.run(deployment.bind())
    print(json.dumps(f"http://127.0.0.1:{PORT}"), flush=True)
    sys.stdin.readline()  # until then, Ray is not asked: its answers take time
    while not select.select([sys.stdin], [], [], 0.1)[0]:
        (states,) = (one.replica_states for one in ray_serve.status().applications["default"].deployments.values())
        print(json.dumps([time.time(), states.get("RUNNING", 0)]), flush=True)
    ray_serve.shutdown()


async def load(url: str, token: str, photos: list[bytes], seconds: float) -> dict[str, float]:
    """Send images for some time, and return what the clients saw; failed are answers but 200, and lost connections."""
    times, failed, end = list[float](), 0, time.monotonic() + seconds
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as http:

        async def send(client: int) -> None:
            nonlocal failed
            number = 0
            while time.monotonic() < end:
                number += 1
                content = photos[(client + number) % len(photos)] + os.urandom(8)
                key, begin, done = {"Idempotency-Key": os.urandom(8).hex()}, time.monotonic(), False
                while not done:
                    with suppress(httpx2.HTTPError):
                        answer = await http.post("/v1/inspect", files={"images": content}, headers=key)
                        done = answer.status_code == 200
                    failed += not done
                times.append(1000 * (time.monotonic() - begin))

        await asyncio.gather(*(send(client) for client in range(CLIENTS)))
    taken = time.monotonic() - end + seconds
    median, p99 = np.quantile(times, [0.5, 0.99])
    found = {"images": len(times), "per_second": len(times) / taken, "median_ms": float(median), "p99_ms": float(p99)}
    return found | {"longest_ms": max(times), "failed": failed}


class Running(NamedTuple):
    """Servers or replicas that answer."""

    url: str
    token: str
    roots: list[psutil.Process]  # with their children, all that is needed besides PostgreSQL
    driver: Any  # of Ray Serve
    counts: list[tuple[float, int]]  # time and number of replicas, after the end


@contextmanager
def started(way: str, count: int, given: argparse.Namespace, folder: Path) -> Iterator[Running]:
    """Start servers behind nginx, or replicas in Ray Serve."""
    clear(given.database)
    if way == "nginx":
        servers = Servers(folder, given.bundle, given.database, count)
        try:
            roots = [psutil.Process(one.pid) for one in (servers.proxy, *servers.work)]
            yield Running(servers.url, servers.token, roots, None, [])
        finally:
            servers.close()
        return
    with closing(Store.open(given.database)) as store:
        token = Access(store, session_hours=1).create_first_tokens()[0].secret
    command = [sys.executable, __file__, "--serve", str(count), "--folder", folder]
    command += ["--database", given.database, "--bundle", given.bundle]
    own = os.environ | {"RAY_worker_niceness": "0"}  # Ray's 15 would make it slower beside other work
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    driver = subprocess.Popen(list(map(str, command)), env=own, **pipes)
    running = Running(json.loads(driver.stdout.readline()), token, psutil.Process(driver.pid).children(), driver, [])
    try:
        yield running
    finally:
        lines, _ = driver.communicate("\n\n")
        running.counts.extend(json.loads(line) for line in lines.splitlines() if line.startswith("["))


def measure(way: str, count: int, given: argparse.Namespace, photos: list[bytes]) -> dict[str, Any]:
    """Return what servers or replicas take, and what their clients see."""
    row: dict[str, Any] = {"way": way, "count": count}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        with started(way, count, given, Path(folder)) as running:
            row["start_s"] = time.time() - begin

            def seen(seconds: float) -> dict[str, float]:
                return asyncio.run(load(running.url, running.token, photos, seconds))

            seen(4)
            time.sleep(3)
            processes = running.roots + [each for root in running.roots for each in root.children(recursive=True)]
            row["processes"] = len(processes)
            row["idle_mib"] = sum(each.memory_full_info().uss for each in processes) / 2**20
            before = processor_s(processes)
            time.sleep(IDLE_SECONDS)
            row["idle_core_share"] = (processor_s(processes) - before) / IDLE_SECONDS
            before, found = processor_s(processes), seen(given.seconds)
            row["processor_ms"] = 1000 * (processor_s(processes) - before) / found["images"]
            row |= found
            if count == 2:
                victim = next(each for each in processes if PROGRAM[way] in " ".join(each.cmdline()))
                killed = time.time() + given.seconds / 4
                threading.Timer(given.seconds / 4, victim.kill).start()
                if running.driver:
                    running.driver.stdin.write("\n")
                    running.driver.stdin.flush()
                row |= {f"kill_{name}": value for name, value in seen(given.seconds).items()}
    if lost := [when for when, number in running.counts if number < count and when > killed]:
        row["replaced_s"] = lost[-1] - killed
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--database", required=True, help="an empty database; its tables are removed")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=Path, help="folder of images for the bundle")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(str(given.bundle.resolve()), given.database, given.folder, given.serve)
        return
    photos = [path.read_bytes() for path in sorted(given.images.rglob("*.png"))]
    for _, count, way in product(range(given.rounds), (1, 2), PROGRAM):
        print(json.dumps(measure(way, count, given, photos)), flush=True)
    clear(given.database)


if __name__ == "__main__":
    main()
