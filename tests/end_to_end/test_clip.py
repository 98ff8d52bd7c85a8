"""CNC on a CLIP model that is read from a file: trained, kept, and used again without its text side."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from normweave.cli import app
from normweave.textiles import SEEN, render

open_clip = pytest.importorskip("open_clip", reason="pip install 'normweave[clip]'")

NAME = "small-for-training"
SMALL = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory: pytest.TempPathFactory):
    """`NAME` is one of open_clip's models while these tests run."""
    folder = tmp_path_factory.mktemp("models")
    (folder / f"{NAME}.json").write_text(json.dumps(SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
        patch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
        open_clip.add_model_config(folder)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    state = open_clip.CLIP(**SMALL).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "cloth"
    folder.mkdir()
    for seed in range(36):
        Image.fromarray(render(SEEN[0], seed=seed, size=(64, 64)).image).save(folder / f"{seed}.png")
    return folder


def call(*words: object) -> list[dict]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code in (0, 1), result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def bundle(weights: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    call(
        *("train", images, "-o", folder / "cloth.bundle", "--model", "cnc", "--clip-weights", weights),
        *("--set", f"features.model={NAME}", "--set", "features.layers=[1, 3]", "--set", "head.width=16"),
        *("--set", "prepare.height=64", "--set", "prepare.width=64", "--set", "head.guide.tokens=text"),
        *("--set", "head.training.epochs=2", "--set", "head.prompts.training.epochs=2"),
        *("--set", "data.folds=2", "--cache", folder / "cache", "--json"),
    )
    return folder / "cloth.bundle"


def test_the_text_side_is_folded_into_the_bundle(bundle: Path, weights: Path):
    with safe_open(bundle / "weights.safetensors", framework="pt") as file:
        names = set(file.keys())
        prompts = file.get_tensor("head.prompts.embeddings")
        guidance = file.get_tensor("head.guidance.tokens")
    assert prompts.shape == (8, SMALL["embed_dim"])
    torch.testing.assert_close(prompts.norm(dim=1), torch.ones(8))
    assert guidance.shape == (16, SMALL["text_cfg"]["width"])
    assert not any("token_embedding" in name or "text_projection" in name for name in names)


def test_it_predicts_where_the_weights_are_not(bundle: Path, images: Path, weights: Path):
    moved = weights.rename(weights.with_name("elsewhere.safetensors"))
    try:
        outcomes = call("predict", bundle, images / "0.png", images / "1.png", "--json")
    finally:
        moved.rename(weights)
    assert all(np.isfinite(outcome["pred_score"]) for outcome in outcomes)
    assert {outcome["category"] for outcome in outcomes} == {"cloth"}
