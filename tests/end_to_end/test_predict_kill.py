"""kill -9 anywhere in a `predict`, then `--resume`: the table is that of an undisturbed run."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# Runs `normweave predict ...` and kills itself, as kill -9 does, while it writes the n-th row: half a line is there.
KILLED = """
import os, signal, sys
from normweave.cli import main, results
count, *arguments = sys.argv[1:]
write, calls = results.ResultWriter.write, 0
def counted(self, row):
    global calls
    calls += 1
    if calls == int(count):
        self._file.write(b'{"image_path": "torn')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, row)
results.ResultWriter.write = counted
sys.argv = ["normweave", *arguments]
main()
"""


def run(*command: str) -> int:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600, check=False)
    if done.returncode not in (0, 1, 4, -signal.SIGKILL):
        raise AssertionError(f"exit {done.returncode}: {done.stderr[-2000:]}")
    return done.returncode


def rows(path: Path) -> list[dict[str, object]]:
    """Return a table without its times, and with the file names of the maps instead of their paths."""
    match path.suffix:
        case ".parquet":
            from pyarrow import parquet

            found = parquet.read_table(path).to_pylist()
        case ".csv":
            import csv

            with path.open(newline="") as file:
                found = list(csv.DictReader(file))
        case _:
            found = [json.loads(text) for text in path.read_text("utf-8").splitlines()]
    for row in found:
        del row["latency_ms"]
        if row["anomaly_map"]:
            row["anomaly_map"] = Path(row["anomaly_map"]).name
    return found


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_resume_gives_the_table_of_an_undisturbed_run(ending: str, bundle: Path, photos: list[str], tmp_path: Path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    images = [*photos[:6], str(broken), *photos[6:]]
    (tmp_path / "list.txt").write_text("\n".join(images))

    def call(name: str) -> list[str]:
        table, maps = tmp_path / f"{name}.{ending}", tmp_path / f"{name}-maps"
        own = ["-o", str(table), "--maps", str(maps), "--list", str(tmp_path / "list.txt")]
        return ["predict", str(bundle), *own, "--threads", "1"]

    undisturbed = run("-m", "normweave", *call("whole"))
    assert undisturbed == 4
    for count in (1, 4, 6):  # before the first row, inside the second batch, and once more
        assert run("-c", KILLED, str(count), *call("killed"), *(["--resume"] if count > 1 else [])) == -signal.SIGKILL
    assert not (tmp_path / f"killed.{ending}").exists()
    assert run("-m", "normweave", *call("killed"), "--resume") == undisturbed

    expected, got = rows(tmp_path / f"whole.{ending}"), rows(tmp_path / f"killed.{ending}")
    assert [row["image_path"] for row in got] == images
    assert got == expected
    whole, killed = (sorted((tmp_path / f"{name}-maps").iterdir()) for name in ("whole", "killed"))
    assert [path.name for path in whole] == [path.name for path in killed]
    for one, other in zip(whole, killed, strict=True):
        if one.suffix == ".npy":
            np.testing.assert_array_equal(np.load(one), np.load(other))
