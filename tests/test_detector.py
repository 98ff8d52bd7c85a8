"""A loaded bundle gives the outcomes of the fitted detector without torch, and only a complete bundle is read."""

import hashlib
import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from normweave import fitting
from normweave.bundle import FORMAT, read_tensors
from normweave.data import prepare, variations
from normweave.detector import Detector
from normweave.errors import BundleError, CheckError, ConfigError, DataError, ImageError
from normweave.scoring import ImageScore, TileScores
from normweave.textiles import SEEN, render
from normweave.types import Sample


@pytest.fixture(scope="module")
def loaded(bundle):
    return Detector.load(bundle, threads=1)


def good_cloth(number, size=(64, 64)):
    return render(SEEN[0], seed=number, size=size).image


def same(ours, theirs):
    """Compare two outcomes: texts exactly, numbers to a relative 1e-3."""
    for field in fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        match field.name:
            case "latency_ms":
                continue
            case "anomaly_map":
                assert (mine is None) == (other is None)
                if mine is not None:
                    np.testing.assert_allclose(other, mine, rtol=1e-3, atol=1e-3)
            case "experts":
                assert [name for name, _ in mine] == [name for name, _ in other]
                np.testing.assert_allclose([w for _, w in other], [w for _, w in mine], rtol=1e-3)
            case "boxes":
                assert [box[:4] for box in mine] == [box[:4] for box in other]
            case _ if isinstance(mine, float):
                assert other == pytest.approx(mine, rel=1e-3), field.name
            case _:
                assert mine == other, field.name


# ── the same outcomes ────────────────────────────────────────────────────────────────────────────────────────────────


def test_outcomes_equal_those_of_the_fitted_detector(detector, loaded, photos, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not an image")
    large = np.tile(good_cloth(1), (5, 9, 1))  # 320 x 576: cut into tiles
    assert len(detector.preparation.tiles(320, 576)) > 1
    images = [*photos[:5], text, large, Path(photos[5]).read_bytes(), *photos[6:]]
    ours, theirs = detector.score(images), loaded.score(images)
    assert len(ours) == len(theirs) == len(images)
    for mine, other in zip(ours, theirs, strict=True):
        same(mine, other)
    assert {outcome.verdict for outcome in theirs} > {"normal", None}
    assert any(outcome.boxes for outcome in theirs)


def test_an_anomalous_image_always_has_a_box(loaded, photos, monkeypatch):
    """Also if no pixel of its map exceeds the threshold of boxes; the boxes of others stay."""
    before = loaded.score(list(photos))
    points = loaded.operating_points._replace(map_threshold=1e9, unseen_map_threshold=1e9)
    monkeypatch.setattr(loaded, "operating_points", points)
    after = loaded.score(list(photos))
    assert "anomalous" in {one.verdict for one in after}
    for one, other in zip(before, after, strict=True):
        assert len(other.boxes) == (one.verdict == "anomalous")
        if other.boxes:
            (box,) = other.boxes
            assert box.peak == other.anomaly_map.max()
            assert box.peak == one.boxes[0].peak


def test_one_image_and_one_that_cannot_be_read(loaded, photos, tmp_path):
    same(loaded.score(photos)[0], loaded.score(photos[0]))
    assert loaded.score(photos[0], maps=False).anomaly_map is None
    with pytest.raises(ImageError, match=r"gone\.png"):
        loaded.score(tmp_path / "gone.png")


def test_an_image_of_too_many_tiles(loaded, monkeypatch):
    """It is refused before a tile is prepared."""
    monkeypatch.setattr(prepare, "MAX_TILES", 5)
    outcome, other = loaded.score([good_cloth(1, (300, 600)), good_cloth(1)])
    assert (outcome.verdict, other.error) == (None, None)
    assert "300 x 600 pixels (height x width) give 6 tiles" in outcome.error


def test_an_outcome_does_not_depend_on_the_other_images(loaded, photos):
    together = loaded.score(photos)
    for path, outcome in zip(photos, together, strict=True):
        same(outcome, loaded.score(path))


def test_a_stream_reads_no_further_ahead_than_two_batches(loaded, photos):
    taken = []

    def source():
        for number in range(1000):
            taken.append(number)
            yield photos[number % len(photos)]

    stream = loaded.stream(source(), maps=False)
    for _ in range(3):
        next(stream)
    assert len(taken) <= 3 * loaded.batch_images + 1
    stream.close()


def test_with_batches_of_one_each_outcome_comes_before_the_next_image_is_read(loaded, photos):
    taken = []

    def source():
        for path in photos:
            taken.append(path)
            yield path

    for number, outcome in enumerate(loaded.stream(source(), maps=False, batch_images=1), 1):
        assert outcome.image_path == taken[-1]
        assert len(taken) == number


def test_the_images_of_a_list_are_read_ahead(loaded, photos):
    taken = []

    class Listed(list):
        def __iter__(self):
            for path in super().__iter__():
                taken.append(path)
                yield path

    stream = loaded.stream(Listed(photos), maps=False, batch_images=1)
    assert next(stream).image_path == photos[0]
    assert len(taken) == 3
    assert [outcome.image_path for outcome in stream] == photos[1:]


# ── operating points ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """Good cloth that was not used in training."""
    folder = tmp_path_factory.mktemp("more")
    for number in range(24):
        Image.fromarray(good_cloth(3000 + number)).save(folder / f"{number:02d}.png")
    return folder


def test_calibration_gives_the_operating_points_of_torch(bundle, more, photos, tmp_path):
    ours, theirs = fitting.load(bundle, device="cpu"), Detector.load(bundle, threads=1)
    for each in (ours, theirs):
        each.calibrate(more, false_alarm_rate=0.2)
    for mine, other in (
        (ours.calibration, theirs.calibration),
        (ours.calibration.unseen, theirs.calibration.unseen),
    ):
        # The detector stores features in half precision in between.
        np.testing.assert_allclose(other.scores, mine.scores, rtol=1e-2, atol=1e-2)
        np.testing.assert_allclose(np.sort(other.distances), np.sort(mine.distances), rtol=1e-2)
        np.testing.assert_array_equal(np.sort(other.subclasses), np.sort(mine.subclasses))
    assert not np.allclose(theirs.calibration.scores, theirs.calibration.unseen.scores)
    apart = {"drift": None, "history": None}  # the history has the second in which each was calibrated
    assert ours.record | apart == theirs.record | apart
    first, second = ([step["action"] for step in each.record["history"]] for each in (ours, theirs))
    assert first == second == ["trained", "calibrated"]
    for mine, other in zip(ours.record["drift"]["subclasses"], theirs.record["drift"]["subclasses"], strict=True):
        np.testing.assert_allclose(
            np.array(other["values"], float), np.array(mine["values"], float), rtol=0.02, atol=0.02
        )

    theirs.save(tmp_path / "again")
    back = Detector.load(tmp_path / "again", threads=1)
    assert back.bundle_hash == theirs.bundle_hash
    for before, after in zip(theirs.score(photos), back.score(photos), strict=True):
        same(before, after)
    assert back.calibration.false_alarm_rate == 0.2
    tensors, copied = read_tensors(bundle), read_tensors(tmp_path / "again")
    assert all((tensors[name] == copied[name]).all() for name in tensors)
    assert fitting.load(tmp_path / "again", device="cpu").record == back.record


def test_a_rate_that_cannot_be_promised_changes_nothing(bundle, more, cloth):
    loaded = Detector.load(bundle, threads=1)
    before = loaded.calibration
    with pytest.raises(CheckError, match="needs at least 999 independent groups of held-out normal images, got 24"):
        loaded.calibrate(more, false_alarm_rate=0.001)
    with pytest.raises(ConfigError, match=r"A false-alarm rate must be in \(0, 1\), got 0"):
        loaded.calibrate(more, false_alarm_rate=0)
    with pytest.raises(DataError, match="cannot be used for calibration"):
        loaded.calibrate(cloth)
    assert loaded.calibration is before


@pytest.mark.parametrize("load", [Detector.load, fitting.load])
def test_a_loaded_detector_saves_the_same_graph_and_weights(bundle, load, tmp_path):
    load(bundle, device="cpu").save(tmp_path / "copy")
    for name in ("model.onnx", "weights.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (bundle / name).read_bytes()


def test_another_rate_leaves_the_detector_unchanged(bundle, photos):
    loaded = Detector.load(bundle, threads=1)
    stricter = loaded.with_rate(0.2)
    assert (loaded.calibration.false_alarm_rate, stricter.calibration.false_alarm_rate) == (0.1, 0.2)
    assert stricter.record["config"]["outcome"]["false_alarm_rate"] == 0.2
    for before, after in zip(loaded.score(photos), stricter.score(photos), strict=True):
        assert before.pred_score == after.pred_score
        assert before.threshold >= after.threshold


# ── only a complete bundle ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def copy(bundle, tmp_path):
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def rewritten(folder, change):
    """Change the record, as someone who knows the format would."""
    record = json.loads((folder / "bundle.json").read_text())
    change(record)
    (folder / "bundle.json").write_text(json.dumps(record))


def regraphed(folder, change):
    """Change the graph, and its hash with it."""
    model = onnx.load(folder / "model.onnx")
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    rewritten(folder, lambda record: record["files"].update({"model.onnx": digest}))


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors"])
def test_a_changed_byte(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} is not the file that was saved"):
        Detector.load(copy)


def test_a_foreign_path(copy, tmp_path):
    rewritten(copy, lambda record: record["files"].update({"../model.onnx": "0" * 64}))
    with pytest.raises(BundleError, match=r"lists a file '\.\./model\.onnx', which is not a plain file name"):
        Detector.load(copy)


def test_a_link_out_of_the_bundle(copy, tmp_path):
    (copy / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (copy / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx is a link to .*, outside the bundle"):
        Detector.load(copy)


def test_a_newer_format(copy):
    rewritten(copy, lambda record: record.update(format=FORMAT + 1))
    with pytest.raises(BundleError, match=f"is in format {FORMAT + 1}, and this normweave reads up to {FORMAT}"):
        Detector.load(copy)


def test_a_bundle_of_release_0_1(copy):
    rewritten(copy, lambda record: record.update(format=1))
    with pytest.raises(BundleError, match=r"is in format 1, of normweave 0\.1.*Train it again with this version"):
        Detector.load(copy)


def test_no_graph(copy):
    rewritten(copy, lambda record: record["files"].pop("model.onnx"))
    with pytest.raises(BundleError, match=r"lists no model\.onnx"):
        Detector.load(copy)


def test_an_unknown_operator(copy):
    def change(model):
        next(node for node in model.graph.node if node.op_type == "Sqrt").op_type = "Frobnicate"

    regraphed(copy, change)
    with pytest.raises(BundleError, match="Frobnicate"):
        Detector.load(copy)


def test_a_custom_operator(copy):
    def change(model):
        model.graph.node[0].domain = "com.example"
        model.opset_import.add().domain = "com.example"

    regraphed(copy, change)
    with pytest.raises(BundleError, match=r"operators of 'com\.example'.*Do not use this bundle"):
        Detector.load(copy)


def test_a_tensor_of_another_file_is_not_opened(copy, tmp_path):
    """ONNX Runtime would read it: the file is there, and has the right size."""

    def change(model):
        tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
        (tmp_path / "secret.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", str(tmp_path / "secret.bin")

    regraphed(copy, change)
    with pytest.raises(BundleError, match="a tensor that is stored in another file"):
        Detector.load(copy)


@pytest.mark.parametrize("key", ["config", "calibration", "map_threshold", "subclasses", "subclass_names"])
def test_a_record_that_lacks_something(copy, key):
    rewritten(copy, lambda record: record.pop(key))
    with pytest.raises(BundleError, match=f"lacks or misplaces '{key}'"):
        Detector.load(copy)
    rewritten(copy, lambda record: record.update({key: "seven"}))
    with pytest.raises(BundleError):
        Detector.load(copy)


def test_fewer_names_than_subclasses_of_the_network(detector, photos, monkeypatch):
    """As in a record that was edited: images are routed to a subclass without a name."""
    monkeypatch.setattr(detector, "subclass_names", detector.subclass_names[:1])
    with pytest.raises(BundleError, match=r"has a subclass \d, and bundle.json names 1 \(subclass_names\)"):
        detector.score(photos)


def test_names_without_a_subclass(copy):
    rewritten(copy, lambda record: record.update(subclasses={}))
    with pytest.raises(BundleError, match="routes to"):
        Detector.load(copy)


def test_only_a_category_of_one_subclass_is_scored_under_variations(loaded, photos, monkeypatch):
    scanned = loaded.scan([Sample(image_path=Path(photo), category="cloth") for photo in photos[:3]])
    everything = np.arange(len(scanned))
    assert all(each.varied == () for each in loaded.held_out_scores(scanned, everything))
    name = loaded.subclass_names[0]
    monkeypatch.setattr(loaded, "subclasses", {name: ("cloth", "only")})
    held_out = loaded.held_out_scores(scanned, everything, most_varied=4)
    assert [len(each.varied) for each in held_out] == [1, 1, 1]
    assert all(each.varied[0].score != each.own.score for each in held_out)


def test_each_image_gets_the_scores_of_its_own_variations(loaded, photos, monkeypatch):
    monkeypatch.setattr(loaded, "subclasses", {loaded.subclass_names[0]: ("cloth", "only")})
    samples = [Sample(image_path=Path(photo), category="cloth") for photo in photos[:3]]
    scanned = loaded.scan(samples)
    held_out = loaded.held_out_scores(scanned, np.arange(len(scanned)), most_varied=9)  # the passes hold other images
    assert [len(each.varied) for each in held_out] == [3, 3, 3]
    names = variations.applicable(scanned.load(0))
    for place, each in enumerate(held_out):
        pixels = np.stack(
            [variations.vary(scanned.load(place), variation=names[3 * place + step]) for step in range(3)]
        )
        expected = [ImageScore.of(TileScores.compute(loaded.network, one[None], loaded.config)).score for one in pixels]
        np.testing.assert_allclose([image.score for image in each.varied], expected, rtol=1e-5)
