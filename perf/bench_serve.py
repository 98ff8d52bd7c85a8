"""Throughput, latency and memory of a server under load on the loopback, and a check that no inspection is lost.

The throughput is also given as a share of the runtime's without a server, which is measured first.

Every image has unique bytes, so that its answer can be identified. At the end each answer must be in the store, with
its image and patch scores on disk. With --attack each number of clients is measured a second time, beside four clients
without a token, two that send headers without an end and two that send bodies in chunks of one byte, and one that sends
a PNG of 8 x 6,000,000 pixels again and again. Exit code 1 if an inspection is lost or wrong, or if the memory grows.

python perf/bench_serve.py                # 1, 8 and 100 clients, 60 s each; then one JSON line
python perf/bench_serve.py --bundle DIR --images DIR --clients 100 --seconds 10
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx2
import psutil

from normweave.detector import Detector

WARM_UP_SECONDS = 3.0
MEMORY_SECONDS = 0.5
GROWTH_MIB = 200.0
"""Maximum growth of the memory after the warm-up; waiting images and their maps need a part of it."""
ENDLESS_HEADERS = (b"GET /healthz HTTP/1.1\r\nhost: line\r\nx: ", b"a" * 65536)
"""Start of a request, and the part that is sent after it without an end."""
SMALL_CHUNKS = (
    b"POST /v1/inspect HTTP/1.1\r\nhost: line\r\ntransfer-encoding: chunked\r\n\r\n",
    b"1\r\na\r\n" * 8000,
)
"""The same, with a body in chunks of one byte."""


@dataclass
class Answers:
    """Answers to all clients."""

    seconds: list[float] = field(default_factory=list)
    kept: dict[int, str] = field(default_factory=dict)  # id -> SHA-256 of the sent file
    refused: int = 0  # 429, sent again later
    wrong: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)


class Serving(NamedTuple):
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    token: str


def start(bundle: Path, data: Path) -> Serving:
    """Start a server on a free port."""
    command = [
        sys.executable,
        "-X",
        "faulthandler",
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
    started = json.loads(server.stdout.readline())
    return Serving(server, started["url"], started["tokens"][0]["token"])


def unique_images(photos: list[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (index, content) of the photos repeatedly, each time with different bytes after the end of the image."""
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
    """Send one image after the other, each until it is accepted."""
    for which, content in images:
        while True:
            if time.monotonic() >= end:
                return
            start = time.perf_counter()
            response = await http.post("/v1/inspect", files={"images": ("part.png", content)})
            if response.status_code != 429:
                break
            answers.refused += 1
            await asyncio.sleep(float(response.headers["retry-after"]) / 2)
        answers.seconds.append(time.perf_counter() - start)
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
            answers.wrong.append(f"{one['id']}: {one['verdict']} {one['pred_score']} is the result of another image")
        answers.kept[one["id"]] = digest


async def load(
    server: Serving,
    images: Iterator[tuple[int, bytes]],
    expected: list[dict],
    *,
    clients: int,
    seconds: float,
) -> Answers:
    """Run this number of clients for this time."""
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


def thin_png() -> bytes:
    """Return a PNG of 8 x 6,000,000 black pixels, some 50 kB."""
    height, width = 6_000_000, 8

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


async def send_without_end(url: str, start: bytes, part: bytes, end: float) -> None:
    """Send the start of a request, then a part again and again; connect again when the server closes the connection."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    while time.monotonic() < end:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(start)
            while time.monotonic() < end and not reader.at_eof():
                writer.write(part)
                await asyncio.wait_for(writer.drain(), 1)
                await asyncio.sleep(0)
        except (OSError, TimeoutError):
            await asyncio.sleep(0.01)
        finally:
            writer.close()


async def send_thin_images(url: str, token: str, end: float) -> None:
    """Send a thin image of very many rows, one after the other."""
    content, headers = thin_png(), {"Authorization": f"Bearer {token}"}
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=120, trust_env=False) as http:
        while time.monotonic() < end:
            await http.post("/v1/inspect", files={"images": ("thin.png", content)})


def attack(server_url: str, token: str, seconds: float) -> None:
    """Send endless headers and small chunks, two connections each, and thin images, in a process of its own."""

    async def all_of_them(end: float) -> None:
        await asyncio.gather(
            *(send_without_end(server_url, *request, end) for request in (ENDLESS_HEADERS, SMALL_CHUNKS) * 2),
            send_thin_images(server_url, token, end),
        )

    asyncio.run(all_of_them(time.monotonic() + seconds))


def lost(data: Path, answers: Answers) -> list[str]:
    """Return the answers that are missing in the store, differ from it, or lack a file."""
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


def direct(detector: Detector, paths: list[Path], seconds: float) -> float:
    """Return the images a second of the runtime without a server, which reads the same files in batches."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        done += sum(1 for _ in detector.stream(paths, maps=False))
    return done / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="default: trained on synthetic cloth")
    parser.add_argument("--images", type=Path, help="folder of test images for the bundle")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 100])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--attack", action="store_true", help="measure each number of clients beside attacks too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle, images = arguments.bundle, arguments.images
        if bundle is None or images is None:
            bundle, images = train_on_cloth(folder)
        paths = sorted(images.rglob("*.png"))
        photos = [path.read_bytes() for path in paths]
        detector = Detector.load(bundle, threads=1)
        expected = [outcome.as_dict() for outcome in detector.stream(paths, maps=False)]
        alone = direct(detector, paths, arguments.seconds / 4)
        print(f"direct runtime, one thread: {alone:.1f}/s", flush=True)
        server = start(bundle, folder / "data")
        rows, faults = [], []
        try:
            stream = unique_images(photos)
            warm = asyncio.run(load(server, stream, expected, clients=8, seconds=WARM_UP_SECONDS))
            for clients, attacked in itertools.product(arguments.clients, [False, True][: 1 + arguments.attack]):
                attacker = multiprocessing.Process(target=attack, args=(server.url, server.token, arguments.seconds))
                if attacked:
                    attacker.start()
                answers = asyncio.run(load(server, stream, expected, clients=clients, seconds=arguments.seconds))
                if attacked:
                    attacker.join()
                gone = lost(folder / "data", answers)
                growth = max(answers.memory_mib) - warm.memory_mib[-1]
                faults += answers.wrong + gone + ([f"grew by {growth:.0f} MiB"] if growth > GROWTH_MIB else [])
                times = sorted(answers.seconds)
                rows.append(
                    {
                        "clients": clients,
                        "attacked": attacked,
                        "seconds": arguments.seconds,
                        "images": len(answers.kept),
                        "per_second": len(answers.kept) / arguments.seconds,
                        "of_direct": len(answers.kept) / arguments.seconds / alone,
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
                    "clients {clients:>3}  attacked {attacked!s:>5}  {images:>5} images  {per_second:6.1f}/s "
                    "({of_direct:4.0%} of direct)  median {median_ms:7.1f} ms  p99 {p99_ms:7.1f} ms  "
                    "refused {refused:>5}  wrong {wrong}  lost {lost}  "
                    "memory {memory_mib:.0f} MiB (+{growth_mib:.0f})".format(**rows[-1]),
                    flush=True,
                )
        finally:
            if (code := server.process.poll()) is not None:
                print(f"The server ended by itself with exit code {code}.")
            server.process.terminate()
            server.process.wait(120)
        for fault in faults[:20]:
            print(fault)
    print(json.dumps({"machine": platform.platform(), "cores": os.cpu_count(), "direct": alone, "rows": rows}))
    return 1 if faults else 0


def train_on_cloth(folder: Path) -> tuple[Path, Path]:
    """Return a bundle for six subclasses of synthetic cloth, and a folder with the test images."""
    from normweave.config import Config
    from normweave.detector import Detector
    from normweave.settings import override
    from normweave.textiles import make_textures

    manifest = make_textures(folder / "cloth", train_images=20, test_images=4, defect_images=7)
    detector = Detector.fit(manifest, config=override(Config(), ["data.subclass_from=column"]), cache=folder / "cache")
    test = folder / "test"
    test.mkdir()
    for number, path in enumerate(sorted((folder / "cloth").glob("cloth/*/test/*/*.png"))):
        (test / f"{number:04d}.png").write_bytes(path.read_bytes())
    return detector.save(folder / "cloth.bundle"), test


if __name__ == "__main__":
    sys.exit(main())
