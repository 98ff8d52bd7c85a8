"""A folder of bundles."""

import shutil

import numpy as np
import pytest

from bundles import damage
from normweave import bundle as bundles
from normweave import references
from normweave.detector import Detector
from normweave.errors import ConfigError
from normweave.references import GoodImage, References
from normweave.serve.library import Library, ModelError, warm_up


def test_bundles_are_listed_with_their_facts_and_damaged_ones_with_the_reason(library, bundle):
    found = {one.name: one for one in library.scan()}
    assert list(found) == ["new", "old", "torn"]
    old = found["old"]
    assert old.bundle_hash == bundles.bundle_hash(bundle)
    assert old.model == bundles.read(bundle)["model"]
    assert list(old.categories) == ["cloth"]
    assert old.preparation["height"] == 64
    assert old.written_at is not None
    assert old.damage is None
    assert found["new"].bundle_hash != old.bundle_hash
    assert "model.onnx is not the file that was saved" in found["torn"].damage
    assert found["torn"].damage.startswith("model.onnx")  # its name stands beside it
    assert str(library.folder) not in found["torn"].damage  # pages show no path of the server


def test_a_bundle_that_appears_changes_or_goes_is_noticed(library, bundle):
    shutil.copytree(bundle, library.folder / "more")
    assert [one.name for one in library.scan()] == ["more", "new", "old", "torn"]
    damage(library.folder / "more")
    assert library.scan()[0].damage is not None
    shutil.rmtree(library.folder / "more")
    shutil.copytree(bundle, library.folder / "later.partial-7")  # it is being written
    (library.folder / "inspections").mkdir()
    assert [one.name for one in library.scan()] == ["new", "old", "torn"]


def test_a_copy_that_is_not_complete_is_damaged_until_it_is(library, bundle):
    partial = library.folder / "copied"
    partial.mkdir()
    shutil.copy(bundle / bundles.RECORD, partial)
    assert "is missing" in library.scan()[0].damage
    for path in bundle.iterdir():
        shutil.copy(path, partial)
    assert library.scan()[0].damage is None


def test_files_that_did_not_change_are_not_read_again(library, monkeypatch):
    library.scan()
    monkeypatch.setattr(bundles, "read", None)
    assert len(library.scan()) == 3


def test_unknown_and_damaged_bundles_are_not_found(library, hashes):
    assert library.find(hashes["old"]).name == "old"
    for bundle_hash, code, status in (("0" * 64, "unknown_model", 404), (hashes["torn"], "bundle_damaged", 409)):
        with pytest.raises(ModelError) as raised:
            library.find(bundle_hash)
        assert (raised.value.code, raised.value.status) == (code, status)


def test_good_images_of_every_bundle_that_was_scanned(library, bundle):
    shown = References((GoodImage("good/1.png", (64, 64), (64, 64), None),), np.zeros((1, 3), dtype=np.int64))
    files = {bundles.GRAPH: bundles.read_file(bundle, bundles.GRAPH)} | references.bundle_files(shown)
    folder = library.folder / "shown"
    bundles.write(folder, tensors=bundles.read_tensors(bundle), record=bundles.read(bundle), files=files)
    bundle_hash = bundles.bundle_hash(folder)
    assert (library.known(), library.references(bundle_hash)) == ([], None)
    assert library.scan() == library.known()
    assert library.references(bundle_hash).images == shown.images
    assert library.references("0" * 64) is None


def test_a_library_is_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        Library(tmp_path / "nowhere")


def test_a_warm_detector_is_the_same(bundle, photos):
    detector = Detector.load(bundle, threads=1, device="cpu")
    before = detector.score(photos[0])
    assert warm_up(detector) is detector
    assert detector.score(photos[0]).pred_score == before.pred_score
