"""A vision-language pair that is small enough to do by hand."""

import torch
from torch import nn
from torch.nn import functional

from normweave.types import JointMaps

WORD, TOKEN, JOINT = 8, 10, 6


class TinyText(nn.Module):
    """One frozen transformer layer over words whose embeddings come from their letters."""

    word_dim, token_dim, joint_dim = WORD, TOKEN, JOINT

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            # Without dropout train mode changes nothing, and eval mode would take another way with other rounding.
            self.layer = nn.TransformerEncoderLayer(WORD, 2, 16, dropout=0.0, batch_first=True)
            self.widen = nn.Linear(WORD, TOKEN)
            self.project = nn.Linear(TOKEN, JOINT)
        self.requires_grad_(False)

    def words(self, text):
        seeds = [sum(ord(letter) * 31**place for place, letter in enumerate(word)) for word in text.split()]
        return torch.stack(
            [torch.randn(WORD, generator=torch.Generator().manual_seed(seed % 2**31)) for seed in seeds]
        )

    def _read(self, context, state):
        return self.widen(self.layer(torch.cat([context, self.words(state)])[None])[0])

    def encode_prompts(self, context, states):
        said = torch.stack([self.project(self._read(context, state)).mean(0) for state in states])
        return functional.normalize(said, dim=1)

    def prompt_tokens(self, context, state):
        return self._read(context, state)[: len(context)]


class TinyPair:
    """Random ways to the joint space; remembers the features that it was shown."""

    def __init__(self, dims, *, text=True, layer_norm=False):
        self.dims = dims
        self.text = TinyText() if text else None
        self.layer_norm = layer_norm
        self.shown = None

    def joint_maps(self, normals):
        self.shown = torch.cat(list(normals))
        generator = torch.Generator().manual_seed(6)
        return JointMaps(
            weights=tuple(torch.randn(D, JOINT, generator=generator) for D in self.dims),
            biases=tuple(0.1 * torch.randn(JOINT, generator=generator) for _ in self.dims),
            layer_norm=self.layer_norm,
        )
