"""A small detector of three kinds of cloth, with untrained weights, and its bundle."""

import pytest

from normweave.config import AdaptedMoEConfig, Config, DataConfig, OutcomeConfig, PrepareConfig, TimmConfig
from normweave.detector import Detector
from normweave.textiles import SEEN, UNSEEN, make_textures


@pytest.fixture(scope="session")
def cloth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtime") / "cloth"
    return make_textures(
        folder,
        size=(64, 64),
        seed=3,
        train_images=18,
        test_images=3,
        defect_images=3,
        seen=SEEN[:3],
        unseen=UNSEEN[:1],
    )


@pytest.fixture(scope="session")
def detector(cloth):
    return Detector.fit(
        cloth,
        config=Config(
            data=DataConfig(subclass_from="column"),
            prepare=PrepareConfig(height=64, width=64),
            features=TimmConfig(weights="random", strides=(8,), batch_images=4),
            head=AdaptedMoEConfig(expert="gaussian"),
            outcome=OutcomeConfig(false_alarm_rate=0.1, unknown_rate=0.1),
        ),
        use_cache=False,
        device="cpu",
    )


@pytest.fixture(scope="session")
def bundle(detector, tmp_path_factory):
    return detector.save(tmp_path_factory.mktemp("bundles") / "cloth.bundle")


@pytest.fixture(scope="session")
def photos(cloth):
    """The test images, seen and unseen, good and not."""
    return sorted(str(path) for path in cloth.parent.glob("cloth/*/test/*/*.png"))
