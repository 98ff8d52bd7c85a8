"""A detector in int8 draws its own line, and is refused where it detects less."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from builders import head_config
from normweave import fitting
from normweave.benchmark.quantized import quantize_and_check
from normweave.bundle import read
from normweave.config import Config, DataConfig, OutcomeConfig, PrepareConfig, TimmConfig
from normweave.detector import Detector
from normweave.errors import BundleError, CheckError, ConfigError, DataError
from normweave.textiles import SEEN, make_textures, render
from normweave.types import Sample

CONFIG = Config(
    data=DataConfig(subclass_from="column", calibration="split"),
    prepare=PrepareConfig(height=64, width=64),
    features=TimmConfig(strides=(8,), batch_images=4),
    head=head_config(expert="gaussian", adaption="off"),
    outcome=OutcomeConfig(false_alarm_rate=0.25, unknown_rate=0.1),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "cloth"
    return make_textures(
        folder,
        size=(64, 64),
        seed=3,
        train_images=18,
        test_images=4,
        defect_images=2,
        seen=SEEN[:2],
        unseen=(),
    )


@pytest.fixture(scope="module")
def tests(tmp_path_factory):
    """Good cloth, and cloth that is half bright green, so that rounding does not change the verdicts."""
    folder = tmp_path_factory.mktemp("labelled")
    samples = []
    for number in range(10):
        image = render(SEEN[number % 2], seed=900 + number, size=(64, 64)).image.copy()
        if number >= 5:
            image[:, :32] = (40, 250, 40)
        Image.fromarray(image).save(folder / f"{number}.png")
        label = "normal" if number < 5 else "anomalous"
        samples.append(Sample(image_path=folder / f"{number}.png", category="cloth", split="test", label=label))
    return samples


@pytest.fixture
def unquantized(images):
    return Detector.fit(images, config=CONFIG, use_cache=False, device="cpu")


def test_the_operating_points_are_drawn_from_the_scores_of_int8(unquantized, tests, tmp_path):
    paths = [str(sample.image_path) for sample in tests]
    before = unquantized.score(paths)
    unquantized.save(tmp_path / "float")

    quantized = quantize_and_check(unquantized, tests)

    after = quantized.score(paths)
    for ours, theirs in (
        (unquantized.calibration, quantized.calibration),
        (unquantized.calibration.unseen, quantized.calibration.unseen),
    ):
        assert not np.array_equal(ours.scores, theirs.scores)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=0.5)
    np.testing.assert_allclose([one.pred_score for one in after], [one.pred_score for one in before], atol=0.5)
    # A detector that is loaded from the bundle gives the scores from which its thresholds were drawn.
    bundle = quantized.save(tmp_path / "int8")
    assert read(bundle)["precision"] == "int8"
    assert read(tmp_path / "float")["precision"] == "float32"
    assert (bundle / "model.onnx").stat().st_size < (tmp_path / "float" / "model.onnx").stat().st_size
    for mine, other in zip(after, Detector.load(bundle, threads=1).score(paths), strict=True):
        assert (other.verdict, other.threshold) == (mine.verdict, mine.threshold)
        assert other.pred_score == pytest.approx(mine.pred_score, rel=1e-3)
    with pytest.raises(BundleError, match="is quantized"):
        fitting.load(bundle)


def test_the_check_is_in_the_record(unquantized, tests):
    check = quantize_and_check(unquantized, tests).record["int8_check"]
    assert check["images"] == len(tests)
    assert check["image_auroc"] == [1, 1]
    assert check["pixel_auroc"] == [None, None]  # there are no masks
    assert "int8_check" not in unquantized.record


def test_pixels_count_where_there_are_masks(unquantized, tests, tmp_path):
    mask = tmp_path / "mask.png"
    Image.fromarray(np.repeat([[255] * 32 + [0] * 32], 64, axis=0).astype(np.uint8)).save(mask)
    masked = [replace(s, mask_path=mask if s.label == "anomalous" else None) for s in tests]
    before, after = quantize_and_check(unquantized, masked).record["int8_check"]["pixel_auroc"]
    assert 0.8 < before < 1
    assert after >= before - 0.005


def test_without_labelled_images_nothing_is_checked(unquantized):
    assert quantize_and_check(unquantized, None).record["int8_check"] is None


def test_a_spoiled_graph_is_refused(unquantized, tests, monkeypatch):
    unspoiled = fitting.quantize_backbone

    def spoiled(graph, images):
        """Set the quantized convolutions to zero."""
        model = onnx.load_from_string(unspoiled(graph, images))
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4:
                tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), tensor.name))
        return model.SerializeToString()

    monkeypatch.setattr(fitting, "quantize_backbone", spoiled)
    with pytest.raises(CheckError, match=r"int8 loses (image|pixel)_auroc from .* 0\.005 is allowed\. So no bundle"):
        quantize_and_check(unquantized, tests)


def test_labelled_images_of_one_label_only(unquantized, tests):
    good = [sample for sample in tests if sample.label == "normal"]
    with pytest.raises(DataError, match="5 normal and 0 anomalous images: both labels are needed"):
        quantize_and_check(unquantized, good)


def test_images_of_the_training_cannot_be_used_for_the_check(unquantized, images):
    from normweave.data.manifest import read_manifest

    with pytest.raises(DataError, match="was used in training, so it cannot be used for test"):
        quantize_and_check(unquantized, read_manifest(images))


def test_a_loaded_detector_cannot_be_quantized(unquantized, tmp_path):
    unquantized.save(tmp_path / "b")
    for load in (Detector.load, fitting.load):
        with pytest.raises(ConfigError, match=r"Only a detector that was just fitted .* Train it again with --int8"):
            fitting.quantize(load(tmp_path / "b", device="cpu"))
