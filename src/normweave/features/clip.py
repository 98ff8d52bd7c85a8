"""CLIP models of open_clip: the patch tokens of images, and prompts in the space that images share with text.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020. Each
side reads of the weights only what it uses: the vision tower lives in the extractor, the text tower in the pair.
"""

from __future__ import annotations

import urllib.request
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError  # its name only: what torch raises when a file would execute code
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from normweave.errors import ConfigError, DataError, MissingError, unknown
from normweave.features.trunk import Trunk
from normweave.types import JointMaps, Text

try:
    import open_clip
except ImportError as error:
    raise MissingError(
        "CLIP models need the package open_clip_torch. Install it: pip install 'normweave[clip]'"
    ) from error

HOWTO = "See docs/how-to/train-with-clip-weights.md."
FIT = "models made of open_clip's own vision and text transformers fit, such as ViT-L-14-336-quickgelu or ViT-B-32"


def trunk(name: str, *, weights: str, layers: Sequence[int], height: int, width: int) -> Trunk:
    """The vision tower of `name`, cut off above the last of these layers, for images of this size in pixels.

    Position embeddings are made for one grid of patches; for another they are resized as open_clip does it (bicubic,
    antialiased), the class token's left as it is.

    Args:
        layers: blocks whose patch tokens are used, counted from 1.

    Raises:
        ConfigError: no such model, layer, size or weights, or weights that belong to another activation.
        MissingError: the weights are not on this machine and cannot be fetched.
        DataError: the weights are damaged or belong to another model.
    """
    config = _config(name)
    tower = _blank(config).visual
    indices = _indices(layers, tower=tower, name=name)
    patch: int = tower.patch_size[0]
    wrong = [
        f"prepare.{side} must be {' or '.join(map(str, _near(pixels, patch)))}, got {pixels}"
        for side, pixels in (("height", height), ("width", width))
        if pixels % patch
    ]
    if wrong:
        raise ConfigError(
            f"{name} reads multiples of its patch of {patch} pixels: {'; '.join(wrong)}. "
            f"It was trained on {tower.image_size[0]} x {tower.image_size[1]}."
        )
    tower.prune_intermediate_layers(indices, prune_norm=True)
    source = _read(name, config, weights)
    tower.load_state_dict(
        _tensors(source.state, tower.state_dict(), prefix="visual.", name=name), assign=True
    )
    _resize(tower, height, width)
    return Trunk(PatchTokens(tower), indices, source.mean, source.std)


class PatchTokens(nn.Module):
    """A vision transformer of open_clip, called as timm's models are."""

    tower: Any  # an nn.Module; Any, because open_clip's own methods are not in its type

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.patch: int = tower.patch_size[0]
        """Side of a patch in pixels."""

    def forward_intermediates(
        self,
        images: Tensor,
        *,
        indices: Sequence[int],
        stop_early: bool,
        output_fmt: str,
        intermediates_only: bool,
    ) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to the patch tokens after each of these blocks, each (B, D, h, w)."""
        seen: dict[str, list[Tensor]] = self.tower.forward_intermediates(
            images,
            indices=list(indices),
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )
        return seen["image_intermediates"]


class OpenClipPair:
    """What a CLIP model has beside its vision tower: the text tower, and the way of image tokens into the joint space.

    Args:
        layers: as the extractor's, counted from 1.

    Raises:
        ConfigError, MissingError, DataError: as `trunk`.
    """

    text: Text | None

    def __init__(self, name: str, *, weights: str, layers: Sequence[int]) -> None:
        config = _config(name)
        model = _blank(config)
        self.levels = len(_indices(layers, tower=model.visual, name=name))
        state = _read(name, config, weights).state
        ends = {key: model.visual.state_dict()[key] for key in ("ln_post.weight", "ln_post.bias", "proj")}
        gain, offset, projection = _tensors(state, ends, prefix="visual.", name=name).values()
        self.weight = gain[:, None] * projection  # (D, J)
        self.bias = offset @ projection  # (J,)
        text = ClipText(model, open_clip.get_tokenizer(name))
        text.load_state_dict(_tensors(state, text.state_dict(), prefix="", name=name), assign=True)
        self.text = text.requires_grad_(False)

    def joint_maps(self, normals: Iterable[Tensor]) -> JointMaps:
        """CLIP's own way from the class token to the joint space, here for the patch tokens of every level.

        j = ((e - mean) / sqrt(var + eps) * gain + offset) @ proj, with ln_post's gain and offset, is n(e) @ W + b with
        W = diag(gain) @ proj and b = offset @ proj. eps stays in n: it is torch's default of 1e-5 in CLIP. Nothing is
        learnt from the normal images, and none is read. CLIP was trained for the class token of the last layer: that
        the same map says something of patches, and of earlier layers, is left to what is learnt on top of it.
        """
        return JointMaps((self.weight,) * self.levels, (self.bias,) * self.levels, layer_norm=True)


class ClipText(nn.Module):
    """The text tower of a CLIP model: word embeddings in, differentiable in them, itself frozen.

    Its transformer is causal: a word is told of the words before it only.

    Args:
        model: an open_clip.CLIP whose parts are taken over.
        tokenizer: open_clip's tokenizer of that model.
    """

    mask: Tensor
    positional_embedding: Tensor
    text_projection: Any  # of some models a parameter, of others a linear layer

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.token_embedding: nn.Embedding = model.token_embedding
        self.positional_embedding = model.positional_embedding
        self.transformer: nn.Module = model.transformer
        self.ln_final: nn.Module = model.ln_final
        self.text_projection = model.text_projection
        self.length, self.word_dim = self.positional_embedding.shape
        self.token_dim = self.word_dim
        self.joint_dim: int = model.visual.output_dim
        mask = torch.full((self.length, self.length), -torch.inf).triu(1)  # (T, T), added to the attention
        self.register_buffer("mask", mask, persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def words(self, text: str) -> Tensor:
        """Embeddings of a text's tokens by CLIP's byte pairs, (n, V), without those of start and end."""
        return self._embedded(self.tokenizer.encode(text))

    def encode_prompts(self, context: Tensor, states: Sequence[str]) -> Tensor:
        """Prompts [start, context (m, V), words of a state, end] to the joint space, (len(states), J) of length one.

        For a context that is the words of a text this is CLIP's encode_text of text and state.

        Raises:
            ConfigError: a prompt is longer than the model reads.
        """
        start = self._embedded([self.tokenizer.sot_token_id])  # (1, V)
        end = self._embedded([self.tokenizer.eot_token_id])  # (1, V)
        prompts = [torch.cat([start, context, self.words(state), end]) for state in states]
        heard = self._heard(prompts)  # (P, T, V)
        ends = heard[torch.arange(len(prompts)), [len(prompt) - 1 for prompt in prompts]]  # (P, V)
        linear = isinstance(self.text_projection, nn.Linear)
        joint = self.text_projection(ends) if linear else ends @ self.text_projection  # (P, J)
        return functional.normalize(joint, dim=-1)

    def prompt_tokens(self, context: Tensor, state: str) -> Tensor:
        """What the tower says at the places of the context, (m, V) to (m, U), of [start, words of the state, context].

        The state stands first: behind the context a causal transformer would not let the context hear it.

        Raises:
            ConfigError: the prompt is longer than the model reads.
        """
        before = torch.cat([self._embedded([self.tokenizer.sot_token_id]), self.words(state)])  # (1 + n, V)
        return self._heard([torch.cat([before, context])])[0, len(before) :]  # (m, U)

    def _embedded(self, tokens: Sequence[int]) -> Tensor:
        places = torch.tensor(tokens, dtype=torch.long, device=self.mask.device)
        return self.token_embedding.weight[places]  # (n, V)

    def _heard(self, prompts: Sequence[Tensor]) -> Tensor:
        """Word embeddings, each (T_p, V), to (P, T, V) of the longest; what stands behind a prompt's end is noise."""
        rows = pad_sequence(list(prompts), batch_first=True)  # (P, T, V); nothing hears the zeros behind it
        length = rows.shape[1]
        if length > self.length:
            raise ConfigError(
                f"A prompt of {length} tokens, start and end among them, is longer than the {self.length} that the "
                "text tower reads. Take fewer learnable words or a shorter state."
            )
        rows = rows + self.positional_embedding[:length]
        heard: Tensor = self.ln_final(self.transformer(rows, attn_mask=self.mask[:length, :length]))
        return heard


class Source(NamedTuple):
    """Weights of a whole model, by open_clip's names; files are mapped, so that only what is used takes memory."""

    state: Mapping[str, Tensor]
    mean: Sequence[float]  # of the pixels that the weights were made for, R G B, white = 1
    std: Sequence[float]


def _config(name: str) -> dict[str, Any]:
    """What open_clip knows of the architecture.

    Raises:
        ConfigError: it knows no such model, or one of another build.
    """
    if name not in open_clip.list_models():  # a hub's address is not: it would fetch foreign settings
        near = get_close_matches(name, open_clip.list_models(), n=3)
        raise unknown("open_clip model", name, {*near, "ViT-L-14-336-quickgelu"}, f"Only {FIT}. {HOWTO}")
    config: dict[str, Any] = open_clip.get_model_config(name)
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    text = open_clip.CLIPTextCfg(**config["text_cfg"])
    if vision.timm_model_name or not isinstance(vision.layers, int) or vision.attentional_pool:
        raise ConfigError(
            f"The vision side of {name!r} is not open_clip's plain vision transformer, whose patch tokens share a "
            f"space with text. Only {FIT}. {HOWTO}"
        )
    if (
        set(config) - {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
        or text.hf_model_name
        or text.hf_tokenizer_name
        or text.pool_type != "argmax"
        or text.no_causal_mask
    ):
        raise ConfigError(
            f"The text side of {name!r} is not CLIP's: a causal transformer on CLIP's byte pairs. Only {FIT}. {HOWTO}"
        )
    return config


def _blank(config: Mapping[str, Any]) -> Any:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return open_clip.CLIP(**config)


def _indices(layers: Sequence[int], *, tower: Any, name: str) -> list[int]:
    """Blocks counted from 0, shallowest first.

    Raises:
        ConfigError: the tower has no such block.
    """
    depth = len(tower.transformer.resblocks)
    absent = [layer for layer in layers if not 1 <= layer <= depth]
    if absent:
        raise ConfigError(
            f"{name} has no layer {', '.join(map(str, absent))}. It has 1..{depth}: choose from these, for example "
            f"--set features.layers=[{depth}]."
        )
    return sorted({layer - 1 for layer in layers})


def _near(pixels: int, patch: int) -> list[int]:
    """The multiples of the patch below and above."""
    below = pixels // patch * patch
    return [size for size in (below, below + patch) if size]


def _resize(tower: Any, height: int, width: int) -> None:
    """Bring the position embeddings to the grid of these images, if it is another."""
    grid = (height // tower.patch_size[0], width // tower.patch_size[1])
    if grid != tower.grid_size:
        first, places = tower.positional_embedding[:1], tower.positional_embedding[1:]
        places = places.T.reshape(1, -1, *tower.grid_size)  # (1, D, h, w)
        places = functional.interpolate(places, grid, mode="bicubic", antialias=True, align_corners=False)
        tower.positional_embedding = nn.Parameter(torch.cat([first, places[0].flatten(1).T]))  # (1 + P, D)
    tower.grid_size, tower.image_size = grid, (height, width)


def _tensors(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, prefix: str, name: str
) -> dict[str, Tensor]:
    """Copies in float32 of what is wanted, by its name without the prefix. What else there is is left aside.

    Raises:
        DataError: a tensor is absent, of another shape, or not finite.
    """
    cure = f"Are these the weights of {name}? They must be open_clip's or OpenAI's state dict. {HOWTO}"
    absent = [prefix + key for key in wanted if prefix + key not in state]
    if absent:
        raise DataError(
            f"The weights lack {len(absent)} of the {len(wanted)} tensors that {name} needs, first {absent[0]!r}. "
            f"{cure}"
        )
    copies = {}
    for key, tensor in wanted.items():
        got = state[prefix + key]
        if got.shape != tensor.shape:
            raise DataError(
                f"Weight {prefix + key!r} of {name} must have shape {[*tensor.shape]}, got {[*got.shape]}. {cure}"
            )
        if not got.isfinite().all():
            raise DataError(
                f"Weight {prefix + key!r} of {name} holds NaN or infinity: the file is damaged. Fetch it again."
            )
        copies[key] = got.to(torch.float32, copy=True)  # OpenAI's are float16
    return copies


def _read(name: str, config: Mapping[str, Any], weights: str) -> Source:
    """The weights that `OpenClipConfig.weights` asks for.

    Raises:
        ConfigError: no such tag, or weights that were trained with another activation than `name` has.
        MissingError: the weights are not on this machine and cannot be fetched.
        DataError: the file is damaged or of another kind.
    """
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    if weights == "random":
        with torch.random.fork_rng(devices=[]):  # the caller's own random numbers go on as before
            torch.manual_seed(0)
            return Source(open_clip.CLIP(**config).state_dict(), mean, std)
    tags = open_clip.list_pretrained_tags_by_model(name)
    quick = config.get("quick_gelu", False)
    if weights in tags:
        origin = open_clip.get_pretrained_cfg(name, weights)
        if origin.get("quick_gelu", False) and not quick:
            raise _other_activation(name, f"The weights {weights!r}")
        return Source(_from_file(_from_hub(name, weights, origin)), origin["mean"], origin["std"])
    path = Path(weights)
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise MissingError(
                f"There is no weights file '{path}'. Check --clip-weights (features.weights). {HOWTO}"
            )
        raise unknown(
            f"weights of {name}", weights, {*tags, "random"}, f"Or give --clip-weights a file's path. {HOWTO}"
        )
    state = _from_file(path)
    # OpenAI's archives hold these numbers beside the weights; open_clip's own files do not.
    if "input_resolution" in state and not quick:
        raise _other_activation(name, f"'{path}' holds OpenAI's weights, which")
    return Source(state, mean, std)


def _other_activation(name: str, weights: str) -> ConfigError:
    """The two activations differ so little that nothing else would give the mistake away."""
    return ConfigError(
        f"{weights} were trained with QuickGELU, but {name} has GELU: every feature would be a little wrong. "
        f"Set features.model={name}-quickgelu."
    )


def _from_file(path: Path) -> dict[str, Tensor]:
    """Map safetensors, or a state dict saved by torch; nothing in it is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
    except zipfile.BadZipFile:
        try:
            tensors: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"'{path}' is neither safetensors ({error}) nor a state dict that torch.save wrote. Fetch or convert "
                f"it again. {HOWTO}"
            ) from error
        return tensors
    if any(entry.endswith("/constants.pkl") for entry in entries):
        raise DataError(
            f"'{path}' is a TorchScript archive, as OpenAI publishes CLIP: it holds code, and normweave executes none. "
            'Convert it where you trust it: python -c "import torch; from safetensors.torch import save_file; '
            f"save_file({{name: tensor.contiguous() for name, tensor in torch.jit.load('{path.name}', "
            f"map_location='cpu').state_dict().items()}}, '{path.stem}.safetensors')\""
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError) as error:  # torch's own words advise to let it execute code
        raise DataError(
            f"'{path}' is damaged, or holds objects that would have to execute code to be read. Save the model's "
            f"state_dict() alone, best as safetensors. {HOWTO}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise DataError(
            f"'{path}' holds more than a state dict. Of a training's checkpoint, save the entry 'state_dict' alone, "
            f"best as safetensors. {HOWTO}"
        )
    return state


def _from_hub(name: str, tag: str, origin: Mapping[str, Any]) -> Path:
    """The file of a tag: from the hub's cache on this machine, else downloaded."""
    from huggingface_hub import constants, try_to_load_from_cache

    repository = origin["hf_hub"].rstrip("/")
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    for file in files:
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return Path(found)
    try:
        # The hub's client tries again for half a minute; a machine without network is told sooner.
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
        return Path(open_clip.download_pretrained(origin))
    except OSError as error:
        raise MissingError(
            f"The weights {tag!r} of {name} are not on this machine and cannot be downloaded "
            f"({type(error).__name__}: {str(error)[:200]}). Copy {files[0]} (or {files[1]}) here from a machine that "
            f"has it (hub: {repository}) and name it with --clip-weights PATH. {HOWTO}"
        ) from error
