"""The command passes its options to the benchmark and prints the table."""

import json
from pathlib import Path

import pytest

from normweave.benchmark import run as benchmark
from normweave.errors import DataError

from .conftest import run

ONE_MACHINE = {"ray": None, "threads": None, "progress": None}
ROWS = [{"method": "DFM", "image_auroc": 0.5}]


@pytest.fixture
def calls(monkeypatch):
    """The calls of the benchmark, which writes a table and measures nothing."""
    calls = []

    def fake(plan, *, output, **options):
        calls.append((plan, output, options))
        output.mkdir()
        (output / "small.md").write_text("| method | AUROC |\n")
        return ROWS

    monkeypatch.setattr(benchmark, "run", fake)
    return calls


def test_options_are_passed_on(calls, tmp_path):
    folders = {"root": tmp_path / "data", "cache": tmp_path / "cache"}
    result = run(
        *("benchmark", "plans/small.yaml", "-o", tmp_path / "results", "--jobs", 3),
        *("--root", folders["root"], "--cache", folders["cache"]),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == "| method | AUROC |\n\n"
    assert calls == [(Path("plans/small.yaml"), tmp_path / "results", folders | ONE_MACHINE | {"jobs": 3})]


def test_threads_are_those_of_a_run(calls, tmp_path):
    run("benchmark", "small.yaml", "-o", tmp_path / "results", "--jobs", 2, "--threads", 1)
    assert (calls[0][2]["jobs"], calls[0][2]["threads"]) == (2, 1)


def test_json_holds_the_rows_and_the_path_of_the_table(calls, tmp_path):
    result = run("benchmark", "small.yaml", "-o", tmp_path / "results", "--json")
    assert json.loads(result.stdout) == {"table": str(tmp_path / "results" / "small.md"), "rows": ROWS}
    assert calls[0][2] == ONE_MACHINE | {"root": None, "jobs": 1, "cache": None}


def test_a_failed_benchmark_has_exit_code_2(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise DataError("Every run failed.")

    monkeypatch.setattr(benchmark, "run", fail)
    result = run("benchmark", "small.yaml", "-o", tmp_path / "results")
    assert (result.exit_code, "Every run failed." in result.output) == (2, True)


def test_a_missing_plan_is_named(tmp_path):
    result = run("benchmark", tmp_path / "gone.yaml", "-o", tmp_path / "results")
    assert result.exit_code == 2
    assert "gone.yaml" in result.output


def test_a_cluster_is_passed_on_with_the_threads_of_a_run(calls, tmp_path):
    result = run("benchmark", "small.yaml", "-o", tmp_path / "results", "--ray", "10.0.0.5:6379", "--threads", 2)
    assert result.exit_code == 0, result.output
    assert (calls[0][2]["ray"], calls[0][2]["threads"]) == ("10.0.0.5:6379", 2)


def test_jobs_and_a_cluster_exclude_each_other(calls, tmp_path):
    result = run("benchmark", "small.yaml", "-o", tmp_path / "results", "--ray", "local", "--jobs", 2)
    assert (result.exit_code, calls) == (2, [])
    assert "--jobs is not possible with --ray" in result.stderr
