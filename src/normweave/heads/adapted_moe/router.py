"""Routing: the experts that score an image, and their weights."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.config import NetworkRoutingConfig
from normweave.heads.base import TrainingStage


class Choice(NamedTuple):
    """The chosen experts of each image."""

    weights: Tensor  # (B, T), every row sums to 1
    experts: Tensor  # (B, T) int64, heaviest first


def select_experts(similarity: Tensor, *, temperature: float, top_k: int) -> Choice:
    """Select the top k experts; their weights are the softmax over them.

    This is the softmax over all, renormalised, but does not depend on the number of the others: their sum may round
    differently.

    Args:
        similarity: (B, K), higher = more similar.
    """
    top_k = min(top_k, similarity.shape[1])
    highest, experts = similarity.topk(top_k, dim=1)  # (B, T) each
    return Choice((highest / temperature).softmax(dim=1), experts)


class Router(nn.Module):
    """The routing network of arXiv 2409.05611.

    Eq. 1: x = GAP(relu(W * X + b)), with W a 3x3 convolution; x is L2-normalised if `config.norm` is set.
    Eq. 2: L = alpha |x - c_y|^2 - (1 - alpha) log softmax_j(w_j . x)[y], averaged over images (summed in the paper).

    The centres c_k follow the embeddings of their subclass (Wen et al. 2016, Eq. 4 and Algorithm 1); no gradient
    reaches them. Images are routed by the cosine of x and c_k.

    Args:
        width: D, number of channels of the features.
    """

    centres: Tensor  # (K, C)

    def __init__(self, config: NetworkRoutingConfig, *, width: int) -> None:
        super().__init__()
        self.config = config
        embedding = config.embedding
        self.kernel = nn.Parameter(torch.zeros(embedding, width, 3, 3))  # W
        self.bias = nn.Parameter(torch.zeros(embedding))  # b
        self.classifier = nn.Parameter(torch.zeros(1, embedding))  # w_j
        self.register_buffer("centres", torch.zeros(1, embedding))

    def start(self, *, subclasses: int, generator: torch.Generator) -> None:
        """Draw the initial weights as torch draws those of a convolution and a linear layer."""
        embedding, width = self.kernel.shape[:2]

        def uniform(*shape: int, inputs: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator))

        self.kernel = uniform(embedding, width, 3, 3, inputs=9 * width)
        self.bias = uniform(embedding, inputs=9 * width)
        self.classifier = uniform(subclasses, embedding, inputs=embedding)
        self.centres = torch.zeros(subclasses, embedding)

    def forward(self, features: Tensor) -> Tensor:
        """Return x of Eq. 1, (B, D, h, w) -> (B, C)."""
        pooled = F.conv2d(features, self.kernel, self.bias, self.config.stride, padding=1).relu().mean(dim=(2, 3))
        return F.normalize(pooled, dim=1) if self.config.norm else pooled

    def losses(self, embedded: Tensor, subclasses: Tensor) -> dict[str, Tensor]:
        """Return the loss of Eq. 2 and its two parts, for (B, C) embeddings and (B,) subclasses."""
        centre = (embedded - self.centres[subclasses]).square().sum(dim=1).mean()
        softmax = F.cross_entropy(embedded @ self.classifier.T, subclasses)
        return {
            "loss": self.config.alpha * centre + (1 - self.config.alpha) * softmax,
            "centre": centre,
            "softmax": softmax,
        }

    @torch.no_grad()
    def move_centres(self, embedded: Tensor, subclasses: Tensor) -> None:
        """Update the centres: c_k -= rate * sum over own images of (c_k - x) / (1 + number of own images)."""
        own = F.one_hot(subclasses, len(self.centres)).to(embedded.dtype)  # (B, K)
        number = own.sum(dim=0)[:, None]  # (K, 1)
        step = (number * self.centres - own.T @ embedded) / (1 + number)  # (K, C)
        self.centres -= self.config.centre_rate * step

    def similarity(self, features: Tensor) -> Tensor:
        """Return the cosine of each embedding and each centre, (B, K)."""
        return F.normalize(self(features), dim=1) @ F.normalize(self.centres, dim=1).T


class RouterStage(TrainingStage):
    """Train the routing network on Eq. 2.

    Args:
        router: is trained.
        assign: (features (B, D, h, w), given subclasses (B,)) to the targets (B,).
    """

    name = "router"

    def __init__(self, router: Router, *, assign: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(router, router.config.training)
        self.router = router
        self.assign = assign

    def optimiser(self) -> torch.optim.Optimizer:
        """Return Adam over the convolution and the classifier."""
        return torch.optim.Adam(self.router.parameters(), lr=self.learning_rate)

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Return the loss of Eq. 2 and its parts; in training the centres are then updated."""
        own = self.assign(features, subclasses)
        embedded = self.router(features)
        losses = self.router.losses(embedded, own)
        if training:
            self.router.move_centres(embedded.detach(), own)
        return losses
