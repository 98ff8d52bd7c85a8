"""On a graphics processor, features, trainings and graphs give what they give on the processor."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.metrics import roc_auc_score

from normweave import settings
from normweave.config import Config, DataConfig
from normweave.data.layouts import read
from normweave.detector import Detector
from normweave.textiles import SEEN
from normweave.types import Sample

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
DEVICE = "cuda"
EPOCHS = {"simplenet": ["head.training.epochs=8"], "cnc": ["head.training.epochs=8", "head.prompts.training.epochs=5"]}


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and torch with CUDA")


@pytest.fixture(scope="module")
def tests(textiles: Path) -> list[Sample]:
    """The test images of the three seen subclasses."""
    seen = {each.name for each in SEEN}
    return [each for each in read(textiles, DataConfig()) if each.split == "test" and each.subclass in seen]


def scores(detector: Detector, samples: list[Sample]) -> np.ndarray:
    return np.array([detector.score(each.image_path).pred_score for each in samples])


def auroc(detector: Detector, samples: list[Sample]) -> float:
    return float(roc_auc_score([each.label == "anomalous" for each in samples], scores(detector, samples)))


def test_statistics_are_those_of_the_processor(default: Detector, textiles: Path, config: Config, tests: list[Sample]):
    """Convolutions are rounded otherwise, and the nearest stored patch may be another one."""
    fitted = Detector.fit(textiles, config=config, device=DEVICE, cache=None)
    ours, theirs = scores(default, tests), scores(fitted, tests)
    np.testing.assert_allclose(theirs, ours, atol=0.05 * ours.std())
    assert [default.score(each.image_path).verdict for each in tests[:10]] == [
        fitted.score(each.image_path).verdict for each in tests[:10]
    ]


@pytest.mark.parametrize("model", EPOCHS)
def test_a_training_by_gradient_finds_the_same_defects(
    model: str, textiles: Path, config: Config, feature_cache: Path, tests: list[Sample]
):
    config = settings.override(settings.with_model(config, model), EPOCHS[model])
    ours = Detector.fit(textiles, config=config, device="cpu", cache=feature_cache)
    theirs = Detector.fit(textiles, config=config, device=DEVICE, cache=feature_cache)
    assert abs(auroc(ours, tests) - auroc(theirs, tests)) < 0.1
    again = Detector.fit(textiles, config=config, device=DEVICE, cache=feature_cache)
    np.testing.assert_allclose(scores(again, tests), scores(theirs, tests), rtol=1e-2)


def test_the_graph_gives_the_scores_of_the_processor(default: Detector, tests: list[Sample], tmp_path: Path):
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    default.save(tmp_path / "cloth.bundle")
    on_processor = Detector.load(tmp_path / "cloth.bundle", device="cpu")
    on_gpu = Detector.load(tmp_path / "cloth.bundle", device=DEVICE)
    np.testing.assert_allclose(scores(on_gpu, tests), scores(on_processor, tests), rtol=1e-3, atol=1e-3)
