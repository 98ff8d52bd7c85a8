"""`bundle show`, `diff` and `verify` print text or JSON."""

import json

import pytest

from normweave import bundle
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


def test_a_step_that_was_edited_is_shown(fusion_bundle, tmp_path):
    record = bundle.read(fusion_bundle) | {"history": [{"action": "moved"}]}
    bundle.rewrite(fusion_bundle, tmp_path / "edited", record=record)
    result = run("bundle", "show", tmp_path / "edited")
    assert (result.exit_code, "? moved, ? images, normweave ?\n" in result.stdout) == (0, True)


def test_two_bundles_are_compared(fusion_bundle, lower):
    result = run("bundle", "diff", fusion_bundle, lower)
    assert result.exit_code == 0, result.output
    assert "settings: outcome.false_alarm_rate 0.1 -> 0.2" in result.stdout
    assert "threshold of all together" in result.stdout
    assert json.loads(run("bundle", "diff", fusion_bundle, lower, "--json").stdout)["settings"]
    assert run("bundle", "diff", lower, lower).stdout == "no difference\n"


def test_what_only_the_first_has_is_a_difference(fusion_bundle, tmp_path):
    """Otherwise a bundle that was changed and changed back would be called equal in one direction only."""
    record = bundle.read(fusion_bundle)
    step = record["history"][0] | {"action": "removed", "subclass": "cloth/twill"}
    bundle.rewrite(fusion_bundle, tmp_path / "longer", record=record | {"history": [*record["history"], step]})
    assert "only in the first: 20" in run("bundle", "diff", tmp_path / "longer", fusion_bundle).stdout
    assert "only in the second: 20" in run("bundle", "diff", fusion_bundle, tmp_path / "longer").stdout
    bundle.rewrite(fusion_bundle, tmp_path / "noted", record=record | {"note": "by hand"})
    shown = run("bundle", "diff", fusion_bundle, tmp_path / "noted").stdout
    assert shown == "other parts of bundle.json differ: note\n"


def test_a_bundle_is_verified(trained, fusion_bundle, lower):
    result = run("bundle", "verify", fusion_bundle)
    assert result.exit_code == 0, result.output
    assert "4 files have the recorded hash" in result.stdout
    assert "stored images agree" in result.stdout
    assert json.loads(run("bundle", "verify", fusion_bundle, "--json").stdout)["check"]["tiles"] > 0
    (lower / "model.onnx").write_bytes(b"")
    assert run("bundle", "verify", lower).exit_code == 2
