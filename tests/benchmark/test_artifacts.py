"""A run saves the scores that it evaluated, of images whose choice does not depend on results."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normweave import settings
from normweave.benchmark import artifacts
from normweave.benchmark.evaluate import measure
from normweave.benchmark.protocols import folds
from normweave.config import Config
from normweave.data import layouts
from normweave.detector import Detector
from normweave.textiles import SEEN, UNSEEN, make_textures
from normweave.types import Sample

SMALL = ["prepare.height=64", "prepare.width=64", "data.subclass_from=column", "data.calibration=split"]


def listed(category: str, defects: dict[str, int], good: int = 5) -> list[Sample]:
    rows = [Sample(image_path=Path(f"{category}/good/{n}.png"), category=category) for n in range(good)]
    for defect, count in defects.items():
        rows += [
            Sample(
                image_path=Path(f"{category}/{defect}/{n}.png"),
                category=category,
                label="anomalous",
                defect=defect,
                mask_path=Path(f"{category}/{defect}/{n}_mask.png"),
            )
            for n in range(count)
        ]
    return rows


def test_one_image_of_each_defect_is_shown_in_any_order():
    tests = listed("tile", {"crack": 3, "fray": 9, "hole": 1})
    chosen = artifacts.shown(tests)
    assert [sample.defect for sample in chosen] == [None, "crack", "fray", "hole"]
    assert artifacts.shown(tests[::-1]) == chosen
    places = [int(sample.image_path.stem) / count for sample, count in zip(chosen, (5, 3, 9, 1), strict=True)]
    assert max(places) - min(places) > 0.3  # not all from the same position of their lists


def test_no_category_crowds_out_another():
    many = {f"defect{n}": 2 for n in range(20)}
    tests = listed("tile", many) + listed("board", many) + listed("cloth", {"hole": 2})
    chosen = artifacts.shown(tests)
    assert len(chosen) == artifacts.SHOWN
    counts = [sum(sample.category == name for sample in chosen) for name in ("tile", "board", "cloth")]
    assert counts == [2, 3, 2]
    assert all(
        any(sample.label == "normal" and sample.category == name for sample in chosen)
        for name in ("tile", "board", "cloth")
    )


def test_a_defect_without_a_mask_is_not_shown():
    tests = [replace(sample, mask_path=None) for sample in listed("tile", {"crack": 2})]
    assert [sample.label for sample in artifacts.shown(tests)] == ["normal"]
    assert artifacts.shown([]) == []


@pytest.fixture(scope="module")
def fold(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cloth")
    make_textures(
        folder,
        size=(64, 64),
        train_images=32,
        test_images=3,
        defect_images=3,
        seen=SEEN[:2],
        unseen=UNSEEN[:1],
    )
    config = settings.override(Config(), SMALL)
    (made,) = folds(layouts.read(folder, config.data), "given", seed=0)
    return made


def saved(detector: Detector, fold, path: Path):
    predictions = {side: measure(detector, tests)[1] for side, tests in fold.tests.items()}
    artifacts.save(path, detector, fold, predictions, cache=None)
    return artifacts.read(path, fold), predictions


def fitted(fold, model: str, *further: str) -> Detector:
    config = settings.override(settings.with_model(Config(), model), [*SMALL, *further])
    return Detector.fit(fold.samples, config=config)


def test_a_run_saves_scores_maps_and_embeddings(fold, tmp_path: Path):
    detector = fitted(fold, "adapted-moe")
    artifact, predictions = saved(detector, fold, tmp_path / "run.safetensors")
    for side, tests in fold.tests.items():
        assert artifact.scores[side].tolist() == [
            [row["label"] == "anomalous", row["pred_score"], row["threshold"]] for row in predictions[side]
        ]
        for sample, small in zip(artifacts.shown(tests), artifact.maps[side], strict=True):
            whole = detector.score(str(sample.image_path)).anomaly_map
            np.testing.assert_allclose(small, whole, atol=5e-3)  # 64 pixels: nothing to shrink
    assert len(artifact.subclass_names) == len(artifact.roles) == len(artifact.embeddings)
    tests = [sample for side in fold.tests.values() for sample in side]
    assert np.bincount(artifact.roles).tolist() == [
        len(fold.samples),
        sum(sample.label == "normal" for sample in tests),
        sum(sample.label == "anomalous" for sample in tests),
    ]
    # The distance to the nearest subclass, from which `unknown` is decided, follows from the embeddings.
    whitened = detector.network.head.novelty.means.numpy()
    first = next(index for index, sample in enumerate(s for s in tests if s.label == "normal"))
    embedding = artifact.embeddings[len(fold.samples) + first]
    outcome = detector.score(str(next(s for s in tests if s.label == "normal").image_path))
    assert np.linalg.norm(embedding - whitened, axis=1).min() == pytest.approx(outcome.subclass_distance, rel=1e-3)


def test_embeddings_of_a_routing_network(fold, tmp_path: Path):
    network = ("head.routing.method=network", "head.routing.training.epochs=2")
    artifact, _ = saved(fitted(fold, "adapted-moe", *network), fold, tmp_path / "run.safetensors")
    assert artifact.embeddings.shape[1] == 64
    np.testing.assert_allclose(np.linalg.norm(artifact.embeddings, axis=1), 1, rtol=1e-5)  # Eq. 1 with norm


def test_cnc_has_embeddings_too(fold, tmp_path: Path):
    artifact, _ = saved(fitted(fold, "cnc", "head.training.epochs=1"), fold, tmp_path / "run.safetensors")
    assert set(artifact.subclass_names) == {sample.subclass_name for side in fold.tests.values() for sample in side}
    assert np.isfinite(artifact.embeddings).all()


@pytest.mark.parametrize("model", ["dfm", "mean-shift"])
def test_what_a_method_does_not_have_is_not_saved(fold, tmp_path: Path, model: str):
    artifact, _ = saved(fitted(fold, model), fold, tmp_path / "run.safetensors")
    assert artifact.embeddings is None
    assert artifact.subclass_names == ()
    assert all((one is None) == (model == "mean-shift") for maps in artifact.maps.values() for one in maps)


def test_an_image_that_cannot_be_read_leaves_a_gap(fold, tmp_path: Path):
    detector = fitted(fold, "dfm")
    tests = fold.tests["unseen"]
    broken = artifacts.shown(tests)[1]
    path = tmp_path / "broken.png"
    path.write_bytes(broken.image_path.read_bytes()[:60])
    spoilt = replace(fold, tests={"unseen": tuple(replace(s, image_path=path) if s == broken else s for s in tests)})
    artifact, _ = saved(detector, spoilt, tmp_path / "run.safetensors")
    assert len(artifact.scores["unseen"]) == len(tests) - 1
    gone = [sample.image_path == path for sample in artifacts.shown(spoilt.tests["unseen"])]
    assert [one is None for one in artifact.maps["unseen"]] == gone
    assert any(gone)


def test_maps_are_kept_small():
    ramp = np.linspace(0, 1, 640 * 320, dtype=np.float32).reshape(640, 320)
    small = artifacts.small(ramp)
    assert small.shape == (artifacts.LONGEST, artifacts.LONGEST // 2)
    assert small.mean() == pytest.approx(ramp.mean(), rel=1e-4)
    picture = Image.fromarray(small)
    assert picture.mode == "F"
