"""A vision-language pair that pip carries: EfficientNet-Lite0 sees, MiniLM reads, ImageNet's class names join them.

No image-text pair was ever seen. The joint space is where the classifier's rows of the 1000 ImageNet classes and the
definitions of their names agree best (features/align.py; docs/decisions/0005-offline-pair.md). It knows things by their
nouns; of their condition (`flawless`, `cracked`) it knows next to nothing until prompts are trained in it.
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

from normweave.errors import DataError, MissingError
from normweave.features import carried, minilm, trunk
from normweave.types import JointMaps, Text

VISION = "tf_efficientnet_lite0"
JOINT = 64
"""J, canonical correlations that are kept."""
FILE = Path(__file__).with_name("alignment.safetensors")
RIDGE = 10.0


class Alignment(NamedTuple):
    """From both sides to the joint space."""

    text_mean: Tensor  # (384,)
    text_projection: Tensor  # (384, J)
    image_projection: Tensor  # (1280, J)


def alignment(path: Path = FILE) -> Alignment:
    """The alignment of a file that features/align.py made, as a rule that of this package.

    Raises:
        DataError: it is damaged.
    """
    try:
        tensors = safetensors.torch.load_file(path)
        return Alignment(**tensors)
    except (OSError, SafetensorError, TypeError) as error:
        raise DataError(
            f"The alignment {path.name} cannot be read ({error}). Put it right by installing normweave again: "
            "pip install --force-reinstall --no-deps normweave"
        ) from error


def vision(*, random: bool) -> Any:
    """The whole network of the image side, frozen, with its last convolution and its classifier.

    Args:
        random: untrained, for tests; otherwise the weights that pip carries.

    Raises:
        MissingError: the package of the weights is not installed.
        DataError: its file is not the one that we know.
    """
    with torch.random.fork_rng(
        devices=[]
    ):  # the caller's own random numbers go on as if nothing had been made
        torch.manual_seed(0)
        model: Any = timm.create_model(VISION, pretrained=False)
    if not random:
        state = carried.read(VISION, {key: tensor.shape for key, tensor in model.state_dict().items()})
        model.load_state_dict(state)
    return model.eval().requires_grad_(False)


class OfflineText(nn.Module):
    """MiniLM, and from its sentence embeddings into the joint space: t = (e - mean) P, then t / |t|."""

    mean: Tensor
    projection: Tensor

    def __init__(self, model: minilm.MiniLM, *, mean: Tensor, projection: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("projection", projection)
        self.joint_dim = projection.shape[1]
        self.word_dim = model.word_dim
        self.token_dim = model.token_dim

    def words(self, text: str) -> Tensor:
        """Embeddings of the word pieces of a text, (pieces, 384)."""
        return self.model.words(text)

    def encode_prompts(self, context: Tensor, states: Sequence[str]) -> Tensor:
        """Prompts [context (m, 384), words of a state] to (len(states), J) of length one."""
        embedded = self.model.embed(context, states)  # (P, 384)
        return functional.normalize((embedded - self.mean) @ self.projection, dim=1)

    def prompt_tokens(self, context: Tensor, state: str) -> Tensor:
        """What MiniLM says at the places of the context, (m, 384) to (m, 384); the prompt ends with the state."""
        return self.model.prompt_tokens(context, state)


class OfflinePair:
    """The pair beside an extractor of EfficientNet-Lite0.

    Args:
        strides: levels that the extractor gives, 32 among them.
        random: the image side is untrained, for tests.

    Raises:
        MissingError: the package of the image side's weights is not installed.
        DataError: weights or alignment are damaged.
    """

    text: Text | None

    def __init__(self, *, strides: Sequence[int], random: bool) -> None:
        aligned = alignment()
        model = vision(random=random)
        levels = trunk.stages(model, name=VISION, strides=strides)
        self.dims = [model.feature_info[level]["num_chs"] for level in levels]
        self.last = nn.Sequential(model.conv_head, model.bn2)  # timm's batch norm carries its ReLU6
        self.projection = aligned.image_projection
        try:
            self.text = OfflineText(minilm.load(), mean=aligned.text_mean, projection=aligned.text_projection)
        except MissingError:
            self.text = None

    @torch.no_grad()
    def joint_maps(self, normals: Iterable[Tensor]) -> JointMaps:
        """A linear way from each level's tokens to the joint feature of the same place, learnt from normal images.

        The joint feature is j = (f - mean f) P with f = ReLU6(BN(conv_head(e_32))), of the token e_32 of stride 32, and
        the mean over all places of the normals. For a level's tokens e, standardised to z = (e - mean e) / std e, ridge
        regression gives

            A = (Z'Z + 10 I)^-1 Z'J,    W = diag(1 / std e) A,    b = -mean e W.

        As columns of Z add up to 0, the mean of f drops out of Z'J: one pass over the images is enough.

        Args:
            normals: raw features of all fit normals, (B, D, h, w) a time; walked through once.
        """
        count = 0
        width = sum(self.dims)
        tokens_sum = torch.zeros(width, dtype=torch.float64)
        products = torch.zeros(width, width, dtype=torch.float64)  # E'E, of all levels at once
        targets_sum = torch.zeros(self.projection.shape[1], dtype=torch.float64)
        crossed = torch.zeros(width, len(targets_sum), dtype=torch.float64)  # E'Y
        for features in normals:
            deepest = features[:, -self.dims[-1] :]  # (B, 320, h, w)
            seen = self.last(deepest).movedim(1, -1).flatten(0, -2)  # (B h w, 1280)
            targets = (seen @ self.projection).double()  # (B h w, J)
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
        # What varies by no more than its own rounding never changed; it is not to be divided by that.
        changes = variance > 1e-10 * products.diagonal() / count
        deviations = torch.where(changes, variance, 1).sqrt()
        weights, biases = [], []
        for level in torch.split(torch.arange(width), self.dims):
            deviation = deviations[level]
            correlation = covariance[level][:, level] / deviation.outer(deviation)  # Z'Z / n
            ridge = correlation + torch.eye(len(level), dtype=torch.float64) * (RIDGE / count)
            solved = torch.linalg.solve(ridge, crossed[level] / deviation[:, None])  # A, (D_l, J)
            weight = solved / deviation[:, None]
            weights.append(weight.float())
            biases.append(-(mean[level] @ weight).float())
        return JointMaps(weights=tuple(weights), biases=tuple(biases), layer_norm=False)
