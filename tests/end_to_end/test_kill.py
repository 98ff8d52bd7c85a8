"""kill -9 anywhere in a training, then `--resume`: the bundle is that of an undisturbed run, but for its history."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bundles import without_history

# Runs `normweave train ...` and kills itself, as kill -9 does, at the n-th call of a function.
KILLED = """
import importlib, os, signal, sys
place, count, *arguments = sys.argv[1:]
module_name, _, path = place.partition(":")
owner = importlib.import_module(module_name)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
whole, calls = getattr(owner, name), 0
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args, **kwargs)
setattr(owner, name, counted)
from normweave.cli import main
sys.argv = ["normweave", *arguments]
main()
"""

TRAIN = (
    "--subclass-from",
    "column",
    "--set",
    "prepare.height=64",
    "--set",
    "prepare.width=64",
    "--set",
    "data.folds=2",
    "--set",
    "head.expert.kind=discriminator",
    "--set",
    "head.routing.method=network",
    "--set",
    "head.routing.training.epochs=4",
    "--set",
    "head.expert.training.epochs=6",
    "--seed",
    "5",
    "-q",
)


def run(*command: str) -> int:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(f"exit {done.returncode}: {done.stderr[-2000:]}")
    return done.returncode


@pytest.fixture(scope="module")
def undisturbed(cloth: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = [str(cloth), "-o", str(folder / "bundle"), "--cache", str(folder / "cache"), *TRAIN]
    assert run("-m", "normweave", "train", *arguments) == 0
    return without_history(folder / "bundle")


KILLS = {
    "while features are cached": ("normweave.data.prepare:Preparation.apply", 45),
    "while training, before a checkpoint of the second stage": ("normweave.training:write_checkpoint", 7),
    "while saving, before the rename": ("normweave.bundle:os.replace", 1),
}


@pytest.mark.slow
def test_resume_gives_the_bundle_of_an_undisturbed_run(cloth: Path, undisturbed: dict[str, object], tmp_path: Path):
    """One training that is killed at each place, each time further on."""
    bundle = tmp_path / "bundle"
    arguments = ["train", str(cloth), "-o", str(bundle), "--cache", str(tmp_path / "cache"), *TRAIN]
    for moment, (place, count) in KILLS.items():
        assert run("-c", KILLED, place, str(count), *arguments, "--resume") == -signal.SIGKILL, moment
        assert not bundle.exists(), moment
    assert run("-m", "normweave", *arguments, "--resume") == 0
    assert without_history(bundle) == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "cache"]
