"""Rates of several servers of one line: inserts into PostgreSQL; images a second of one and two servers behind nginx.

Inserts are measured with 1, 2, 4 and 8 processes, each of which stores inspections in transactions of 1 and of 16, as a
server does. They take turns, since ids must become visible in their order.

python perf/bench_replicas.py --database postgresql://USER@/EMPTY?host=FOLDER               # one JSON line at the end
python perf/bench_replicas.py --database … --bundle DIR --images DIR --seconds 20           # also the servers
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import psutil

from normweave.serve.records import Inspection, StoredImage
from normweave.serve.store import Store
from normweave.types import DefectBox, Outcome, Tile

NGINX = Path(__file__).parents[1] / "deploy" / "nginx.conf"
WRITERS, BATCHES = (1, 2, 4, 8), (1, 16)
CLIENTS = 16
IDLE_SECONDS = 10


def inspection() -> Inspection:
    """Return a typical inspection of a defective part."""
    outcome = Outcome(
        image_path=None,
        verdict="anomalous",
        pred_score=1.5,
        p_value=0.01,
        threshold=1.2,
        false_alarm_rate=0.01,
        category="cloth",
        subclass="twill",
        experts=(("cloth/twill", 0.9),),
        boxes=(DefectBox(1, 2, 30, 40, 1.9), DefectBox(50, 60, 7, 8, 1.4)),
        brightness=0.5,
        contrast=0.2,
        height=512,
        width=512,
        latency_ms=12.0,
        model="adapted_moe",
        bundle_hash="c" * 64,
    )
    image = StoredImage(
        image_hash=os.urandom(32).hex(),
        image_type="image/png",
        image_bytes=300_000,
        grids_hash=os.urandom(32).hex(),
        grids_bytes=5_000,
        tiles=(Tile(0, 0, 512, 512),),
        smoothing=1.0,
        map_threshold=1.0,
    )
    return Inspection(
        received_at=datetime.now(UTC), name="part.png", source="api", actor="press", line="Press 5", outcome=outcome,
        image=image,
    )  # fmt: skip


Counts = multiprocessing.Queue  # of numbers of inspections and seconds of the processor


def write(database: str, batch: int, begin: float, seconds: float, counts: Counts) -> None:
    """Store inspections from `begin` on, and put their number and the time that the processor took."""
    store, count = Store.open(database, line="Press 5"), 0
    time.sleep(max(0.0, begin - time.time()))
    processor = time.process_time()
    while time.time() < begin + seconds:
        count += len(store.add([inspection() for _ in range(batch)]))
    counts.put((count, time.process_time() - processor))
    store.close()


def inserts(database: str, *, writers: int, batch: int, seconds: float) -> tuple[float, float]:
    """Return the inspections a second, and the milliseconds of the processor for each, without those of PostgreSQL."""
    counts: Counts = multiprocessing.Queue()
    begin = time.time() + 3 + writers
    work = [
        multiprocessing.Process(target=write, args=(database, batch, begin, seconds, counts)) for _ in range(writers)
    ]
    for one in work:
        one.start()
    found = [counts.get() for _ in work]
    for one in work:
        one.join()
    total = sum(count for count, _ in found)
    return total / seconds, 1000 * sum(used for _, used in found) / total


async def load(url: str, token: str, photos: list[bytes], seconds: float) -> tuple[int, int]:
    """Return the number of images that were inspected, and of answers 429 or 5xx, which were sent again."""
    done, again, end = 0, 0, time.monotonic() + seconds
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=120, trust_env=False) as http:

        async def send(client: int) -> None:
            nonlocal done, again
            number = 0
            while time.monotonic() < end:
                number += 1
                content = photos[(client + number) % len(photos)] + f"{client} {number}".encode()
                answer = await http.post("/v1/inspect", files={"images": content})
                done += answer.status_code == 200
                again += answer.status_code != 200

        await asyncio.gather(*(send(client) for client in range(CLIENTS)))
    return done, again


class Servers:
    """Servers of one line behind nginx."""

    def __init__(self, folder: Path, bundle: Path, database: str, count: int) -> None:
        self.work: list[subprocess.Popen[str]] = []
        urls = []
        for number in range(count):
            command = [
                sys.executable,
                "-m",
                "normweave",
                "serve",
                str(bundle),
                "--port",
                "0",
                "--json",
                "--threads",
                "1",
            ]
            shared = ["--database", database, "--images", str(folder / "images"), "--data", str(folder / str(number))]
            server = subprocess.Popen([*command, *shared], stdout=subprocess.PIPE, text=True)
            assert server.stdout is not None
            started = json.loads(server.stdout.readline())
            if started["tokens"]:
                self.token = started["tokens"][0]["token"]
            urls.append(started["url"])
            self.work.append(server)
        text = NGINX.read_text().replace("listen 8080;", "listen 127.0.0.1:18080;")
        for number, example in enumerate(("8081", "8082")):
            line = f"    server 127.0.0.1:{example} max_fails=1 fail_timeout=2s;\n"
            new = line.replace(f"127.0.0.1:{example}", urls[number].removeprefix("http://")) if number < count else ""
            text = text.replace(line, new)
        user = "" if os.geteuid() else "user root; "
        temporary = " ".join(
            f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        main = f"{user}daemon off; pid {folder}/pid; error_log stderr; events {{}}"
        (folder / "nginx.conf").write_text(f"{main} http {{ access_log off; {temporary} {text} }}")
        program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program is not None, "nginx is not installed"
        self.proxy = subprocess.Popen([program, "-p", folder, "-c", folder / "nginx.conf"])
        self.direct, self.url = urls[0], "http://127.0.0.1:18080"
        time.sleep(1)

    def close(self) -> None:
        """Stop them."""
        self.proxy.terminate()
        for server in self.work:
            server.terminate()
        for server in (self.proxy, *self.work):
            server.wait(60)


def idle(servers: Servers, database: str) -> dict[str, float]:
    """Return what a server takes that has nothing to do: its share of a core, memory, connections to the database."""
    work = [psutil.Process(server.pid) for server in servers.work]
    time.sleep(3)
    before = [sum(one.cpu_times()[:2]) for one in work]
    time.sleep(IDLE_SECONDS)
    used = sum(sum(one.cpu_times()[:2]) for one in work) - sum(before)
    store = Store.open(database)
    with store.database.reading() as connection:
        query = "SELECT count(*) - 1 FROM pg_stat_activity WHERE datname = current_database()"
        connections = connection.exec_driver_sql(query).scalar_one()
    store.close()
    return {
        "core_share": round(used / IDLE_SECONDS / len(work), 4),
        "memory_mib": round(sum(one.memory_info().rss for one in work) / 2**20 / len(work)),
        "connections": connections / len(work),
    }


def clear(database: str) -> None:
    """Remove all tables."""
    store = Store.open(database)
    with store.database.writing() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--database", required=True, help="an empty database; its tables are removed")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--images", type=Path, help="folder of images for the bundle")
    parser.add_argument("--seconds", type=float, default=5)
    arguments = parser.parse_args()
    rows: list[dict[str, float | str]] = []
    clear(arguments.database)
    for batch in BATCHES:
        for writers in WRITERS:
            rate, used = inserts(arguments.database, writers=writers, batch=batch, seconds=arguments.seconds)
            row = {"what": "inserts", "writers": writers, "batch": batch, "per_second": round(rate, 1)}
            rows.append(row | {"processor_ms": round(used, 2)})
            print(rows[-1], flush=True)
    if arguments.bundle is not None:
        photos = [path.read_bytes() for path in sorted(arguments.images.rglob("*.png"))]
        for count in (1, 2):
            clear(arguments.database)
            with tempfile.TemporaryDirectory() as name:
                servers = Servers(Path(name), arguments.bundle, arguments.database, count)
                try:
                    asyncio.run(load(servers.url, servers.token, photos, 3))
                    for way, url in (("direct", servers.direct), ("nginx", servers.url)):
                        if count == 1 or way == "nginx":
                            done, again = asyncio.run(load(url, servers.token, photos, arguments.seconds))
                            rate = round(done / arguments.seconds, 1)
                            rows.append({"what": way, "servers": count, "per_second": rate, "sent_again": again})
                            print(rows[-1], flush=True)
                    rows.append({"what": "idle", "servers": count} | idle(servers, arguments.database))
                    print(rows[-1], flush=True)
                finally:
                    servers.close()
    clear(arguments.database)
    print(json.dumps({"machine": platform.platform(), "cores": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
