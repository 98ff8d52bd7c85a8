"""A supervised command ends with the process that started it."""

import os
import subprocess
import sys
import time

from normweave.supervised import ENDED

PROGRAM = (sys.executable, "-m", "normweave.supervised")


def test_with_an_open_input_the_command_runs_to_its_end():
    stdin, alive = os.pipe()
    process = subprocess.Popen([*PROGRAM, "--version"], stdin=stdin, stdout=subprocess.PIPE, text=True)
    os.close(stdin)
    output, _ = process.communicate(timeout=60)
    os.close(alive)
    assert process.returncode == 0
    assert "0.1.0" in output


def test_at_the_end_of_its_input_the_command_ends(cloth, tmp_path):
    stdin, alive = os.pipe()
    arguments = ["train", str(cloth.parent), "-o", str(tmp_path / "new.bundle")]
    process = subprocess.Popen(
        [*PROGRAM, *arguments], stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(stdin)
    time.sleep(1)
    assert process.poll() is None
    os.close(alive)
    assert process.wait(timeout=60) == ENDED
    assert not (tmp_path / "new.bundle").exists()
