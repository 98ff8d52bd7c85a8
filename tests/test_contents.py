"""What `bundle show`, `diff` and `verify` find."""

import shutil

import pytest

from normweave import bundle, contents
from normweave.detector import Detector
from normweave.errors import BundleError, CheckError
from normweave.outcome.operating_point import Added, Calibration


@pytest.fixture(scope="module")
def other(fusion_bundle, tmp_path_factory):
    """The same bundle with thresholds for another rate."""
    folder = tmp_path_factory.mktemp("other") / "other.bundle"
    return Detector.load(fusion_bundle).with_rate(0.2).save(folder)


def test_a_bundle_is_described(fusion_bundle):
    found = contents.describe(fusion_bundle)

    assert found["bundle_hash"] == bundle.bundle_hash(fusion_bundle)
    assert [step["action"] for step in found["history"]] == ["trained"]
    assert found["history"][0]["images"] == found["fit_images"] + found["calibration_images"]
    assert [point["subclass"] for point in found["operating_points"]] == [None, *found["subclasses"]]
    assert set(found["files"]) == {"model.onnx", "weights.safetensors", "references.json", "checks.json"}
    assert found["files"]["model.onnx"]["bytes"] == (fusion_bundle / "model.onnx").stat().st_size


def test_only_what_differs_is_listed(fusion_bundle, other):
    found = contents.differences(fusion_bundle, other)

    assert set(found) == {"settings", "operating_points"}
    assert found["settings"] == {"outcome.false_alarm_rate": [0.1, 0.2]}
    before, after = found["operating_points"]["all together"]
    assert (before["false_alarm_rate"], after["false_alarm_rate"]) == (0.1, 0.2)
    assert before["threshold"] > after["threshold"]
    assert contents.differences(other, other) == {}


def test_an_added_subclass_is_a_difference(fusion_bundle, tmp_path):
    record = bundle.read(fusion_bundle)
    own = Calibration(scores=range(9), false_alarm_rate=0.1, unknown_rate=0.1)
    known = Detector.load(fusion_bundle).calibration
    names = [*record["subclass_names"], "cloth/new"]
    added = record | {
        "subclass_names": names,
        "subclasses": record["subclasses"] | {"cloth/new": ["cloth", "new"]},
        "calibration": known.with_added([Added(own, "cloth", unseen=True)]).as_dict(),
        "fit_hashes": [*record["fit_hashes"], "0" * 16],
        "history": [*record["history"], {"action": "added"}],
    }
    bundle.rewrite(fusion_bundle, tmp_path / "new", record=added)
    found = contents.differences(fusion_bundle, tmp_path / "new")

    assert found["subclasses"] == {"cloth/new": [None, True]}
    assert found["operating_points"]["cloth/new"][0] is None
    assert found["images"] == {"only_first": 0, "only_second": 1}
    assert found["history"] == [{"action": "added"}]
    assert contents.describe(tmp_path / "new")["operating_points"][-1]["subclass"] == "cloth/new"


def test_a_step_of_the_first_or_another_value_is_a_difference(fusion_bundle, tmp_path):
    record = bundle.read(fusion_bundle)
    step = {"action": "removed"}
    bundle.rewrite(fusion_bundle, tmp_path / "longer", record=record | {"history": [*record["history"], step]})
    assert contents.differences(tmp_path / "longer", fusion_bundle) == {"history_only_first": [step]}
    bundle.rewrite(fusion_bundle, tmp_path / "noted", record=record | {"note": "by hand"})
    assert contents.differences(fusion_bundle, tmp_path / "noted") == {"record": ["note"]}
    text = (tmp_path / "noted" / "bundle.json").read_text()
    shutil.copytree(tmp_path / "noted", tmp_path / "spaced")
    (tmp_path / "spaced" / "bundle.json").write_text(f"{text}\n")
    assert contents.differences(tmp_path / "noted", tmp_path / "spaced") == {"record": []}


def test_hashes_and_scores_are_verified(fusion_bundle, other, tmp_path, monkeypatch):
    found = contents.verify(fusion_bundle, threads=1)

    assert found["files"] == 4
    assert found["check"]["tiles"] > 0
    assert found["check"]["largest_difference"] < 1e-3
    outputs = contents.outputs
    monkeypatch.setattr(
        contents, "outputs", lambda *given: (got := outputs(*given))._replace(image_scores=1.1 * got.image_scores)
    )
    with pytest.raises(CheckError, match="image_scores that the graph gives on this machine differ"):
        contents.verify(fusion_bundle)
    with (other / "checks.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(BundleError, match=r"checks.json is not the file that was saved"):
        contents.verify(other)
    with pytest.raises(BundleError, match=r"checks.json is not the file that was saved"):
        contents.describe(other)
