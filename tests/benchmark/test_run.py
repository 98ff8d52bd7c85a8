"""A table is made once: finished runs are not repeated, failures are rows with their reason."""

import json
from pathlib import Path

import pytest

from normweave.benchmark.run import run

PLAN = """
title: Small
data:
  - name: cloth
    textures: {train_images: 8, test_images: 2, defect_images: 2}
    protocols: [given]
    set: [data.subclass_from=column, prepare.height=128, prepare.width=128]
methods:
  - {name: DFM, model: dfm}
  - {name: Cannot be, model: dfm, set: [outcome.false_alarm_rate=0.001]}
seeds: [0]
"""


@pytest.mark.slow
def test_a_plan_becomes_a_table_and_is_not_run_twice(tmp_path: Path):
    plan = tmp_path / "small.yaml"
    plan.write_text(PLAN)
    output = tmp_path / "results"
    rows = run(plan, output=output, cache=tmp_path / "cache")
    assert {(row["method"], row["side"]) for row in rows} == {("DFM", "seen"), ("DFM", "unseen")}
    for row in rows:
        assert 0 <= row["image_auroc"] <= 1
        assert 0 <= row["false_alarm_rate"] <= 1
    text = (output / "small.md").read_text()
    assert "## Failed runs" in text
    assert "needed" in text
    files = sorted((output / "small.runs").iterdir())
    assert len(files) == 2
    before = [file.stat().st_mtime_ns for file in files]

    assert run(plan, output=output, cache=tmp_path / "cache") == rows
    assert [file.stat().st_mtime_ns for file in files] == before
    files[0].unlink()
    again = run(plan, output=output, cache=tmp_path / "cache")
    assert [row["image_auroc"] for row in again] == [row["image_auroc"] for row in rows]
    assert all(json.loads(file.read_text())["data"] == "cloth" for file in files)
