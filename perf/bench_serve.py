"""A server under load on the loopback: how many images a second, how long each waits, and whether anything is lost.

Every image is sent once, with bytes of its own, so that its answer can be told from all others. Afterwards each answer
must be in the store, with its image and its scores on disk. Exit code 1 if something is lost, swapped or grows.

python perf/bench_serve.py                # 1, 8 and 100 clients, 60 s each; then one JSON line
python perf/bench_serve.py --bundle DIR --images DIR --clients 100 --seconds 10
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import httpx2
import psutil

from normweave.detector import Detector

WARM_UP_SECONDS = 3.0
MEMORY_SECONDS = 0.5
GROWTH_MIB = 200.0
"""More than this, from the end of the warm-up on, is growth; images in flight and their maps take some of it."""


@dataclass
class Answers:
    """What the clients got."""

    seconds: list[float] = field(default_factory=list)
    kept: dict[int, str] = field(default_factory=dict)  # id -> SHA-256 of what was sent
    refused: int = 0  # 429, sent again later
    wrong: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)


class Serving(NamedTuple):
    """A server at work."""

    process: subprocess.Popen[str]
    url: str
    token: str


def start(bundle: Path, data: Path) -> Serving:
    """Start one on a free port."""
    command = [
        sys.executable,
        "-m",
        "normweave",
        "serve",
        str(bundle),
        "--data",
        str(data),
        "--port",
        "0",
        "--json",
    ]
    server = subprocess.Popen([*command, "--threads", "1"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    said = json.loads(server.stdout.readline())
    return Serving(server, said["url"], said["tokens"][0]["token"])


def different(photos: list[bytes]) -> Iterator[tuple[int, bytes]]:
    """The photographs over and over, each time with other bytes behind the end of the picture."""
    for number in itertools.count():
        which = number % len(photos)
        yield which, photos[which] + number.to_bytes(8, "big")


async def client(
    http: httpx2.AsyncClient,
    images: Iterator[tuple[int, bytes]],
    expected: list[dict],
    answers: Answers,
    end: float,
) -> None:
    """Send one image after the other, each until it is taken."""
    for which, content in images:
        while True:
            if time.monotonic() >= end:
                return
            begun = time.perf_counter()
            response = await http.post("/v1/inspect", files={"images": ("part.png", content)})
            if response.status_code != 429:
                break
            answers.refused += 1
            await asyncio.sleep(float(response.headers["retry-after"]) / 2)
        answers.seconds.append(time.perf_counter() - begun)
        if response.status_code != 200:
            answers.wrong.append(f"{response.status_code} {response.text[:200]}")
            continue
        (one,) = response.json()["inspections"]
        digest = hashlib.sha256(content).hexdigest()
        should = expected[which]
        if (
            one["image_hash"] != digest
            or one["verdict"] != should["verdict"]
            or abs(one["pred_score"] - should["pred_score"]) > 1e-3 * abs(should["pred_score"])
        ):
            answers.wrong.append(f"{one['id']}: {one['verdict']} {one['pred_score']} is of another image")
        answers.kept[one["id"]] = digest


async def load(
    server: Serving,
    images: Iterator[tuple[int, bytes]],
    expected: list[dict],
    *,
    clients: int,
    seconds: float,
) -> Answers:
    """So many clients for so long."""
    answers = Answers()
    process = psutil.Process(server.process.pid)

    async def watch(end: float) -> None:
        while time.monotonic() < end:
            answers.memory_mib.append(process.memory_info().rss / 2**20)
            await asyncio.sleep(MEMORY_SECONDS)

    limits = httpx2.Limits(max_connections=clients)
    headers = {"Authorization": f"Bearer {server.token}"}
    async with httpx2.AsyncClient(
        base_url=server.url, headers=headers, limits=limits, timeout=120, trust_env=False
    ) as http:
        end = time.monotonic() + seconds
        work = [client(http, images, expected, answers, end) for _ in range(clients)]
        await asyncio.gather(watch(end), *work)
    return answers


def lost(data: Path, answers: Answers) -> list[str]:
    """Answers that the store does not have as they were given, with all their files."""
    files = {path.name for path in (data / "files").glob("??/*")}
    database = sqlite3.connect(f"file:{data}/store.sqlite?mode=ro", uri=True)
    try:
        rows = database.execute("SELECT id, image_hash, grids_hash FROM inspections").fetchall()
    finally:
        database.close()
    stored = {number: (image, grids) for number, image, grids in rows}
    missing = []
    for number, digest in answers.kept.items():
        image, grids = stored.get(number, (None, None))
        if image != digest or image not in files or grids not in files:
            missing.append(f"{number}: stored {image}, sent {digest}")
    return missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="made from textiles if left out")
    parser.add_argument("--images", type=Path, help="folder of photographs for it")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 100])
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle, images = arguments.bundle, arguments.images
        if bundle is None or images is None:
            bundle, images = made(folder)
        paths = sorted(images.rglob("*.png"))
        photos = [path.read_bytes() for path in paths]
        expected = [
            outcome.as_dict() for outcome in Detector.load(bundle, threads=1).stream(paths, maps=False)
        ]
        server = start(bundle, folder / "data")
        rows, faults = [], []
        try:
            endless = different(photos)
            warm = asyncio.run(load(server, endless, expected, clients=8, seconds=WARM_UP_SECONDS))
            for clients in arguments.clients:
                answers = asyncio.run(
                    load(server, endless, expected, clients=clients, seconds=arguments.seconds)
                )
                gone = lost(folder / "data", answers)
                growth = max(answers.memory_mib) - warm.memory_mib[-1]
                faults += (
                    answers.wrong + gone + ([f"grew by {growth:.0f} MiB"] if growth > GROWTH_MIB else [])
                )
                times = sorted(answers.seconds)
                rows.append(
                    {
                        "clients": clients,
                        "seconds": arguments.seconds,
                        "images": len(answers.kept),
                        "per_second": len(answers.kept) / arguments.seconds,
                        "median_ms": 1000 * statistics.median(times),
                        "p99_ms": 1000 * times[int(0.99 * (len(times) - 1))],
                        "refused": answers.refused,
                        "wrong": len(answers.wrong),
                        "lost": len(gone),
                        "memory_mib": max(answers.memory_mib),
                        "growth_mib": growth,
                    }
                )
                print(
                    "clients {clients:>3}  {images:>5} images  {per_second:6.1f}/s  median {median_ms:7.1f} ms  "
                    "p99 {p99_ms:7.1f} ms  refused {refused:>5}  wrong {wrong}  lost {lost}  "
                    "memory {memory_mib:.0f} MiB (+{growth_mib:.0f})".format(**rows[-1]),
                    flush=True,
                )
        finally:
            server.process.terminate()
            server.process.wait(120)
        for fault in faults[:20]:
            print(fault)
    print(json.dumps({"machine": platform.platform(), "cores": os.cpu_count(), "rows": rows}))
    return 1 if faults else 0


def made(folder: Path) -> tuple[Path, Path]:
    """A bundle of six kinds of cloth, and the good and bad photographs that it has not seen."""
    from normweave.config import Config
    from normweave.detector import Detector
    from normweave.settings import override
    from normweave.textiles import make_textures

    manifest = make_textures(folder / "cloth", train_images=20, test_images=4, defect_images=7)
    detector = Detector.fit(
        manifest, config=override(Config(), ["data.subclass_from=column"]), cache=folder / "cache"
    )
    test = folder / "test"
    test.mkdir()
    for number, path in enumerate(sorted((folder / "cloth").glob("cloth/*/test/*/*.png"))):
        (test / f"{number:04d}.png").write_bytes(path.read_bytes())
    return detector.save(folder / "cloth.bundle"), test


if __name__ == "__main__":
    sys.exit(main())
