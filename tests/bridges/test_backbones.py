"""A registered backbone is the backbone of the features, with its weights."""

import timm
import torch

from normweave.bridges import backbones
from normweave.config import TimmConfig
from normweave.features.timm import load_model


def test_a_registered_backbone_is_the_carried_one():
    config = TimmConfig()
    backbone = backbones.register(config, strides=(4, 8, 16))
    loaded = load_model(config.backbone, TimmConfig(weights="auto", strides=(4, 8, 16)))
    model = timm.create_model(backbone.name, pretrained=True, features_only=True, out_indices=backbone.indices)
    images = torch.rand(1, 3, 64, 64)

    with torch.no_grad():
        got = model.eval()(images)
        wanted = loaded.model.eval().forward_intermediates(images, indices=loaded.indices, intermediates_only=True)

    assert backbone.channels == [24, 40, 112]
    assert len(backbone.layers) == 3
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert (backbone.mean, backbone.std) == (loaded.mean, loaded.std)


def test_other_weights_have_another_name():
    names = {backbones.register(TimmConfig(weights=weights), strides=[8]).name for weights in ("auto", "random")}
    assert len(names) == 2
