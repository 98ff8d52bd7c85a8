"""Builders of libraries of bundles."""

import copy
import json
import shutil
import time
from pathlib import Path

from normweave import bundle as bundles
from normweave.detector import Detector
from normweave.serve.model_store import Actor

ADA = Actor("Ada", 1)


def wait_for(condition, seconds=60):
    """Wait until a condition holds, and return its value."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def without_history(trained):
    """Return the record of a bundle that was trained, with the hashes of its files, or of a detector.

    Without its history, which has times.
    """
    record = json.loads((trained / "bundle.json").read_text()) if isinstance(trained, Path) else dict(trained)
    assert [step["action"] for step in record.pop("history")] == ["trained"]
    return record


def stricter(source, target):
    """Write a bundle with smoother maps and lower thresholds, so that scores and verdicts differ."""
    record = copy.deepcopy(bundles.read(source))
    record["config"]["maps"]["smoothing"] *= 3
    points = Detector.load(source, threads=1, device="cpu").with_rate(0.4).operating_points
    bundles.rewrite(source, target, record=record | points.as_dict())
    return target


def damage(folder):
    """Change a byte of the graph of a bundle."""
    path = Path(folder) / bundles.GRAPH
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_library(bundle, folder):
    """Make a folder with the bundle as `old`, one with other scores as `new`, and a damaged one as `torn`."""
    folder.mkdir(parents=True)
    shutil.copytree(bundle, folder / "old")
    stricter(bundle, folder / "new")
    record = copy.deepcopy(bundles.read(bundle)) | {"note": "torn"}
    bundles.rewrite(bundle, folder / "torn", record=record)
    damage(folder / "torn")
    return folder
