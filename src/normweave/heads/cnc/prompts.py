"""Learnable prompts of the normal and abnormal state, shared by all categories."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normweave.config import PromptsConfig
from normweave.heads.base import TrainingStage
from normweave.heads.cnc.constraint import prompt_loss
from normweave.heads.cnc.synthetic import SyntheticSampler
from normweave.types import Text


class Prompts(nn.Module):
    """Embeddings of prompts. A prompt is a learnable context, shared by all categories, and the words of a state.

        t_p = TextEncoder([V_1 … V_m, words of state p]),    |t_p| = 1

    Without a text encoder the vectors t_p themselves are learnable, or random and fixed.
    """

    embeddings: Tensor  # (P, J) for scoring, the normal states first; J = 0 without prompts

    def __init__(self, config: PromptsConfig) -> None:
        super().__init__()
        self.words = config.context_words
        self.states = [*config.normal_states, *config.abnormal_states]
        self.normal = len(config.normal_states)
        self.learnt = nn.Parameter(torch.zeros(1, 1))  # (m, V) context, or (P, J) vectors
        self.register_buffer("embeddings", torch.zeros(len(self.states), 0))

    def start(self, text: Text | None, *, joint_dim: int, random: bool, generator: torch.Generator) -> None:
        """Draw the initial context at the scale of word embeddings or, without a text encoder, random unit vectors.

        Args:
            joint_dim: J; 0 = no prompts.
            random: the vectors are not learnable.
        """
        if text is not None:
            initial = _word_scale(text) * torch.randn(self.words, text.embedding_dim, generator=generator)
        else:
            initial = F.normalize(torch.randn(len(self.states), joint_dim, generator=generator), dim=1)
        self.learnt = nn.Parameter(initial, requires_grad=not random)
        self.embeddings = torch.zeros(len(self.states), joint_dim)

    def forward(self, text: Text | None) -> Tensor:
        """Return the prompt embeddings, unit vectors (P, J) in the joint space, with gradients."""
        if text is not None:
            return _on_device(text, self.learnt).encode_prompts(self.learnt, self.states)
        return F.normalize(self.learnt, dim=1)

    @torch.no_grad()
    def store(self, text: Text | None) -> None:
        """Compute `embeddings`, so that scoring needs no text encoder."""
        if self.embeddings.shape[1]:
            self.embeddings = self(text).clone()


class Guidance(nn.Module):
    """M tokens of the normal state: the outputs of the text encoder at M learnable words, in a prompt of that state.

    Without a text encoder the tokens themselves are learnable.

    Args:
        words: M.
        state: words of the normal state.
    """

    tokens: Tensor  # (M, U) for scoring

    def __init__(self, *, words: int, state: str) -> None:
        super().__init__()
        self.words = words
        self.state = state
        self.learnt = nn.Parameter(torch.zeros(1, 1))  # (M, V) words, or (M, U) tokens
        self.register_buffer("tokens", torch.zeros(1, 1))

    def start(self, text: Text | None, *, width: int, generator: torch.Generator) -> int:
        """Draw initial words, or tokens of size `width` without a text encoder; return U."""
        size, scale = (width, 0.5) if text is None else (text.embedding_dim, float(_word_scale(text)))
        self.learnt = nn.Parameter(torch.randn(self.words, size, generator=generator) * scale)
        return width if text is None else text.output_dim

    def forward(self, text: Text | None) -> Tensor:
        """Return the tokens, (M, U), with gradients."""
        if text is None:
            return self.learnt
        return _on_device(text, self.learnt).encode_context(self.learnt, self.state)

    @torch.no_grad()
    def store(self, text: Text | None) -> None:
        """Compute `tokens`, so that scoring needs no text encoder."""
        self.tokens = self(text).clone()


def _word_scale(text: Text) -> Tensor:
    return text.embed_tokens("a photo of a").std()


def _on_device(text: Text, tensor: Tensor) -> Text:
    """Move the encoder to the device of a tensor. It is not part of a stage's module, so the trainer does not."""
    if isinstance(text, nn.Module):
        text.to(tensor.device)
    return text


class PromptStage(TrainingStage):
    """Train the prompts to separate normal patches from patches of synthetic anomalies.

    Args:
        joint: the joint space that `similarity` uses; moved to the same device.
        text: the frozen encoder; None for prompts without text.
        similarity: (features (B, D, h, w), prompts (P, J)) to (B, L, N, P).
        synthetic: None if there are no synthetic anomalies.
    """

    name = "prompts"
    gradient_clip = 1.0
    final_rate = 0.01

    def __init__(
        self,
        prompts: Prompts,
        joint: nn.Module,
        config: PromptsConfig,
        *,
        text: Text | None,
        similarity: Callable[[Tensor, Tensor], Tensor],
        synthetic: SyntheticSampler | None,
    ) -> None:
        super().__init__(nn.ModuleList([prompts, joint]), config.training)
        self.prompts = prompts
        self.config = config
        self.text = text
        self.similarity = similarity
        self.synthetic = synthetic

    def optimiser(self) -> torch.optim.Optimizer:
        """Return Adam over the context, or over the vectors."""
        return torch.optim.Adam(self.prompts.parameters(), lr=self.learning_rate)

    def loss(
        self, features: Tensor, subclasses: Tensor, *, generator: torch.Generator, training: bool
    ) -> dict[str, Tensor]:
        """Return the prompt loss of a batch and of as many synthetic anomalies."""
        prompts = self.prompts(self.text)
        abnormal = None
        if self.synthetic is not None:
            batch = self.synthetic.draw(len(features), held_out=not training, generator=generator)
            if bool(batch.anomalous.any()):
                similarity = self.similarity(batch.features.to(features.device), prompts)  # (B, L, N, P)
                abnormal = similarity.transpose(1, 2)[batch.anomalous.to(features.device)]  # (cells, L, P)
        loss = prompt_loss(
            self.similarity(features, prompts),
            abnormal,
            normal=self.prompts.normal,
            temperature=self.config.temperature,
        )
        return {"loss": loss}
