"""Time and memory of a fresh process until its first verdict, and time of `normweave --help`.

`normweave predict BUNDLE IMAGE --json` (ONNX Runtime and OpenVINO) is compared with anomalib's OpenVINOInferencer with
PaDiM on the same backbone, fitted on the same images. Runs alternate, so that other load of the machine affects all
equally. Ratios are computed within a round.

python perf/bench_start.py            # table, then one JSON line
python perf/bench_start.py | tail -1  # for a script
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import peers
from bench_inference import fitted, make_subclasses
from normweave.config import Config
from normweave.detector import Detector

ROUNDS = 7
EXPERTS = 4

PREDICT = """
import sys
from normweave.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
ANOMALIB = """
import sys
from anomalib.deploy import OpenVINOInferencer
output = OpenVINOInferencer(path=sys.argv[1], device="CPU").predict(sys.argv[2])
print(output.pred_score, output.pred_label)
"""


class Run(NamedTuple):
    """Time and memory of one process."""

    wall_s: float
    processor_s: float
    peak_mib: float


# Started from a small process: the peak of a process forked from a large one includes the memory of the large one.
LAUNCH = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
wall = time.perf_counter() - start
used = resource.getrusage(resource.RUSAGE_CHILDREN)
assert done.returncode in (0, 1) and done.stdout, done  # 1: not normal
print(json.dumps([wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def run(*command: str, folder: Path) -> Run:
    """Run one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Run(*json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_subclasses(folder, EXPERTS)
        detector = fitted(folder, Config())
        bundle = detector.save(folder / "cloth.bundle")
        paths = sorted(str(path) for path in folder.glob("cloth/*/train/good/*"))
        image = paths[0]
        padim = peers.fitted("padim", tuple(paths))
        exported = Path(padim.to_openvino(folder / "padim", input_size=(256, 256)))
        # Check the results before measuring the time.
        assert Detector.load(bundle, threads=1).score(image).verdict == detector.score(image).verdict
        predict = ["predict", str(bundle), image, "--json", "--threads", str(arguments.threads)]
        commands = {
            "normweave --help": ["-m", "normweave", "--help"],
            "normweave onnxruntime": ["-c", PREDICT, *predict, "--device", "cpu"],
            "normweave openvino": ["-c", PREDICT, *predict, "--device", "openvino"],
            "anomalib OpenVINOInferencer": ["-c", ANOMALIB, str(exported), image],
        }
        runs: dict[str, list[Run]] = {side: [] for side in commands}
        for number in range(ROUNDS + 1):
            for side, command in commands.items():
                one = run(*command, folder=folder)
                if number:  # the first round fills the file cache, and anomalib's cache of compiled models
                    runs[side].append(one)
    rows = []
    for side, ours in runs.items():
        pairs = list(zip(ours, runs["anomalib OpenVINOInferencer"], strict=True))
        row = {"side": side}
        for field in Run._fields:
            row[field] = statistics.median(getattr(one, field) for one in ours)
            row[f"{field}_ratio"] = statistics.median(
                getattr(one, field) / getattr(other, field) for one, other in pairs
            )
        rows.append(row)
        print(
            "{side:<28}  wall {wall_s:5.2f} s ({wall_s_ratio:.2f})  processor {processor_s:5.2f} s "
            "({processor_s_ratio:.2f})  peak {peak_mib:6.0f} MiB ({peak_mib_ratio:.2f})".format(**row)
        )
    machine = {
        "machine": platform.platform(),
        "python": platform.python_version(),
        "threads": arguments.threads,
    }
    print(json.dumps(machine | {"rounds": ROUNDS, "rows": rows}))


if __name__ == "__main__":
    main()
