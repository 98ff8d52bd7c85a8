"""Throughput of `normweave predict --ray` on some nodes against `predict`, memory, and results after kills.

    python perf/bench_ray.py [--images 1500] [--rounds 3] [--nodes 1 2] [--kills 20] [--memory-images 12000]

Each node is processes of its own (`ray.cluster_utils.Cluster`) with one CPU, tied to one core, and so is `predict`
with one thread. The rate is that of the steady state: from `FIRST_PARTS` finished parts a node, since nodes start
some seconds apart, until a node has nothing left to do. Needs `[scale]`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"

import psutil
from ray.cluster_utils import Cluster

from normweave.bridges.ray_predict import RUN
from normweave.config import (
    AdaptedMoEConfig,
    Config,
    DataConfig,
    GaussianExpertConfig,
    OutcomeConfig,
    PrepareConfig,
    TimmConfig,
)
from normweave.detector import Detector
from normweave.textiles import SEEN, make_textures

COMMAND = [sys.executable, "-m", "normweave", "predict"]
STORE = 100 * 2**20
START_S = 300
FIRST_PARTS = 3
"""Parts of each node that are not counted."""
FIRST_IMAGES = 64
"""Images of `predict` that are not counted."""


class Nodes:
    """A cluster of a head without processors, and nodes with one each."""

    def __init__(self, count: int, *, tied: bool = True) -> None:
        self.tied = tied
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE},
        )
        self.nodes: list = []
        for _ in range(count):
            self.add()

    @property
    def address(self) -> str:
        """Return where the head node listens."""
        return self.cluster.address

    def add(self) -> None:
        """Add a node, and wait until it has joined: Ray waits 30 s, in which a busy machine does not start one."""
        node = self.cluster.add_node(num_cpus=1, object_store_memory=STORE, wait=False)
        self.cluster.wait_for_nodes(timeout=START_S)
        if self.tied:
            core = len(self.nodes) % os.cpu_count()
            for process in tree(node):
                process.cpu_affinity([core])  # workers inherit it
        self.nodes.append(node)

    def kill(self, node) -> None:
        """Kill every process of a node at once."""
        for process in tree(node):
            process.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def stop(self) -> None:
        """End every node."""
        self.cluster.shutdown()


def tree(node) -> list[psutil.Process]:
    """Return the processes of a node with their children."""
    found = []
    for infos in node.all_processes.values():
        for info in infos:
            process = psutil.Process(info.process.pid)
            found += [process, *process.children(recursive=True)]
    return found


@contextmanager
def nodes(count: int, *, tied: bool = True) -> Iterator[Nodes]:
    running = Nodes(count, tied=tied)
    try:
        yield running
    finally:
        running.stop()


def prepare(folder: Path, *, size: int, strides: tuple[int, ...]) -> tuple[Path, list[str]]:
    """Fit a detector to synthetic textiles; return its bundle and its test images."""
    manifest = make_textures(
        folder / "cloth", size=(size, size), seed=3, train_images=18, test_images=10, defect_images=10, seen=SEEN[:3]
    )
    detector = Detector.fit(
        manifest,
        config=Config(
            data=DataConfig(subclass_from="column", calibration="split"),
            prepare=PrepareConfig(height=size, width=size),
            features=TimmConfig(weights="random", strides=strides),
            head=AdaptedMoEConfig(expert=GaussianExpertConfig()),
            outcome=OutcomeConfig(false_alarm_rate=0.1, unknown_rate=0.1),
        ),
        use_cache=False,
        device="cpu",
    )
    bundle = detector.save(folder / "cloth.bundle")
    return bundle, sorted(str(path) for path in manifest.parent.glob("cloth/*/test/*/*.png"))


def listed(folder: Path, images: list[str], count: int) -> Path:
    """Write a list of this many images, which repeat."""
    path = folder / f"{count}.txt"
    path.write_text("".join(f"{images[number % len(images)]}\n" for number in range(count)))
    return path


def rows(output: Path) -> list[dict]:
    """Return all rows of a folder of parts or of a table, without the time of each."""
    files = sorted(output.glob("part-*")) if output.is_dir() else [output]
    found = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    for row in found:
        del row["latency_ms"]
    return found


class Rate(NamedTuple):
    """Images a second, and milliseconds of processor time of an image."""

    images_s: float
    processor_ms: float


def processor_s(processes: Iterable[psutil.Process]) -> float:
    """Return the processor time of these processes and of children that have ended."""
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # own and of children, user and system
    return total


def plain_rate(bundle: Path, images: Path, output: Path, cores: int) -> Rate:
    """Return the rate of `predict` with one thread on each of the first cores, all at once.

    The time is from the moment when each has done `FIRST_IMAGES` until the first of them ends. Of
    several, their sum is what this machine allows as many nodes at most: its cores share caches and memory.
    """
    marks: list[list[tuple[float, float]]] = [[] for _ in range(cores)]

    def predict(core: int) -> None:
        own_output = output.with_suffix(f".{core}.jsonl")
        command = ["taskset", "-c", core % os.cpu_count(), *COMMAND, bundle, "--list", images, "--threads", 1, "--json"]
        process = subprocess.Popen([*map(str, command), "-o", own_output], stdout=subprocess.PIPE, text=True)
        own = psutil.Process(process.pid)
        for _ in process.stdout:
            with suppress(psutil.ZombieProcess):
                marks[core].append((time.perf_counter(), processor_s([own])))
        assert process.wait() in (0, 1)

    with ThreadPoolExecutor(cores) as threads:
        list(threads.map(predict, range(cores)))
    start, end = max(each[FIRST_IMAGES - 1][0] for each in marks), min(each[-1][0] for each in marks)
    within = [[mark for mark in each if start <= mark[0] <= end] for each in marks]
    count = sum(len(each) - 1 for each in within)
    return Rate(count / (end - start), sum(each[-1][1] - each[0][1] for each in within) * 1000 / count)


def ray_rate(bundle: Path, images: Path, output: Path, running: Nodes) -> Rate:
    """Return the rate of `predict --ray` in the steady state; processor time is of all processes."""
    command = [*COMMAND, bundle, "--list", images, "--ray", running.address, "-o", output]
    process = psutil.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    part_images = images_of_a_part(process, output)
    parts = -(-len(images.read_text().splitlines()) // part_images)
    every: list[psutil.Process] = []  # looked for once: it takes time of the cores of the nodes
    ends = parts - len(running.nodes) + 1  # then the first node has nothing left to do
    assert ends > FIRST_PARTS * len(running.nodes), "too few images for this many nodes"
    first = start = used = 0.0
    while process.poll() is None:
        done = len(list(output.glob("part-*")))
        if done >= FIRST_PARTS * len(running.nodes) - 1 and not every:
            every = [each for node in (running.cluster.head_node, *running.nodes) for each in tree(node)]
            every += [process, *process.children(recursive=True)]
        elif done >= FIRST_PARTS * len(running.nodes) and not first:
            first, start, used = done, time.perf_counter(), processor_s(every)
        if done >= ends:
            last, end, finally_used = done, time.perf_counter(), processor_s(every)
            break
        time.sleep(0.02)
    assert process.wait() in (0, 1), process.stderr.read()
    count = (last - first) * part_images
    return Rate(count / (end - start), (finally_used - used) * 1000 / count)


def images_of_a_part(process: psutil.Popen, output: Path) -> int:
    """Return how many images a part of a run has, as soon as it has begun."""
    while not (output / RUN).exists():
        assert process.poll() is None, "the run ended before it began"
        time.sleep(0.02)
    return json.loads((output / RUN).read_text())["part_images"]


def throughput(folder: Path, *, count: int, rounds: int, node_counts: list[int]) -> None:
    bundle, images = prepare(folder, size=256, strides=(8, 16))
    listing = listed(folder, images, count)
    print(f"{count} images of 256 x 256, load of the machine {os.getloadavg()[0]:.1f} before")
    for number in range(rounds):
        plain = {cores: plain_rate(bundle, listing, folder / f"plain-{number}-{cores}", cores) for cores in node_counts}
        rates = {}
        for node_count in node_counts:
            with nodes(node_count) as running:
                output = folder / f"ray-{number}-{node_count}.jsonl"
                rates[node_count] = ray_rate(bundle, listing, output, running)
                assert rows(output) == rows(folder / f"plain-{number}-1.0.jsonl")
        print(f"round {number + 1}: every row equal; load {os.getloadavg()[0]:.1f}")
        for name, by_count in (("predict at once", plain), ("nodes", rates)):
            for node_count, rate in by_count.items():
                processor = node_count * plain[1].processor_ms / rate.processor_ms
                print(
                    f"  {node_count} {name}: {rate.images_s:.1f} images/s, {rate.images_s / by_count[1].images_s:.2f} "
                    f"times one, {rate.processor_ms:.1f} ms of processor time an image; of one predict "
                    f"{rate.images_s / plain[1].images_s:.3f} in time, {processor:.3f} in processor time",
                    flush=True,
                )


def kills(folder: Path, *, count: int, number: int, seed: int) -> None:
    """Kill nodes at random moments, some of them the head; compare with the undisturbed rows."""
    bundle, images = prepare(folder, size=64, strides=(8,))
    listing = listed(folder, images, count)
    plain = folder / "plain.jsonl"
    subprocess.run(
        [*COMMAND, bundle, "--list", listing, "--threads", "1", "-o", plain, "-q"], stdout=subprocess.DEVNULL
    )
    expected = rows(plain)
    rng, killed, run = random.Random(seed), 0, 0
    while killed < number:
        run += 1
        output = folder / f"run-{run}.jsonl"
        with_head = run % 3 == 0
        in_run, starts, resume = 0, 0, []
        while True:  # until the command ends by itself
            with nodes(2, tied=False) as running:
                starts += 1
                command = [*COMMAND, bundle, "--list", listing, "--ray", running.address, "-o", output, *resume]
                process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                while not list(output.glob("part-*")) and process.poll() is None:
                    time.sleep(0.05)
                head_killed = False
                while process.poll() is None and in_run < 4:
                    time.sleep(rng.uniform(0.2, 3.0))
                    if process.poll() is not None:
                        break
                    in_run += 1
                    if with_head and in_run == 2:
                        running.kill(running.cluster.head_node)
                        head_killed = True
                        break
                    running.kill(running.nodes.pop(rng.randrange(len(running.nodes))))
                    running.add()
                begun = time.perf_counter()
                _, errors = process.communicate()
                if head_killed:
                    print(f"  head killed: code {process.returncode} after {time.perf_counter() - begun:.1f} s")
                    if process.returncode not in (0, 1):  # else it had just finished
                        assert process.returncode == 2, errors
                        resume = ["--resume"]
                        continue
                assert process.returncode in (0, 1), errors
                break
        killed += in_run
        found = rows(output)
        print(f"run {run}: {in_run} kills, {starts} starts, {len(found)} rows, equal: {found == expected}", flush=True)
        assert found == expected
    print(f"{killed} kills, every run equal to the undisturbed one")


def memory(folder: Path, *, count: int) -> None:
    """Print the memory of all processes of a local cluster while many images are predicted."""
    bundle, images = prepare(folder, size=64, strides=(8,))
    listing = listed(folder, images, count)
    output = folder / "memory.jsonl"
    command = [*COMMAND, bundle, "--list", listing, "--ray", "local", "-o", output, "-q"]
    process = psutil.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    part_images = images_of_a_part(process, output)
    while process.poll() is None:
        time.sleep(5)
        try:
            found = [process, *process.children(recursive=True)]
            own = {each.pid: each.memory_full_info().uss / 2**20 for each in found}
        except psutil.NoSuchProcess:
            continue
        parts = len(list(output.glob("part-*")))
        print(f"{parts * part_images:6d} images: {sum(own.values()):.0f} MiB in {len(own)} processes", flush=True)
    found = rows(output)
    print(f"{len(found)} rows")
    assert len(found) == count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2], help="numbers of nodes, beside one")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kill-images", type=int, default=6000)
    parser.add_argument("--memory-images", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for part, wanted in (("throughput", given.rounds), ("kills", given.kills), ("memory", given.memory_images)):
        if not wanted:
            continue
        folder = Path(tempfile.mkdtemp())
        try:
            if part == "throughput":
                throughput(folder, count=given.images, rounds=given.rounds, node_counts=sorted({1, *given.nodes}))
            elif part == "kills":
                kills(folder, count=given.kill_images, number=given.kills, seed=given.seed)
            else:
                memory(folder, count=given.memory_images)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
