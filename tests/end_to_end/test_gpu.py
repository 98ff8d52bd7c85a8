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
from normweave.types import Outcome, Sample

from .conftest import FEW_EPOCHS

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and torch with CUDA")


@pytest.fixture(scope="module")
def tests(textiles: Path) -> list[Sample]:
    """The test images of the three seen subclasses."""
    seen = {each.name for each in SEEN}
    return [each for each in read(textiles, DataConfig()) if each.split == "test" and each.subclass in seen]


def outcomes(detector: Detector, samples: list[Sample]) -> list[Outcome]:
    return [detector.score(each.image_path) for each in samples]


def scores(detector: Detector, samples: list[Sample]) -> np.ndarray:
    return np.array([each.pred_score for each in outcomes(detector, samples)])


def test_statistics_are_those_of_the_processor(default: Detector, textiles: Path, config: Config, tests: list[Sample]):
    """Convolutions are rounded otherwise, and the nearest stored patch may be another one."""
    fitted = Detector.fit(textiles, config=config, device=DEVICE, cache=None)
    ours, theirs = outcomes(default, tests), outcomes(fitted, tests)
    expected = np.array([each.pred_score for each in ours])
    np.testing.assert_allclose([each.pred_score for each in theirs], expected, atol=0.05 * expected.std())
    assert [each.verdict for each in ours[:10]] == [each.verdict for each in theirs[:10]]


@pytest.mark.parametrize("model", ["simplenet", "cnc"])
def test_a_training_by_gradient_finds_the_same_defects(
    model: str, textiles: Path, config: Config, feature_cache: Path, tests: list[Sample]
):
    config = settings.override(settings.with_model(config, model), FEW_EPOCHS.get(model, []))
    ours, theirs, again = (
        scores(Detector.fit(textiles, config=config, device=device, cache=feature_cache), tests)
        for device in ("cpu", DEVICE, DEVICE)
    )
    defective = [each.label == "anomalous" for each in tests]
    assert abs(roc_auc_score(defective, ours) - roc_auc_score(defective, theirs)) < 0.1
    np.testing.assert_allclose(again, theirs, rtol=1e-2)


def test_the_graph_gives_the_scores_of_the_processor(default: Detector, tests: list[Sample], tmp_path: Path):
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    default.save(tmp_path / "cloth.bundle")
    on_processor = Detector.load(tmp_path / "cloth.bundle", device="cpu")
    on_gpu = Detector.load(tmp_path / "cloth.bundle", device=DEVICE)
    np.testing.assert_allclose(scores(on_gpu, tests), scores(on_processor, tests), rtol=1e-3, atol=1e-3)
