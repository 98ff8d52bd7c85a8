"""`bundle show`, `diff` and `verify` print text or JSON."""

import json

import pytest

from normweave.detector import Detector

from .conftest import run


@pytest.fixture(scope="module")
def lower(fusion_bundle, tmp_path_factory):
    """The same bundle with thresholds for another rate."""
    return Detector.load(fusion_bundle).with_rate(0.2).save(tmp_path_factory.mktemp("lower") / "lower.bundle")


def test_a_bundle_is_shown_with_its_history(fusion_bundle):
    result = run("bundle", "show", fusion_bundle)
    assert result.exit_code == 0, result.output
    assert "all together" in result.stdout
    assert " trained" in result.stdout
    assert "model.onnx" in result.stdout
    found = json.loads(run("bundle", "show", fusion_bundle, "--json").stdout)
    assert found["history"][0]["action"] == "trained"


def test_two_bundles_are_compared(fusion_bundle, lower):
    result = run("bundle", "diff", fusion_bundle, lower)
    assert result.exit_code == 0, result.output
    assert "settings: outcome.false_alarm_rate 0.1 -> 0.2" in result.stdout
    assert "threshold of all together" in result.stdout
    assert json.loads(run("bundle", "diff", fusion_bundle, lower, "--json").stdout)["settings"]
    assert run("bundle", "diff", lower, lower).stdout == "no difference\n"


def test_a_bundle_is_verified(trained, fusion_bundle, lower):
    result = run("bundle", "verify", fusion_bundle)
    assert result.exit_code == 0, result.output
    assert "5 files have the recorded hash" in result.stdout
    assert "stored images agree" in result.stdout
    assert json.loads(run("bundle", "verify", fusion_bundle, "--json").stdout)["check"]["tiles"] > 0
    (lower / "model.onnx").write_bytes(b"")
    assert run("bundle", "verify", lower).exit_code == 2
