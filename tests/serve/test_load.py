"""A hundred concurrent clients, without and beside attacks.

The benchmark compares the answers with the images, and the store with the answers.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "perf" / "bench_serve.py"


@pytest.mark.slow
def test_a_hundred_clients(bundle, photos, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(photos):
        (images / f"{number:03d}.png").write_bytes(Path(path).read_bytes())
    command = [sys.executable, BENCH, "--bundle", bundle, "--images", images, "--clients", "100"]
    done = subprocess.run([*command, "--attack", "--seconds", "6"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["attacked"] for row in rows] == [False, True]
    for row in rows:
        assert (row["wrong"], row["lost"]) == (0, 0)
        assert row["images"] > 100  # as many as there are clients, at the least
        assert row["refused"] > 0  # more images were sent than may wait
