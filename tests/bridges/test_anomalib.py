"""Our models give in anomalib's Engine what our detectors give."""

import numpy as np
import onnxruntime
import pytest

from .conftest import NEEDS

pytest.importorskip("normweave.bridges.anomalib", reason=NEEDS)

from anomalib.data import Folder

from normweave.bridges.anomalib import NormweaveModel
from normweave.data.images import decode
from normweave.detector import Detector
from normweave.errors import BundleError

from .conftest import config_for, predicted, quiet_engine, to_test

# Lightning and anomalib warn of the number of workers, of a missing optimiser and of each other.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def features(monkeypatch, tmp_path):
    """The folder of the feature cache, which is not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "normweave"


def folder_of(samples) -> Folder:
    """anomalib's own data module over one textile, which reads the files itself."""
    home = samples[0].image_path.parents[2]
    return Folder(
        name="textile",
        root=home,
        normal_dir="train/good",
        abnormal_dir=[f"test/{path.name}" for path in (home / "test").iterdir() if path.name != "good"],
        normal_test_dir="test/good",
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        val_split_mode="same_as_test",
    )


@pytest.mark.parametrize(
    ("name", "further"),
    [
        ("dfm", ()),
        ("patchcore", ("maps.smoothing=0",)),
        ("simplenet", ("head.training.epochs=1",)),
        pytest.param("adapted-moe", ("data.subclass_from=auto", "head.max_subclasses=2"), marks=pytest.mark.slow),
    ],
)
def test_our_model_gives_the_scores_of_our_detector_in_the_engine(name, further, textiles, tmp_path, features):
    data = folder_of(textiles(64))
    model = NormweaveModel(config_for(name, *further))
    engine = quiet_engine(tmp_path)

    engine.fit(model, datamodule=data)
    assert list(features.glob("**/*.f16")), "the features were not cached"
    (metrics,) = engine.test(model, datamodule=data, verbose=False)
    batches = engine.predict(model, datamodule=data)

    assert 0 <= metrics["image_AUROC"] <= 1
    seen = 0
    for batch in batches:
        for path, score, label, anomaly_map in zip(
            batch.image_path, batch.pred_score, batch.pred_label, batch.anomaly_map, strict=True
        ):
            outcome = model.detector.score(str(path))
            assert float(score) == pytest.approx(outcome.pred_score, rel=1e-4, abs=1e-5)
            np.testing.assert_allclose(anomaly_map.squeeze(), outcome.anomaly_map, rtol=1e-3, atol=1e-4)
            assert bool(label) == (outcome.pred_score > outcome.threshold)
            seen += 1
    assert seen == 4
    alone = Detector.fit(
        sorted(str(s) for s in (data.train_data.samples.image_path)), config=model.config, use_cache=False
    )
    assert alone.record["fit_hashes"] == model.detector.record["fit_hashes"]


@pytest.mark.slow
def test_our_model_is_exported_by_their_engine(textiles, tmp_path):
    data = folder_of(textiles(64))
    model = NormweaveModel(
        {
            "head": {"kind": "dfm"},
            "prepare": {"height": 64, "width": 64},
            "outcome": {"false_alarm_rate": 0.2},
        }
    )
    engine = quiet_engine(tmp_path)
    engine.fit(model, datamodule=data)

    path = engine.export(model, "onnx", export_root=tmp_path, input_size=(64, 64))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    image = next(s.image_path for s in textiles(64) if s.split == "test")
    pixels = decode(image).transpose(2, 0, 1)[None].astype(np.float32) / 255
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {session.get_inputs()[0].name: pixels}), strict=True))
    outcome = model.detector.score(str(image))
    assert float(outputs["pred_score"].item()) == pytest.approx(outcome.pred_score, rel=1e-3)
    np.testing.assert_allclose(outputs["anomaly_map"].squeeze(), outcome.anomaly_map, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_our_model_is_loaded_from_a_bundle_and_not_from_a_checkpoint(textiles, tmp_path):
    data = folder_of(textiles(64))
    model = NormweaveModel(config_for("dfm"))
    engine = quiet_engine(tmp_path / "engine")
    engine.fit(model, datamodule=data)

    with pytest.raises(BundleError, match=r"Save it with model.detector.save\('part.bundle'\)"):
        NormweaveModel.load_from_checkpoint(engine.best_model_path)

    model.detector.save(tmp_path / "part.bundle")
    again = NormweaveModel(bundle=str(tmp_path / "part.bundle"))
    paths = [sample.image_path for sample in to_test(textiles(64))[:2]]
    first, second = (predicted(quiet_engine(tmp_path / name), one, paths) for name, one in (("a", model), ("b", again)))
    for path in paths:
        assert second[path][0] == pytest.approx(first[path][0], rel=1e-5)
    assert not again.train().model.training
