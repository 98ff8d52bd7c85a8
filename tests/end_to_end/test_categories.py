"""One model for tiles and cloth: it returns the category of their images, and `unknown` for boards."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from normweave.cli import app
from normweave.config import DataConfig
from normweave.data.layouts import read
from normweave.data.manifest import write_manifest

pytestmark = [pytest.mark.data, pytest.mark.slow]


def call(*words: object) -> list[dict]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code in (0, 1), result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def bundle(data_root: Path, textiles: Path, feature_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CNC on some tiles of two lights and three subclasses of cloth, joined by the command; without boards."""
    folder = tmp_path_factory.mktemp("categories")
    tiles = read(data_root / "magnetic-tiles", DataConfig(subclass=("exp1", "exp3")), layout="magnetic_tiles")
    few = {sample.group for sample in tiles if sample.label == "normal"}
    few = set(sorted(few)[:24])
    write_manifest([sample for sample in tiles if sample.group in few], folder / "tiles.csv")
    call("data", "manifest", folder / "tiles.csv", textiles, "-o", folder / "all.csv", "--json")
    (trained,) = call(
        *("train", folder / "all.csv", "-o", folder / "all.bundle", "--json", "--cache", feature_cache),
        *("--model", "cnc", "--subclass-from", "column", "--set", "data.calibration=split"),
        *("--set", "head.training.epochs=2"),
        *("--set", "head.prompts.training.epochs=2", "--set", "head.synthetic.variants=1"),
    )
    assert sorted(trained["categories"]) == ["cloth", "magnetic_tiles"]
    return folder / "all.bundle"


def test_evaluate_tells_the_categories_apart(bundle: Path, feature_cache: Path, tmp_path: Path):
    call("evaluate", bundle, bundle.parent / "all.csv", "-o", tmp_path / "evaluation", "--json")
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert sorted(metrics["by_category"]) == ["cloth", "magnetic_tiles"]
    for table in (metrics["mean"], metrics["pooled"], *metrics["by_category"].values()):
        assert table["over_generalisation"]["ratio"] > 1
        assert table["over_generalisation"]["cell_auroc"] > 0.5


def test_predict_names_the_category(bundle: Path, textiles: Path, data_root: Path):
    tile = sorted((data_root / "magnetic-tiles" / "MT_Free").glob("exp1_*.jpg"))[-1]
    woven = next(s.image_path for s in read(textiles, DataConfig()) if s.split == "test" and s.label == "normal")
    outcomes = call("predict", bundle, tile, woven, "--json")
    assert [outcome["category"] for outcome in outcomes] == ["magnetic_tiles", "cloth"]
    assert outcomes[0]["subclass"] == "exp1"


def test_a_board_is_unknown(bundle: Path, data_root: Path):
    boards = sorted((data_root / "deep-pcb").glob("*/*_temp.jpg"))[::15]
    outcomes = call("predict", bundle, *boards, "--json")
    assert [outcome["verdict"] for outcome in outcomes] == ["unknown"] * len(boards)
