"""The demo, twice."""

import json

import pytest

from bundles import without_history

from .conftest import run


@pytest.mark.slow
def test_the_demo_leaves_data_bundle_and_report_and_can_be_called_again(tmp_path):
    first = run("demo", "-o", tmp_path / "demo", "--images", "8", "--json")
    assert first.exit_code == 0, first.output
    metrics = json.loads(first.stdout)
    assert metrics["seen"]["n_normal"] == 6 * 2
    assert metrics["unseen"]["n_normal"] == 4 * 2
    command = first.stderr.strip().rsplit("normweave predict ", 1)[1]
    images = run("predict", *command.split(), "--json").stdout.splitlines()
    assert len(images) == (metrics["unseen"]["n_normal"] + metrics["unseen"]["n_anomalous"]) / 4  # and no masks
    left = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"data", "cloth.bundle", "report.html", "metrics.json", "predictions.csv"} <= left
    bundle = without_history(tmp_path / "demo" / "cloth.bundle")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo" / "data").rglob("*.png")}

    again = run("demo", "-o", tmp_path / "demo", "--images", "8", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["pooled"] == metrics["pooled"]
    assert without_history(tmp_path / "demo" / "cloth.bundle") == bundle
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_folder_with_other_data_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.png").write_bytes(b"")
    result = run("demo", "-o", tmp_path)
    assert result.exit_code == 2
    assert "Choose an empty or a new folder." in result.stderr
    assert (tmp_path / "data" / "mine.png").exists()
