"""Prompts of no category: what is normal, and what is not, in words that are learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.heads.base import TrainingStage
from normweave.heads.cnc.constraint import prompt_loss
from normweave.heads.cnc.synthetic import Damaged
from normweave.types import Text


class Prompts(nn.Module):
    """Normal and abnormal states behind one learnable context, the same for every category.

        t_p = TextEncoder([V_1 … V_m, words of state p]),    |t_p| = 1

    Without a text encoder the vectors t_p themselves are learnt, or left as they were drawn.

    Args:
        words: m, learnable words before each state.
        normal_states, abnormal_states: what is said of a surface, the normal ones first.
    """

    anchors: Tensor  # (P, J) what the prompts came to; J = 0 where there are none

    def __init__(self, *, words: int, normal_states: Sequence[str], abnormal_states: Sequence[str]) -> None:
        super().__init__()
        self.words = words
        self.states = [*normal_states, *abnormal_states]
        self.normal = len(normal_states)
        self.learnt = nn.Parameter(torch.zeros(1, 1))  # (m, V) context, or (P, J) vectors
        self.register_buffer("anchors", torch.zeros(len(self.states), 0))

    def start(self, text: Text | None, *, joint_dim: int, random: bool, generator: torch.Generator) -> None:
        """Draw new ones: a context as large as words are, or vectors in any direction.

        Args:
            joint_dim: J; 0 = no prompts.
            random: nothing is to be learnt.
        """
        if text is not None:
            usual = text.embed_tokens("a photo of a").std()
            start = torch.randn(self.words, text.embedding_dim, generator=generator) * usual
        else:
            start = F.normalize(torch.randn(len(self.states), joint_dim, generator=generator), dim=1)
        self.learnt = nn.Parameter(start, requires_grad=not random)
        self.anchors = torch.zeros(len(self.states), joint_dim)

    def forward(self, text: Text | None) -> Tensor:
        """The prompts in the joint space, (P, J) of length one; gradient reaches what is learnt."""
        if text is not None:
            return beside(text, self.learnt).encode_prompts(self.learnt, self.states)
        return F.normalize(self.learnt, dim=1)

    @torch.no_grad()
    def settle(self, text: Text | None) -> None:
        """Keep what they came to, so that no text encoder is needed any more."""
        if self.anchors.shape[1]:
            self.anchors = self(text).clone()


class Guidance(nn.Module):
    """M tokens that say what is normal: what the text encoder says at M learnable words beside a normal state.

    Without a text encoder they are free tokens.

    Args:
        words: M.
        state: the normal state that the words stand beside.
    """

    tokens: Tensor  # (M, U) what they came to

    def __init__(self, *, words: int, state: str) -> None:
        super().__init__()
        self.words = words
        self.state = state
        self.learnt = nn.Parameter(torch.zeros(1, 1))  # (M, V) words, or (M, U) tokens
        self.register_buffer("tokens", torch.zeros(1, 1))

    def start(self, text: Text | None, *, width: int, generator: torch.Generator) -> int:
        """Draw new ones, free tokens of this width; returns U."""
        size, usual = (
            (width, 0.5)
            if text is None
            else (text.embedding_dim, float(text.embed_tokens("a photo of a").std()))
        )
        self.learnt = nn.Parameter(torch.randn(self.words, size, generator=generator) * usual)
        return width if text is None else text.output_dim

    def forward(self, text: Text | None) -> Tensor:
        """(M, U); gradient reaches what is learnt."""
        if text is None:
            return self.learnt
        return beside(text, self.learnt).encode_context(self.learnt, self.state)

    @torch.no_grad()
    def settle(self, text: Text | None) -> None:
        """Keep what they came to, so that no text encoder is needed any more."""
        self.tokens = self(text).clone()


def beside(text: Text, learnt: Tensor) -> Text:
    """The encoder on the device of what it is to read: no stage trains it, so that none moves it."""
    if isinstance(text, nn.Module):
        text.to(learnt.device)
    return text


class PromptStage(TrainingStage):
    """Teach the prompts to tell normal patches from damaged ones; nothing else learns from this.

    Args:
        prompts: are changed.
        joint: the space in which they are looked at; goes where they go.
        text: the frozen encoder; None for prompts without text.
        similarity: (features (B, D, h, w), prompts (P, J)) to (B, L, N, P).
        damaged: draws damaged images; None = there are none.
    """

    name = "prompts"
    gradient_clip = 1.0
    final_rate = 0.01

    def __init__(
        self,
        prompts: Prompts,
        joint: nn.Module,
        *,
        text: Text | None,
        similarity: Callable[[Tensor, Tensor], Tensor],
        damaged: Damaged | None,
        temperature: float,
        epochs: int,
        batch_images: int,
        learning_rate: float,
    ) -> None:
        self.prompts = prompts
        self.module: nn.Module = nn.ModuleList([prompts, joint])
        self.text = text
        self.similarity = similarity
        self.damaged = damaged
        self.temperature = temperature
        self.epochs = epochs
        self.batch_images = batch_images
        self.learning_rate = learning_rate
        self.patience = 0  # a handful of words has little to overfit with

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam over the context, or over the vectors."""
        return torch.optim.Adam(self.prompts.parameters(), lr=self.learning_rate)

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """The prompt loss on a batch and on as many damaged images."""
        prompts = self.prompts(self.text)
        abnormal = None
        if self.damaged is not None:
            drawn = self.damaged.draw(len(features), held_out=not training, generator=generator)
            if bool(drawn.shows.any()):
                similarity = self.similarity(drawn.features.to(features.device), prompts)  # (B, L, N, P)
                abnormal = similarity.transpose(1, 2)[drawn.shows.to(features.device)]  # (places, L, P)
        loss = prompt_loss(
            self.similarity(features, prompts),
            abnormal,
            normal=self.prompts.normal,
            temperature=self.temperature,
        )
        return {"loss": loss}
