"""A small set of textile images, made once, and a detector fitted on it."""

from pathlib import Path

import pytest

from normweave.config import Config, DataConfig, OutcomeConfig
from normweave.detector import Detector
from normweave.textiles import SEEN, UNSEEN, make_textures

FEW_EPOCHS = {
    "cnc": ["head.training.epochs=8", "head.prompts.training.epochs=5"],
    "msflow": ["head.training.epochs=4"],
    "pyramidflow": ["head.training.epochs=4"],
}
"""Settings of models with which a planted defect is still found."""


@pytest.fixture(scope="session")
def textiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of three seen subclasses of cloth and an unseen one."""
    folder = tmp_path_factory.mktemp("cloth") / "data"
    return make_textures(
        folder, seed=3, train_images=24, test_images=6, defect_images=7, seen=SEEN[:3], unseen=UNSEEN[:1]
    )


@pytest.fixture(scope="session")
def feature_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all fits of the session: features are computed once."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="session")
def config() -> Config:
    """The defaults, with the labels that the manifest gives, a split, and a rate for which its rolls are enough."""
    data = DataConfig(subclass_from="column", calibration="split")
    return Config(data=data, outcome=OutcomeConfig(false_alarm_rate=0.1), seed=7)


@pytest.fixture(scope="session")
def default(textiles: Path, feature_cache: Path, config: Config) -> Detector:
    """The default model."""
    return Detector.fit(textiles, config=config, cache=feature_cache)
