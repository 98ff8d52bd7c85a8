"""A vision-language pair from pip packages: EfficientNet-Lite0 for images, MiniLM for text, aligned on ImageNet.

It was trained on no image-text pair. In its joint space the classifier weights of the 1000 ImageNet classes correlate
most with the text embeddings of their definitions (features/align.py; docs/decisions/0005-offline-pair.md). It
recognizes objects by their nouns. Conditions (`flawless`, `cracked`) have little effect until prompts are trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from normweave.config import OfflinePairConfig
from normweave.errors import DataError, MissingError
from normweave.features import minilm, weights
from normweave.features import timm as timm_backbones
from normweave.features.frozen import Backbone
from normweave.types import JointMaps, Pair, Text

VISION = "tf_efficientnet_lite0"
JOINT = 64
"""J, the number of canonical directions."""
FILE = Path(__file__).with_name("alignment.safetensors")
RIDGE = 10.0


def load(config: OfflinePairConfig, *, height: int, width: int) -> Backbone:
    """Return EfficientNet-Lite0. Raises what `timm.load` raises."""
    return timm_backbones.load_model(VISION, config)


def pair(config: OfflinePairConfig) -> Pair:
    """Return MiniLM and the projection of image features into the joint space."""
    return OfflinePair(strides=config.strides, random=config.weights == "random")


class Alignment(NamedTuple):
    """Projections of text embeddings and image features into the joint space."""

    text_mean: Tensor  # (384,)
    text_projection: Tensor  # (384, J)
    image_projection: Tensor  # (1280, J)


def alignment(path: Path = FILE) -> Alignment:
    """Read an alignment that features/align.py wrote.

    Raises:
        DataError: the file is damaged.
    """
    try:
        tensors = safetensors.torch.load_file(path)
        return Alignment(**tensors)
    except (OSError, SafetensorError, TypeError) as error:
        raise DataError(
            f"The alignment {path.name} cannot be read ({error}). Install normweave again: "
            "pip install --force-reinstall --no-deps normweave"
        ) from error


def vision(*, random: bool) -> Any:
    """Return the complete, frozen image network, with its last convolution and its classifier.

    Args:
        random: seeded random weights, for tests. Otherwise the weights of the pip package.

    Raises:
        MissingError: the package of the weights is not installed.
        DataError: the SHA-256 of its file is not the expected one.
    """
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state unchanged
        torch.manual_seed(0)
        model: Any = timm.create_model(VISION, pretrained=False)
    if not random:
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        model.load_state_dict(weights.read_packaged(VISION, shapes))
    return model.eval().requires_grad_(False)


class OfflineText(nn.Module):
    """MiniLM and the projection of its sentence embeddings into the joint space: t = (e - mean) P, then t / |t|."""

    mean: Tensor
    projection: Tensor

    def __init__(self, model: minilm.MiniLM, *, mean: Tensor, projection: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("projection", projection)
        self.joint_dim = projection.shape[1]
        self.embedding_dim = model.embedding_dim
        self.output_dim = model.output_dim

    def embed_tokens(self, text: str) -> Tensor:
        """Return the token embeddings (n, 384) of a text."""
        return self.model.embed_tokens(text)

    def encode_prompts(self, context: Tensor, states: Sequence[str]) -> Tensor:
        """Return unit vectors (len(states), J) in the joint space, of prompts [context (m, 384), state]."""
        embedded = self.model.embed(context, states)  # (P, 384)
        return functional.normalize((embedded - self.mean) @ self.projection, dim=1)

    def encode_context(self, context: Tensor, state: str) -> Tensor:
        """Return MiniLM's outputs (m, 384) at the positions of the context (m, 384), in the prompt [context, state]."""
        return self.model.encode_context(context, state)


class OfflinePair:
    """The text side and the joint space of EfficientNet-Lite0's features.

    Args:
        strides: levels of the extractor. They include 32.
        random: the image network has random weights, for tests.

    Raises:
        MissingError: the package of the image network's weights is not installed.
        DataError: weights or alignment are damaged.
    """

    text: Text | None

    def __init__(self, *, strides: Sequence[int], random: bool) -> None:
        aligned = alignment()
        model = vision(random=random)
        levels = timm_backbones.stages(model, name=VISION, strides=strides)
        self.dims = [model.feature_info[level]["num_chs"] for level in levels]
        self.last = nn.Sequential(model.conv_head, model.bn2)  # timm's batch norm includes its ReLU6
        self.projection = aligned.image_projection
        try:
            self.text = OfflineText(minilm.load(), mean=aligned.text_mean, projection=aligned.text_projection)
        except MissingError:
            self.text = None

    @torch.no_grad()
    def joint_maps(self, normals: Iterable[Tensor]) -> JointMaps:
        """Return linear maps from each level's tokens to the joint features of the same cells, by ridge regression.

        The joint feature is j = (f - mean f) P with f = ReLU6(BN(conv_head(e_32))), of the token e_32 of stride 32, and
        the mean over all cells of the normal images. For a level's tokens e, standardized to z = (e - mean e) / std e,

            A = (Z'Z + 10 I)^-1 Z'J,    W = diag(1 / std e) A,    b = -mean e W.

        The columns of Z sum to 0, so the mean of f cancels in Z'J and one pass over the images is enough.

        Args:
            normals: raw features of all fit normals, in batches (B, D, h, w). Read once.
        """
        count = 0
        width = sum(self.dims)
        tokens_sum = torch.zeros(width, dtype=torch.float64)
        products = torch.zeros(width, width, dtype=torch.float64)  # E'E, of all levels at once
        targets_sum = torch.zeros(self.projection.shape[1], dtype=torch.float64)
        crossed = torch.zeros(width, len(targets_sum), dtype=torch.float64)  # E'Y
        for features in normals:
            deepest = features[:, -self.dims[-1] :]  # (B, 320, h, w)
            outputs = self.last(deepest).movedim(1, -1).flatten(0, -2)  # (B h w, 1280)
            targets = (outputs @ self.projection).double()  # (B h w, J)
            tokens = features.movedim(1, -1).flatten(0, -2).double()  # (B h w, D)
            count += len(tokens)
            tokens_sum += tokens.sum(0)
            products += tokens.T @ tokens
            targets_sum += targets.sum(0)
            crossed += tokens.T @ targets
        mean = tokens_sum / count
        covariance = products / count - mean.outer(mean)
        crossed = crossed / count - mean.outer(targets_sum / count)
        variance = covariance.diagonal()
        # A variance within the rounding error belongs to a constant channel, which is divided by 1.
        varies = variance > 1e-10 * products.diagonal() / count
        all_std = torch.where(varies, variance, 1).sqrt()
        maps, biases = [], []
        for level in torch.split(torch.arange(width), self.dims):
            std = all_std[level]
            correlation = covariance[level][:, level] / std.outer(std)  # Z'Z / n
            ridge = correlation + torch.eye(len(level), dtype=torch.float64) * (RIDGE / count)
            solved = torch.linalg.solve(ridge, crossed[level] / std[:, None])  # A, (D_l, J)
            weight = solved / std[:, None]
            maps.append(weight.float())
            biases.append(-(mean[level] @ weight).float())
        return JointMaps(weights=tuple(maps), biases=tuple(biases), layer_norm=False)
