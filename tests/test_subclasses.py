"""Adding and removing a subclass changes no bit of the other scores."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image, ImageOps
from torch.export import ExportedProgram
from typer.testing import CliRunner

from normweave import bundle as bundles
from normweave import checks, fitting
from normweave.cli import app
from normweave.config import DataConfig
from normweave.data import layouts
from normweave.detector import Detector
from normweave.drift import reference
from normweave.errors import CheckError, ConfigError, DataError
from normweave.network.torch import TorchNetwork


@pytest.fixture(scope="module")
def images(cloth):
    """Good training images by subclass, and test images of those subclasses."""
    samples = layouts.read(cloth, DataConfig(subclass_from="column"))
    names = sorted({each.subclass for each in samples if each.split == "train"})
    return {name: [each for each in samples if each.subclass == name] for name in names}


def good(images, name):
    return [replace(each, split=None) for each in images[name] if each.split == "train"]


@pytest.fixture(scope="module")
def added(fusion_bundle, images, tmp_path_factory):
    """The third subclass added to that bundle; its network is traced once for the graph."""
    third, folder = list(images)[2], tmp_path_factory.mktemp("added")
    (folder / "good").mkdir()
    for each in good(images, third)[:12]:
        shutil.copy(each.image_path, folder / "good")
    target = folder / "added.bundle"
    names = ("--category", "cloth", "--subclass", third)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExportedProgram, "run_decompositions", None)
        output = run("add-subclass", fusion_bundle, folder / "good", *names, "-o", target, "--json")
    assert output["bundle_hash"] == bundles.bundle_hash(target)
    assert output["check"]["tiles"] == output["check"]["equal"] > 0
    assert output["operating_point"]["subclass"] == f"cloth/{third}"
    return target


def inverted(images, folder, *, count=8):
    """Write images of a subclass with inverted colours, and return their paths."""
    paths = [folder / f"{number}.png" for number in range(count)]
    for path, each in zip(paths, good(images, next(iter(images))), strict=False):
        ImageOps.invert(Image.open(each.image_path).convert("RGB")).save(path)
    return [str(path) for path in paths]


def run(*arguments):
    """Return what a command prints as JSON."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def raw(folder, paths):
    """The raw outputs of a bundle for images."""
    detector = Detector.load(folder, threads=1)
    pixels = np.concatenate([detector.open(path).pixels for path in paths])
    return checks.outputs(detector.network, pixels)


def equal(old, new, rows):
    return all(
        np.array_equal(getattr(old, name)[rows], getattr(new, name)[rows]) for name in ("scores", "image_scores")
    )


def test_scores_of_images_that_are_nearer_to_the_others_keep_every_bit(fusion_bundle, added, images):
    names = list(images)
    paths = [each.image_path for name in names for each in images[name] if each.split == "test"]
    old, new = raw(fusion_bundle, paths), raw(added, paths)
    nearer = new.subclass == 2

    assert not nearer.all()
    assert nearer[[each.subclass == names[2] for name in names for each in images[name] if each.split == "test"]].all()
    assert equal(old, new, ~nearer)
    assert not equal(old, new, nearer)


def test_operating_points_of_the_others_do_not_change(fusion_bundle, added, images):
    old, new = Detector.load(fusion_bundle), Detector.load(added)
    third = list(images)[2]

    assert new.subclass_names == (*old.subclass_names, f"cloth/{third}")
    assert new.calibration.as_dict() | {"added": None} == old.calibration.as_dict() | {"added": None}
    (own,) = new.calibration.added
    assert own.calibration.cross_validated
    assert len(own.calibration) == 12
    record = new.record["added"][f"cloth/{third}"]
    assert record["images"] == 12
    stored = len(checks.read(fusion_bundle).pixels)
    assert record["check"] == {"tiles": stored, "equal": stored, "moved": []}
    assert [each["action"] for each in new.record["history"]] == ["trained", "added"]
    assert new.record["history"][1]["parent"] == old.bundle_hash
    unused = [each.image_path for each in images[third] if each.split == "test" and each.label == "normal"]
    outcomes = new.score([str(path) for path in unused])
    assert {each.subclass for each in outcomes} == {third}
    assert {each.threshold for each in outcomes if not each.unseen} <= {own.calibration.point().threshold}


@pytest.mark.parametrize("name", ["", " ", "a/b", "a\n"])
def test_a_name_that_would_be_ambiguous_is_refused(fusion_bundle, images, name):
    with pytest.raises(ConfigError, match="printable characters without /"):
        Detector.load(fusion_bundle).with_subclass(good(images, list(images)[2]), category="cloth", subclass=name)


def test_the_statistics_of_the_new_images_join_those_that_drift_is_compared_with(fusion_bundle, added, images):
    old, new = (reference.read(Detector.load(each).record, where=each) for each in (fusion_bundle, added))
    assert [(each.product, each.cross_validated) for each in new[: len(old)]] == [
        (each.product, each.cross_validated) for each in old
    ]
    assert new[-1].product == ("cloth", list(images)[2])
    assert new[-1].cross_validated
    assert new[-1].values.shape == (12, len(reference.COLUMNS))
    assert set(new[-1].shifts) == set(old[0].shifts)


def test_what_was_added_can_be_removed_without_a_trace(fusion_bundle, added, images, tmp_path):
    third = list(images)[2]
    removed, stored = tmp_path / "removed.bundle", len(checks.read(fusion_bundle).pixels)
    output = run("remove-subclass", added, "--category", "cloth", "--subclass", third, "-o", removed, "--json")

    assert output["check"]["equal"] == stored
    assert len(output["check"]["moved"]) == output["check"]["tiles"] - stored > 0
    assert bundles.weights_hash(removed) == bundles.weights_hash(fusion_bundle)
    assert checks.read(removed).to_bytes() == checks.read(fusion_bundle).to_bytes()
    old, new = Detector.load(fusion_bundle), Detector.load(removed)
    assert new.calibration.as_dict() == old.calibration.as_dict()
    for key in ("subclasses", "subclass_names", "categories", "fit_hashes", "fit_images", "drift"):
        assert new.record[key] == old.record[key]
    assert [each["action"] for each in new.record["history"]] == ["trained", "added", "removed"]


def test_a_further_subclass_exchanges_tensors_of_the_graph(added, images, tmp_path):
    """Also the removal of it: nothing is traced, and the scores of the others keep every bit."""
    first, second, third = images
    paths = [str(each.image_path) for name in (first, second, third) for each in images[name] if each.split == "test"]
    before = raw(added, paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.export.export", None)
        more = Detector.load(added).with_subclass(inverted(images, tmp_path), category="denim", subclass=None)
        more.save(tmp_path / "more.bundle")
        less = Detector.load(tmp_path / "more.bundle").without_subclass(category="denim", subclass=None)
        less.save(tmp_path / "less.bundle")

    after = raw(tmp_path / "more.bundle", paths)
    near = after.subclass < 3
    assert near.sum() > len(paths) / 2
    assert equal(before, after, near)
    assert equal(before, raw(tmp_path / "less.bundle", paths), slice(None))
    assert checks.read(tmp_path / "less.bundle").to_bytes() == checks.read(added).to_bytes()


def test_scores_recorded_on_another_machine_are_computed_again(added, images, tmp_path):
    """They have other bits there; those of this machine are compared."""
    detector = fitting.load(added)
    recorded = detector.network.checks
    elsewhere = recorded.outputs._replace(scores=recorded.outputs.scores * np.float32(1.00001))
    detector.network.checks = checks.Checks(recorded.pixels, elsewhere)
    more = detector.with_subclass(inverted(images, tmp_path), category="denim", subclass=None)

    check = more.record["added"]["denim"]["check"]
    assert check["equal"] + len(check["moved"]) == check["tiles"] == len(recorded.pixels)
    stored = more.network.checks.outputs.scores[: len(recorded.pixels)]
    assert (stored == recorded.outputs.scores).all(axis=(1, 2)).sum() >= check["equal"] > 0


def test_a_changed_score_of_another_subclass_is_found(added, images, tmp_path):
    detector = fitting.load(added)
    detector.network.head.fusion.centre *= 1.001

    with pytest.raises(CheckError, match=r"images that are routed as before have changed"):
        detector.with_subclass(inverted(images, tmp_path), category="denim", subclass=None)


def test_a_graph_that_differs_in_more_is_exported_again(added):
    """As the graph of another version may: with these tensors it gives other scores than torch."""
    detector = fitting.load(added)
    network = detector.network
    model = onnx.load_from_string(network.exported(detector.calibration))
    for each in model.graph.initializer:
        if each.name.endswith("components"):
            each.CopyFrom(numpy_helper.from_array(1.1 * numpy_helper.to_array(each), each.name))

    def exported(graph):
        parts = (network.extractor, network.standard, network.head)
        other = TorchNetwork(*parts, config=detector.config, similar=graph)
        other.checks = network.checks
        return other.exported(detector.calibration)

    assert exported(model.SerializeToString()) == exported(None) == network.exported(detector.calibration)


def test_a_new_category_has_weights_of_its_own(fusion_bundle, images):
    """They are measured on synthetic defects; the references get the images of the category."""
    third = list(images)[2]
    old = fitting.load(fusion_bundle)
    old.network.checks = None  # nothing to compare on, so that no graph is exported
    new = old.with_subclass(good(images, third)[:8], category="denim", subclass=None)

    assert new.subclass_names == (*old.subclass_names, "denim")
    fusion = new.record["notes"]["fusion"][-1]
    assert fusion["category"] == "denim"
    assert fusion["synthetic_defects"] > 0
    assert "denim" in {image.name.split("/")[0] for image in new.network.references.images}
    assert len(new.network.references.patches) == len(new.network.head.stored_by())
    assert new.calibration.unseen.as_dict() == old.calibration.unseen.as_dict()
    assert not new.calibration.added[0].unseen


def test_the_subclasses_of_a_manifest_are_added_as_one_after_another(fusion_bundle, images, tmp_path):
    """One graph is exported and compared; weights, thresholds and records are those of two additions."""
    first, _, third = images
    blue, lines = inverted(images, tmp_path), ["image_path,category,subclass,split"]
    for each, path in zip(good(images, third), blue, strict=False):
        lines += [f"{each.image_path},cloth,{third},", f"{path},denim,blue,train"]
    lines += [f"{images[first][-1].image_path},cloth,{first},test"]  # a test image names no new subclass
    (tmp_path / "new.csv").write_text("\n".join(lines))
    output = run("add-subclass", fusion_bundle, tmp_path / "new.csv", "-o", tmp_path / "both.bundle", "--json")

    one = fitting.load(fusion_bundle)
    stored, one.network.checks = one.network.checks, None  # nothing to compare on, so that no graph is exported
    for category, subclass, paths in (
        ("cloth", third, [str(each.image_path) for each in good(images, third)[:8]]),
        ("denim", "blue", blue),
    ):
        one = one.with_subclass(paths, category=category, subclass=subclass)
    both = fitting.load(tmp_path / "both.bundle")
    assert both.subclass_names == one.subclass_names
    assert [each["subclass"] for each in output["subclasses"]] == list(one.subclass_names[2:])
    expected = one.network.head.state_dict()
    assert both.network.head.state_dict().keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in both.network.head.state_dict().items())
    assert both.calibration.as_dict() == one.calibration.as_dict()
    for key in ("fit_hashes", "fit_images", "drift", "subclasses", "notes"):
        assert both.record[key] == json.loads(json.dumps(one.record[key]))
    for each in output["subclasses"]:
        assert each["check"]["tiles"] == len(stored.pixels)
        assert each["operating_point"]["subclass"] == each["subclass"]
        assert each["check"] == both.record["added"][each["subclass"]]["check"]
    assert len(both.network.checks.pixels) > len(stored.pixels)
    steps = both.record["history"][-2:]
    assert [step["parent"] for step in steps] == [bundles.bundle_hash(fusion_bundle)] * 2


def test_what_cannot_be_added_is_refused(fusion_bundle, added, images, bundle):
    first, _, third = images
    new = good(images, third)
    detector = Detector.load(fusion_bundle)

    with pytest.raises(ConfigError, match=f"knows the subclass cloth/{first} already"):
        detector.with_subclass(new, category="cloth", subclass=first)
    with pytest.raises(DataError, match="at least 5 good images, got 4"):
        detector.with_subclass(new[:4], category="cloth", subclass=third)
    with pytest.raises(DataError, match="at least 2 groups"):
        detector.with_subclass([replace(each, group="a") for each in new[:6]], category="cloth", subclass=third)
    with pytest.raises(DataError, match="was used in training already"):
        detector.with_subclass(good(images, first)[:6], category="cloth", subclass="other")
    with pytest.raises(DataError, match="was used in training already"):
        Detector.load(added).with_subclass(new[:6], category="cloth", subclass="other")
    with pytest.raises(DataError, match="No good image of the data has a subclass"):
        detector.with_subclass([replace(each, subclass=None) for each in new[:6]])
    with pytest.raises(ConfigError, match="The subclass other needs its category"):
        detector.with_subclass(new[:6], subclass="other")
    with pytest.raises(ConfigError, match="default Adapted-MoE"):
        Detector.load(bundle).with_subclass(new[:6], category="cloth", subclass="other")
    with pytest.raises(ConfigError, match="one of the first training"):
        Detector.load(added).without_subclass(category="cloth", subclass=first)
    with pytest.raises(ConfigError, match="is not known"):
        Detector.load(added).without_subclass(category="cloth", subclass="other")
