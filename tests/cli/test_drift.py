"""`normweave drift` on results and on a store."""

import json
import re
import shutil
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from PIL import Image

from inspections import inspection
from normweave import bundle as bundles
from normweave.serve.store import Store
from normweave.textiles import SEEN, render

from .conftest import run


@pytest.fixture(scope="module")
def results(bundle, tmp_path_factory):
    """Results of 40 good images, then of 80 under a lamp that has lost a seventh of its light."""
    folder = tmp_path_factory.mktemp("line")
    for number in range(120):
        pixels = render(SEEN[number % 3], seed=500 + number, size=(64, 64)).image
        gain = 1.0 if number < 40 else 0.85
        Image.fromarray(np.rint(gain * pixels).astype(np.uint8)).save(folder / f"{number:03}.png")
    table = folder / "results.jsonl"
    done = run("predict", bundle, folder, "--output", table)
    assert done.exit_code in (0, 1), done.output
    return table


def test_the_lamp_was_changed(bundle, results):
    done = run("drift", bundle, "--results", results)
    assert done.exit_code == 1, done.output
    assert "ALARM: lighting or camera" in done.stdout
    assert "brightness -" in done.stdout
    assert re.search(r"  evidence  (more than )?[\d,]+ : 1 \(alarm from [\d,]+ : 1\)", done.stdout)
    assert "normweave calibrate" in done.stdout
    assert "images 1 to 100" in done.stdout


def test_json_has_the_findings_the_alarms_and_the_windows(bundle, results):
    done = run("drift", bundle, "--results", results, "--json", "--seed", "3")
    assert done.exit_code == 1
    output = json.loads(done.stdout)
    assert output["images"] == 120
    assert output["alarm_rate"] == 0.01
    first = output["findings"][0]
    assert first["cause"] == "lighting or camera"
    assert int(first["since"].rpartition("/")[2].removesuffix(".png")) in range(25, 70)
    assert ("contrast", -1) in {(alarm["statistic"], alarm["sign"]) for alarm in output["alarms"]}
    assert output["windows"][0]["standard_deviations"]["brightness"] < 0


def test_a_quiet_line_has_no_alarm(bundle, results, tmp_path):
    quiet = tmp_path / "quiet.jsonl"
    quiet.write_text("".join(results.read_text().splitlines(keepends=True)[:40]))
    done = run("drift", bundle, "--results", quiet)
    assert done.exit_code == 0, done.output
    assert "No alarm in 40 images." in done.stdout


def test_the_store_of_a_server_is_read(bundle, results, tmp_path):
    (tmp_path / "data").mkdir()
    store = Store.open(tmp_path / "data" / "store.sqlite")
    kept = []
    for number, line in enumerate(results.read_text().splitlines()):
        row = json.loads(line)
        made = inspection(number)
        fields = {name: row[name] for name in vars(made.outcome) if name not in ("boxes", "experts", "anomaly_map")}
        outcome = replace(made.outcome, **fields, boxes=(), experts=())
        kept.append(replace(made, outcome=outcome, received_at=made.received_at + timedelta(minutes=2 * number)))
    store.add(kept)
    store.close()
    done = run("drift", bundle, "--store", tmp_path / "data", "--by", "hour", "--json")
    output = json.loads(done.stdout)
    assert (done.exit_code, output["findings"][0]["cause"]) == (1, "lighting or camera")
    assert len({window["window"] for window in output["windows"]}) >= 2
    assert output["findings"][0]["since"].isdecimal()
    of_line = run("drift", bundle, "--store", tmp_path / "data", "--line", kept[0].line, "--json")
    assert json.loads(of_line.stdout) == output
    other = run("drift", bundle, "--store", tmp_path / "data", "--line", "Press 99")
    assert (other.exit_code, "No image of" in other.output) == (2, True)
    of_file = run("drift", bundle, "--results", results, "--line", "Press 99")
    assert (of_file.exit_code, "--line chooses inspections of a store" in of_file.output) == (2, True)


def test_wrong_calls(bundle, results, tmp_path):
    neither = run("drift", bundle)
    assert (neither.exit_code, "either --store or --results" in neither.output) == (2, True)
    nothing = run("drift", bundle, "--store", tmp_path)
    assert (nothing.exit_code, "holds no store.sqlite" in nothing.output) == (2, True)
    old = shutil.copytree(bundle, tmp_path / "old.bundle")
    record = {name: value for name, value in bundles.read(old).items() if name != "drift"}
    bundles.rewrite(old, old, record=record, overwrite=True)
    without = run("drift", old, "--results", results)
    assert (without.exit_code, "normweave calibrate" in without.output) == (2, True)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    none = run("drift", bundle, "--results", empty)
    assert (none.exit_code, "No image of" in none.output) == (2, True)
