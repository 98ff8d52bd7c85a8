"""Each item has its result; a task is repeated if its process ends, and not if it raises."""

import os
from pathlib import Path

import pytest

import ray_work
from normweave.bridges import ray_tasks
from normweave.bridges.ray_tasks import RETRIES


@pytest.fixture(autouse=True)
def no_network():
    """Connections to this machine are allowed, unlike in the other tests of this folder."""


@pytest.mark.slow
def test_results_are_saved_and_failures_have_their_reasons(tmp_path, monkeypatch):
    tests = str(Path(ray_work.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))  # of the workers
    texts = ["one", "raise", "end once", "end", "token"]
    seen = []
    failed = ray_tasks.run(
        "local",
        ray_work.write_or_fail,
        [(str(tmp_path), text) for text in texts],
        save=ray_work.save,
        progress=lambda *step: seen.append(step),
    )
    assert failed[0] == (1, "ValueError: not this one")
    assert failed[1][0] == 3
    assert failed[1][1].startswith("the loss of its worker, 4 times (")
    results = {path.stem: path.read_text() for path in tmp_path.glob("*.result")}
    assert results == {"one": "ONE", "end once": "END ONCE", "token": "token 64 0"}  # own token, nothing sent
    attempts = {path.stem: path.stat().st_size for path in tmp_path.glob("*.attempts")}
    assert attempts == {"one": 1, "raise": 1, "end once": 2, "end": RETRIES + 1, "token": 1}
    assert [step for step in seen if step[1] == len(texts)] == [("runs", 5, 5)]
