"""A plan that is killed is finished by the same command, and its table is the one that it would have been."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from normweave.benchmark.run import run
from normweave.benchmark.table import COSTS

PLAN = """
title: To be killed
data:
  - name: cloth
    textures: {train_images: 8, test_images: 2, defect_images: 2}
    protocols: [given]
    set: [data.subclass_from=column, prepare.height=64, prepare.width=64]
methods:
  - {name: First, model: dfm}
  - {name: Second, model: simplenet, set: [head.training.epochs=1]}
"""
PATIENCE_S = 240


def table(path: Path) -> list[dict[str, str]]:
    """Every number but what a run cost, which differs from time to time."""
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in COSTS} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_killed_plan_goes_on_where_it_was(tmp_path: Path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)
    output, cache = tmp_path / "killed", tmp_path / "cache"
    command = [
        sys.executable,
        "-m",
        "normweave",
        "benchmark",
        str(plan),
        "-o",
        str(output),
        "--cache",
        str(cache),
    ]
    process = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    runs = output / "plan.runs"
    end = time.monotonic() + PATIENCE_S
    while not list(runs.glob("*.json")):
        assert process.poll() is None, "the plan ended by itself"
        assert time.monotonic() < end, "no run was finished"
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)  # the plan alone: its run must end by itself
    process.wait()
    psutil.wait_procs(children, timeout=30)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]

    finished = {file: file.stat().st_mtime_ns for file in runs.glob("*.json")}
    assert len(finished) == 1, "killed too late to say anything"
    assert not (output / "plan.csv").exists()

    again = run(plan, output=output, cache=cache)
    whole = run(plan, output=tmp_path / "whole", cache=tmp_path / "other-cache")

    assert {file: file.stat().st_mtime_ns for file in finished} == finished  # not repeated
    assert len(list(runs.glob("*.json"))) == 2
    assert [row["method"] for row in again] == [row["method"] for row in whole]
    assert table(output / "plan.csv") == table(tmp_path / "whole" / "plan.csv")
    for suffix in (".md", ".html", ".parquet"):
        assert (output / f"plan{suffix}").stat().st_size > 0
