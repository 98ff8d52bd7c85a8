"""The contract of every extractor. Add a timm model to BACKBONES, another extractor to CONFIGS."""

import numpy as np
import pytest
import torch

from normweave import features
from normweave.config import OpenClipConfig, TimmConfig

BACKBONES = {  # name: strides
    "resnet18": (4, 8, 16),
    "vit_tiny_patch16_224": (16,),
    "mobilevit_xxs": (4, 8, 16),
    "tf_efficientnet_lite0": (4, 8, 16),
    "wide_resnet50_2": (8, 16),
}
SLOW = {"wide_resnet50_2"}
CONFIGS = {  # name: (settings, pixels of a cell)
    name: (TimmConfig(backbone=name, strides=strides, weights="random", batch_images=4), 8)
    for name, strides in BACKBONES.items()
} | {
    "blocks": (
        TimmConfig(
            backbone="vit_tiny_patch16_dinov3_qkvb",
            blocks=(1, 3),
            grid_stride=16,
            neighbourhood=1,
            weights="random",
            batch_images=4,
        ),
        16,
    ),
    "ViT-S-16-alt": (
        OpenClipConfig(model="ViT-S-16-alt", layers=(1, 3), weights="random", batch_images=4),
        16,
    ),
}
HEIGHT, WIDTH = 64, 96


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CONFIGS],
    ids=lambda name: f"features/extractor:{name}",
)
def case(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def config(case):
    return case[0]


@pytest.fixture(scope="module")
def extractor(config):
    return features.build(config, height=HEIGHT, width=WIDTH)


@pytest.fixture(scope="module")
def pixels():
    numbers = np.random.default_rng(0).integers(0, 256, (6, 3, HEIGHT, WIDTH), dtype=np.uint8)
    return torch.from_numpy(numbers)


def test_features_have_the_declared_shape(case, extractor, pixels):
    _, cell = case
    got = extractor.extract(pixels)

    assert got.shape == (6, *extractor.shape)
    assert extractor.shape[1:] == (HEIGHT // cell, WIDTH // cell)
    assert got.dtype == torch.float32
    assert got.isfinite().all()
    assert got.is_contiguous()


def test_an_image_has_the_same_features_in_any_batch(extractor, pixels):
    together = extractor.extract(pixels)
    alone = torch.cat([extractor.extract(one[None]) for one in pixels])
    assert torch.equal(alone, together)

    order = torch.tensor([5, 0, 3, 2, 4, 1])
    assert torch.equal(extractor.extract(pixels[order]), together[order])


def test_a_change_of_pixels_changes_the_features_there(extractor, pixels):
    changed = pixels[:1].clone()
    changed[:, :, :16, :16] = 255 - changed[:, :, :16, :16]
    moved = (extractor.extract(changed) - extractor.extract(pixels[:1])).abs().amax(1)[0]  # (h, w)
    assert moved[0, 0] > 0
    assert moved[0, 0] > moved[-1, -1]


def test_no_images_give_no_features(extractor, pixels):
    assert extractor.extract(pixels[:0]).shape == (0, *extractor.shape)


def test_train_mode_changes_nothing(extractor, pixels):
    before = extractor.extract(pixels)
    state = {key: tensor.clone() for key, tensor in extractor.state_dict().items()}

    extractor.train()

    assert not any(module.training for module in extractor.modules())
    assert torch.equal(extractor.extract(pixels), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in extractor.state_dict().items())


def test_no_parameter_can_be_trained(extractor, pixels):
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert not extractor(pixels).requires_grad


def test_building_is_reproducible_and_leaves_the_random_state_unchanged(config, extractor, pixels):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)

    again = features.build(config, height=HEIGHT, width=WIDTH)

    assert torch.equal(torch.rand(3), expected)
    assert again.fingerprint == extractor.fingerprint
    assert torch.equal(again.extract(pixels), extractor.extract(pixels))
