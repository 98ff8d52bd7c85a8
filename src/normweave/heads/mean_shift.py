"""How far an image's mean feature lies from its nearest normal images, after a contrastive adaption (Mean-Shifted)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.errors import DataError
from normweave.heads import state
from normweave.heads.base import Head, TrainingStage
from normweave.types import FitData, PatchScores

BATCH_IMAGES = 16


class MeanShift(Head):
    """Mean-shifted contrastive adaption of image features; it judges whole images and says nothing of where.

    Reiss and Hoshen 2021 (arXiv 2106.03844). With phi(x) of length one and c the mean of phi over the training images
    before adaption, brought to length one:

        theta(x) = (phi(x) - c) / |phi(x) - c|                                              Eq. 4
        L = -log exp(theta' theta'' / tau) / sum over all other views of exp(theta' . / tau)  Eq. 5
        L_angular = -phi(x) c                                                               Eq. 2
        score = mean over the k nearest training images of 1 - phi(x) phi(y)                Eq. 6

    The paper adapts the last stages of a ResNet on two augmented views of an image. Our backbone is frozen and its
    features are kept on disk: phi is their mean over the image through a small residual adapter, and a view is the mean
    over a random rectangle of the grid. Features are divided by their deviations, but not centred: around 0 there is no
    mean to shift by. The map is one cell, so it holds the image's score everywhere.

    Args:
        shape: (D, h, w) of the features.
        hidden: width of the adapter.
        temperature: tau.
        angular: with the angular loss.
        smallest_view: least share of the grid that a view covers.
        neighbours: k.
        max_images: drawn at random to be compared with; bounds memory.
        epochs, batch_images, learning_rate, patience: of the stage.
    """

    offset: Tensor  # (D,) what standardising took away, in deviations
    centre: Tensor  # (D,)
    bank: Tensor  # (N, D), rows of length one
    image_level = True

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        hidden: int,
        temperature: float,
        angular: bool,
        smallest_view: float,
        neighbours: int,
        max_images: int,
        epochs: int,
        batch_images: int,
        learning_rate: float,
        patience: int,
    ) -> None:
        super().__init__()
        self.subclass_names: tuple[str, ...] = ()
        self.adapter = Adapter(width=shape[0], hidden=hidden)
        self.temperature = temperature
        self.angular = angular
        self.smallest_view = smallest_view
        self.neighbours = neighbours
        self.max_images = max_images
        self.epochs = epochs
        self.batch_images = batch_images
        self.learning_rate = learning_rate
        self.patience = patience
        self.register_buffer("offset", torch.zeros(shape[0]))
        self.register_buffer("centre", torch.zeros(shape[0]))
        self.register_buffer("bank", torch.zeros(0, shape[0]))
        self.eval()

    @torch.no_grad()
    def begin(self, data: FitData) -> None:
        """Draw the initial weights, which change nothing, and find the centre."""
        if len(data) == 0:
            raise DataError("Mean-Shifted has no normal image to learn from. Give it at least one.")
        self.adapter.start(torch.Generator().manual_seed(data.seed))
        if data.mean is not None and data.std is not None:
            self.offset = data.mean / data.std
        total = torch.stack([phi.sum(dim=0) for phi in self._embedded(data, range(len(data)))]).sum(dim=0)
        self.centre = F.normalize(total, dim=0)

    def stages(self, data: FitData) -> Sequence[TrainingStage]:
        """One."""
        return (MeanShiftedStage(self),)

    @torch.no_grad()
    def finish(self, data: FitData) -> None:
        """Keep what the normal images became."""
        generator = torch.Generator().manual_seed(data.seed)
        rows = torch.randperm(len(data), generator=generator)[: self.max_images].sort().values.tolist()
        self.bank = torch.cat(list(self._embedded(data, rows)))

    def _embedded(self, data: FitData, rows: Sequence[int]) -> list[Tensor]:
        """phi of these images, (n, D) a time."""
        return [
            self.adapter(
                data.features.read(rows[start : start + BATCH_IMAGES]).mean(dim=(2, 3)) + self.offset
            )
            for start in range(0, len(rows), BATCH_IMAGES)
        ]

    @torch.no_grad()
    def forward(self, features: Tensor) -> PatchScores:
        """Score (B, D, h, w)."""
        similarity = self.adapter(features.mean(dim=(2, 3)) + self.offset) @ self.bank.T  # (B, N)
        nearest = similarity.topk(min(self.neighbours, len(self.bank)), dim=1).values  # (B, k)
        return PatchScores(scores=1 - nearest.mean(dim=1)[:, None, None], image_scores=None, routing=None)

    def state(self) -> dict[str, Tensor]:
        """The adapter, the centre and the normal images."""
        return state.state(self)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take them over."""
        state.load_state(self, tensors)


class Adapter(nn.Module):
    """phi = n(g + W_2 relu(W_1 g + b_1)), with n(x) = x / |x|; begins as n(g)."""

    def __init__(self, *, width: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, width, bias=False)

    def start(self, generator: torch.Generator) -> None:
        """Draw new weights."""
        nn.init.xavier_normal_(self.first.weight, generator=generator)
        nn.init.zeros_(self.first.bias)
        nn.init.zeros_(self.second.weight)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) to (B, D) of length one."""
        return F.normalize(features + self.second(self.first(features).relu()), dim=1)


def contrast(one: Tensor, other: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent over two views of each image, (B, D) each: every view is to be like the other one of its image.

    Chen et al. 2020, arXiv 2002.05709, Eq. 1, with rows brought to length one.
    """
    views = F.normalize(torch.cat([one, other]), dim=1)  # (2B, D)
    similarity = views @ views.T / temperature  # (2B, 2B)
    B = len(one)
    similarity = similarity.masked_fill(torch.eye(2 * B, dtype=torch.bool, device=one.device), -torch.inf)
    partner = torch.arange(2 * B, device=one.device).roll(B)
    return F.cross_entropy(similarity, partner)


def view(features: Tensor, *, smallest: float, generator: torch.Generator) -> Tensor:
    """Means over a random rectangle of each grid, which covers at least about `smallest` of it: (B, D, h, w) to (B, D).

    Its area is drawn evenly from [smallest, 1], its sides in the grid's proportion times up to sqrt(4/3) either way, as
    a random resized crop.
    """
    B, _, h, w = features.shape
    area = smallest + (1 - smallest) * torch.rand(B, generator=generator)
    aspect = torch.exp((2 * torch.rand(B, generator=generator) - 1) * 0.5 * torch.tensor(4 / 3).log())
    inside = torch.ones(B, h, w)
    sides = ((h, area.sqrt() * aspect, (1, h, 1)), (w, area.sqrt() / aspect, (1, 1, w)))
    for length, share, shape in sides:
        cells = (length * share).round().clamp(1, length)  # (B,)
        start = ((length - cells + 1) * torch.rand(B, generator=generator)).floor()  # (B,)
        place = torch.arange(length)
        inside *= ((place >= start[:, None]) & (place < (start + cells)[:, None])).view(B, *shape[1:])
    inside = inside.to(features.device)
    return (features * inside[:, None]).sum(dim=(2, 3)) / inside.sum(dim=(1, 2))[:, None]


class MeanShiftedStage(TrainingStage):
    """Draw the views of an image together and all images to the centre."""

    name: str = "mean-shift"
    gradient_clip: float = 0.0
    final_rate: float = 1.0

    def __init__(self, head: MeanShift) -> None:
        self.head = head
        self.module: nn.Module = head.adapter
        self.epochs = head.epochs
        self.batch_images = head.batch_images
        self.learning_rate = head.learning_rate
        self.patience = head.patience

    def optimiser(self) -> torch.optim.Optimizer:
        """SGD with the authors' weight decay."""
        return torch.optim.SGD(self.module.parameters(), lr=self.learning_rate, weight_decay=5e-5)

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Contrastive loss of the mean-shifted views, and how far they turn away from the centre."""
        head = self.head
        offset = head.offset.to(features.device)
        views = [
            head.adapter(view(features, smallest=head.smallest_view, generator=generator) + offset)
            for _ in range(2)
        ]
        centre = head.centre.to(features.device)
        shifted = [phi - centre for phi in views]
        losses = {"contrast": contrast(shifted[0], shifted[1], temperature=head.temperature)}
        loss = losses["contrast"]
        if head.angular:
            losses["angular"] = -torch.stack([phi @ centre for phi in views]).mean()
            loss = loss + losses["angular"]
        return losses | {"loss": loss}
