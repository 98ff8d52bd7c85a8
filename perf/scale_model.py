"""Cost of a million images, and a simulation of many lines with bursts and failures: what is full first.

The lines are divided into cells. A cell is a PostgreSQL database, hosts, and the servers of its lines, two for each.
All parameters are options. The defaults are measured or assumed (docs/scale.md states which); the prices are assumed.

python perf/scale_model.py                          # the tables of docs/scale.md
python perf/scale_model.py --lines 200 --hours 1
"""

import argparse
import json
import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

MONTH_HOURS = 730


@dataclass(frozen=True, kw_only=True)
class Model:
    """Parameters."""

    lines: int = 1000
    cell_lines: int = 40
    """Lines of one database."""
    images_second: float = 2.0
    """Of a line while it runs."""
    on_share: float = 0.6
    """Share of the time in which a line runs."""
    burst_factor: float = 4.0
    """Of the rate in a burst, e.g. of buffered parts after a stop."""
    burst_seconds: float = 30.0
    burst_hours: float = 1.0
    """Mean time between two bursts of a line."""
    restart_share: float = 0.5
    """Share of the lines that have a burst in the same moment, once: the factory starts again."""
    core_images_second: float = 50.0
    host_cores: int = 8
    host_gib: float = 32.0
    replica_gib: float = 0.4
    """Memory of a server."""
    replica_connections: float = 5.0
    """Connections of a server to PostgreSQL."""
    replica_idle: float = 0.01
    """Share of a core that a server takes without images."""
    line_replicas: int = 2
    load: float = 0.5
    """Wanted use of the cores at the mean rate."""
    waiting_images: int = 64
    """That a server accepts; beyond it the answer is 429, and the image is sent again."""
    database_transactions_second: float = 100.0
    """One after the other, since ids become visible in their order."""
    batch_images: float = 16.0
    """Inspections in a full transaction."""
    batch_gain: float = 4.5
    """How many times more inspections a second full transactions store than those with one."""
    database_connections: float = 500.0
    image_bytes: float = 300_000.0
    grids_bytes: float = 5_000.0
    row_bytes: float = 2_000.0
    """Of an inspection in PostgreSQL with its indexes."""
    keep_days: float = 90.0
    read_share: float = 0.05
    """Images that a person or a program reads again."""
    host_seconds: float = 120.0
    """Until a host that failed is back."""
    failover_seconds: float = 30.0
    """Until another PostgreSQL has taken the place of one that failed."""
    streams: int = 1
    """Event streams of each line."""
    core_euros_hour: float = 0.04
    database_euros_hour: float = 0.40
    storage_euros_gb_month: float = 0.022
    put_euros_million: float = 5.0
    get_euros_million: float = 0.4

    @property
    def line_rate(self) -> float:
        """Mean images a second of a line."""
        burst = 1 + (self.burst_factor - 1) * self.burst_seconds / (3600 * self.burst_hours)
        return self.images_second * self.on_share * burst

    @property
    def cells(self) -> int:
        """Number of databases."""
        return math.ceil(self.lines / self.cell_lines)

    @property
    def cell_hosts(self) -> int:
        """Hosts of a cell: enough cores and memory, and one more, which may fail."""
        servers = self.cell_lines * self.line_replicas
        cores = self.cell_lines * self.line_rate / self.core_images_second + servers * self.replica_idle
        by_cores = cores / self.load / self.host_cores
        by_memory = servers * self.replica_gib / (0.8 * self.host_gib)
        return 1 + math.ceil(max(by_cores, by_memory))


def costs(model: Model) -> dict[str, float]:
    """Return euros for a million images by their cause."""
    hours = 1e6 / (model.cells * model.cell_lines * model.line_rate) / 3600
    stored_gb = 1e6 * (model.image_bytes + model.grids_bytes) / 1e9
    months = model.keep_days * 24 / MONTH_HOURS
    return {
        "hosts": model.cells * model.cell_hosts * model.host_cores * model.core_euros_hour * hours,
        "databases": model.cells * model.database_euros_hour * hours,
        "storage of images": stored_gb * months * model.storage_euros_gb_month,
        "requests to the object store": 2 * model.put_euros_million + 2 * model.read_share * model.get_euros_million,
    }


def limits(model: Model) -> list[tuple[str, float]]:
    """Return the number of lines at which each resource of one cell is full, the lowest first."""
    rate = model.line_rate
    found = {
        "connections to PostgreSQL at its default of 100": 97 / (model.line_replicas * model.replica_connections),
        f"connections to PostgreSQL at {model.database_connections:g}": model.database_connections
        / (model.line_replicas * model.replica_connections),
        "memory of one host": 0.8 * model.host_gib / (model.line_replicas * model.replica_gib),
        "cores of one host": model.host_cores
        / (rate / model.core_images_second + model.line_replicas * model.replica_idle),
        "inserts, one inspection in each transaction": model.database_transactions_second / rate,
        "inserts, full transactions": model.database_transactions_second * model.batch_gain / rate,
        "a database of 1 TB": 1e12 / (rate * 86400 * model.keep_days * model.row_bytes),
        "object store, 3,500 writes a second for a prefix": 3500 / (2 * rate),
    }
    return sorted(found.items(), key=lambda item: item[1])


def arrivals(model: Model, seconds: int, restart: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """Return the images of each line of a cell in each second, (lines, seconds).

    Args:
        restart: second in which `restart_share` of the lines have a burst.
    """
    rate = np.zeros((model.cell_lines, seconds))
    for line in rate:
        at, running = 0, bool(draw.random() < model.on_share)
        while at < seconds:  # a line stands still for ten minutes in the mean
            mean = 600 * (model.on_share / max(1e-9, 1 - model.on_share) if running else 1)
            length = max(1, int(draw.exponential(mean)))
            line[at : at + length] = model.images_second * running
            at, running = at + length, not running
        for start in draw.uniform(0, seconds, draw.poisson(seconds / (3600 * model.burst_hours))):
            line[int(start) : int(start + model.burst_seconds)] *= model.burst_factor
        if draw.random() < model.restart_share:
            line[restart : restart + int(model.burst_seconds)] = model.images_second * model.burst_factor
    return draw.poisson(rate)


def simulate(model: Model, *, hours: float, seed: int) -> dict[str, float]:
    """Return what happens in all cells, second by second.

    In each cell, the factory starts again after a quarter of the time, a host fails after half of it, and PostgreSQL
    after three quarters.
    """
    draw, seconds = np.random.default_rng(seed), int(hours * 3600)
    hosts, failed = model.cell_hosts, seconds // 2
    first, second = np.arange(model.cell_lines) % hosts, (np.arange(model.cell_lines) + 1) % hosts
    room = model.cell_lines * model.line_replicas * model.waiting_images / hosts
    power = model.host_cores * model.core_images_second
    total, again_total, left = 0, 0.0, 0.0
    waits, most_stored, most_scored = [], 0.0, 0.0
    for _ in range(model.cells):
        new = arrivals(model, seconds, seconds // 4, draw)
        queue, again, to_store = np.zeros(hosts), 0.0, 0.0
        for now in range(seconds):
            down = failed <= now < failed + model.host_seconds
            first_share = np.where(down & (first == 0), 0.0, np.where(down & (second == 0), 1.0, 0.5))
            offered = np.bincount(first, new[:, now] * first_share, hosts)
            offered += np.bincount(second, new[:, now] * (1 - first_share), hosts)
            alive = np.ones(hosts)
            alive[0] = not down
            if now == failed:  # what was not answered is sent again to the other server of the line
                again, queue[0] = again + queue[0], 0.0
            offered += again * alive / alive.sum()
            accepted = np.minimum(offered, alive * np.maximum(0.0, room + power - queue - to_store / hosts))
            again = float((offered - accepted).sum())
            again_total += again
            queue += accepted
            scored = np.minimum(queue, alive * power)
            queue -= scored
            to_store += scored.sum()
            size = min(model.batch_images, max(1.0, to_store / model.cell_lines))  # who waits fills transactions
            gain = 1 + (model.batch_gain - 1) * (size - 1) / (model.batch_images - 1)
            broken = 3 * seconds // 4 <= now < 3 * seconds // 4 + model.failover_seconds
            stored = 0.0 if broken else min(to_store, model.database_transactions_second * gain)
            to_store -= stored
            rate = max(1.0, new[:, max(0, now - 60) : now + 1].sum() / min(now + 1, 61))
            waits.append((queue.sum() + to_store + again) / rate)  # by Little's law
            most_scored, most_stored = max(most_scored, float(queue.sum())), max(most_stored, to_store)
        total += int(new.sum())
        left += float(queue.sum()) + to_store + again
    return {
        "cells": model.cells,
        "hosts": model.cells * hosts,
        "servers": model.cells * model.cell_lines * model.line_replicas,
        "images": total,
        "images a second": total / seconds,
        "sent again, share": again_total / total,
        "p99 of the wait in a queue, s": float(np.quantile(waits, 0.99)),
        "longest wait in a queue, s": float(np.max(waits)),
        "most images that wait for cores in a cell": most_scored,
        "most images that wait for a database": most_stored,
        "images not stored at the end": left,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in fields(Model):
        number = int if isinstance(field.default, int) else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=number, default=field.default)
    parser.add_argument("--hours", type=float, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    hours, seed = given.pop("hours"), given.pop("seed")
    model = Model(**given)
    cost, full, result = costs(model), limits(model), simulate(model, hours=hours, seed=seed)
    print("| euros for a million images | |\n| --- | --- |")
    for name, euros in (cost | {"together": sum(cost.values())}).items():
        print(f"| {name} | {euros:.2f} |")
    print("\n| in one cell, full at this number of lines | |\n| --- | --- |")
    for name, lines in full:
        print(f"| {name} | {lines:,.0f} |")
    print(f"\n| {model.lines:,} lines, {hours:g} h, seed {seed} | |\n| --- | --- |")
    for name, value in result.items():
        print(f"| {name} | {value:,.0f} |" if value >= 100 or value == int(value) else f"| {name} | {value:.2g} |")
    print(json.dumps({"costs": cost, "limits": dict(full), "simulation": result}))


if __name__ == "__main__":
    main()
