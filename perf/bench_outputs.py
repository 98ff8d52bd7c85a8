"""How much a dead and a slow counterpart of outputs delay the answers to a client: the ratio of the median times.

One server inspects images one after the other, in blocks: without outputs, and with two webhooks, of which one is to a
port where nothing listens and one to a server that answers after half a second. Blocks alternate, so that both see the
same machine. Exit code 1 if the ratio is above 1.05.

python perf/bench_outputs.py                # 10 blocks of 60 images each; then one JSON line
python perf/bench_outputs.py --bundle DIR --images DIR
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bench_serve import train_on_cloth
from normweave.detector import Detector
from normweave.serve.config import ServeConfig
from normweave.serve.delivery import Deliveries
from normweave.serve.files import Files
from normweave.serve.outputs import webhook
from normweave.serve.service import InspectionService, Upload
from normweave.serve.store import Store

MOST = 1.05
SLOW_SECONDS = 0.5
WARM_UP = 40


class Slow(BaseHTTPRequestHandler):
    """Answers each request after `SLOW_SECONDS`."""

    def do_POST(self):
        """Answer late."""
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(SLOW_SECONDS)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        """Be quiet."""


async def block(service: InspectionService, photos: list[bytes], *, count: int, first: int) -> list[float]:
    """Inspect images one after the other, and return the time of each in seconds."""
    seconds = []
    for number in range(first, first + count):
        content = photos[number % len(photos)] + number.to_bytes(8, "big")
        start = time.perf_counter()
        await service.inspect([Upload("part.png", content)], source="api", actor="bench")
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="default: trained on synthetic cloth")
    parser.add_argument("--images", type=Path, help="folder of test images for the bundle")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--count", type=int, default=60, help="images of a block")
    arguments = parser.parse_args()
    slow = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=slow.serve_forever, daemon=True).start()
    os.environ["BENCH_SECRET"] = "whsec_c2VjcmV0IG9mIHRoZSBsaW5lIGFuZCB0aGUgbWVz"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle, images = arguments.bundle, arguments.images
        if bundle is None or images is None:
            bundle, images = train_on_cloth(folder)
        photos = [path.read_bytes() for path in sorted(images.rglob("*.png"))]
        store, files = Store.open(folder / "store.sqlite"), Files(folder / "files")
        service = InspectionService(Detector.load(bundle, threads=1), store=store, files=files, config=ServeConfig())
        times: dict[bool, list[float]] = {False: [], True: []}
        behind = 0
        asyncio.run(block(service, photos, count=WARM_UP, first=0))
        for number in range(2 * arguments.blocks):
            failing = number % 2 == 1
            addresses = {"dead": "http://127.0.0.1:9/", "slow": f"http://127.0.0.1:{slow.server_port}/"}
            outputs = [
                webhook.Output(
                    webhook.Config(type="webhook", name=name, url=url, secret_env="BENCH_SECRET"), line=store.line
                )
                for name, url in addresses.items()
            ]
            deliveries = Deliveries(service, outputs if failing else [])
            deliveries.start()
            first = WARM_UP + number * arguments.count
            times[failing] += asyncio.run(block(service, photos, count=arguments.count, first=first))
            behind = max([behind, *(one.behind for one in deliveries.states())])
            deliveries.stop()
        service.stop()
        store.close()
        files.close()
    slow.shutdown()
    without, with_failing = (statistics.median(times[failing]) for failing in (False, True))
    row = {
        "images": len(times[True]),
        "median_ms_without": round(1000 * without, 2),
        "median_ms_with_failing": round(1000 * with_failing, 2),
        "ratio": round(with_failing / without, 3),
        "behind": behind,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
    }
    print(json.dumps(row))
    return int(row["ratio"] > MOST)


if __name__ == "__main__":
    raise SystemExit(main())
