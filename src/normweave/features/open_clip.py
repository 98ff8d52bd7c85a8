"""CLIP models of open_clip: the patch tokens of images, and prompts in the joint space of images and text.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020. The
vision tower is in the extractor, the text tower in the pair. Each reads only its own part of the weights.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError  # torch raises it for a file that would execute code
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from normweave.config import OpenClipConfig
from normweave.errors import ConfigError, DataError, MissingError, unknown
from normweave.features import weights as weight_files
from normweave.features.frozen import Backbone, check_patches
from normweave.types import JointMaps, Pair, Text

try:
    import open_clip
except ImportError as error:
    raise MissingError(
        "CLIP models need the package open_clip_torch. Install it: pip install 'normweave[clip]'"
    ) from error

HOWTO = "See docs/how-to/train-with-clip-weights.md."
SUPPORTED = "Supported are models of open_clip's own transformers, such as ViT-L-14-336-quickgelu or ViT-B-32."


def load(config: OpenClipConfig, *, height: int, width: int) -> Backbone:
    """Return the vision tower up to the last of `config.layers`, for images of this size in pixels.

    Position embeddings belong to one grid of patches. For another grid they are resized as open_clip does it (bicubic,
    antialiased), except that of the class token.

    Raises:
        ConfigError: the model, a layer or the weights do not exist, the size is not a multiple of the patch, or the
            weights belong to another activation.
        MissingError: the weights are not on this machine and cannot be downloaded.
        DataError: the weights are damaged or belong to another model.
    """
    name = config.model
    settings = _model_settings(name)
    tower = _without_weights(settings).visual
    indices = _indices(config.layers, tower=tower, name=name)
    patch: int = tower.patch_size[0]
    check_patches(name, patch=patch, height=height, width=width, trained=tower.image_size)
    tower.prune_intermediate_layers(indices, prune_norm=True)
    weights = _read(name, settings, config.weights)
    tower.load_state_dict(_tensors(weights.state, tower.state_dict(), prefix="visual.", name=name), assign=True)
    _resize(tower, height, width)
    return Backbone(
        model=PatchTokens(tower),
        name=name,
        indices=indices,
        mean=weights.mean,
        std=weights.std,
        grid_stride=patch,
        neighbourhood=1,
    )


def pair(config: OpenClipConfig) -> Pair:
    """Return the text tower and the projection of patch tokens into the joint space."""
    return OpenClipPair(config)


class PatchTokens(nn.Module):
    """A vision transformer of open_clip with the interface of timm's models."""

    tower: Any  # an nn.Module; Any, because open_clip's own methods are not in its type

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward_intermediates(
        self,
        images: Tensor,
        *,
        indices: Sequence[int],
        stop_early: bool,
        output_fmt: str,
        intermediates_only: bool,
    ) -> list[Tensor]:
        """Return the patch tokens (B, D, h, w) after each of these blocks, of normalized images (B, 3, H, W)."""
        tokens: dict[str, list[Tensor]] = self.tower.forward_intermediates(
            images,
            indices=list(indices),
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )
        return tokens["image_intermediates"]


class OpenClipPair:
    """The text tower of a CLIP model, and the projection of patch tokens into the joint space.

    Raises what `load` raises.
    """

    text: Text | None

    def __init__(self, config: OpenClipConfig) -> None:
        name = config.model
        settings = _model_settings(name)
        model = _without_weights(settings)
        self.levels = len(_indices(config.layers, tower=model.visual, name=name))
        state = _read(name, settings, config.weights).state
        ends = {key: model.visual.state_dict()[key] for key in ("ln_post.weight", "ln_post.bias", "proj")}
        gain, offset, projection = _tensors(state, ends, prefix="visual.", name=name).values()
        self.weight = gain[:, None] * projection  # (D, J)
        self.bias = offset @ projection  # (J,)
        text = ClipText(model, open_clip.get_tokenizer(name))
        text.load_state_dict(_tensors(state, text.state_dict(), prefix="", name=name), assign=True)
        self.text = text.requires_grad_(False)

    def joint_maps(self, normals: Iterable[Tensor]) -> JointMaps:
        """Return CLIP's projection of the class token, here applied to the patch tokens of every level.

        j = ((e - mean) / sqrt(var + eps) * gain + offset) @ proj, with ln_post's gain and offset, is n(e) @ W + b with
        W = diag(gain) @ proj and b = offset @ proj. eps is part of n and torch's default of 1e-5. The normal images are
        not read. CLIP was trained with the class token of the last layer: the head learns how to use the projections of
        patch tokens and of earlier layers.
        """
        return JointMaps((self.weight,) * self.levels, (self.bias,) * self.levels, layer_norm=True)


class ClipText(nn.Module):
    """The frozen text tower of a CLIP model, differentiable in its input embeddings.

    Its transformer is causal: a token attends only to the tokens before it.

    Args:
        model: an open_clip.CLIP whose modules are used.
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
        self.length, self.embedding_dim = self.positional_embedding.shape
        self.output_dim = self.embedding_dim
        self.joint_dim: int = model.visual.output_dim
        mask = torch.full((self.length, self.length), -torch.inf).triu(1)  # (T, T), added to the attention
        self.register_buffer("mask", mask, persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def embed_tokens(self, text: str) -> Tensor:
        """Return the embeddings (n, V) of the byte-pair tokens of a text, without start and end."""
        return self._embeddings(self.tokenizer.encode(text))

    def encode_prompts(self, context: Tensor, states: Sequence[str]) -> Tensor:
        """Return unit vectors (len(states), J) in the joint space, of prompts [start, context (m, V), state, end].

        If the context is the embedding of a text, this is CLIP's encode_text of text and state.

        Raises:
            ConfigError: a prompt is longer than the context length of the model.
        """
        start = self._embeddings([self.tokenizer.sot_token_id])  # (1, V)
        end = self._embeddings([self.tokenizer.eot_token_id])  # (1, V)
        prompts = [torch.cat([start, context, self.embed_tokens(state), end]) for state in states]
        outputs = self._transform(prompts)  # (P, T, V)
        ends = outputs[torch.arange(len(prompts)), [len(prompt) - 1 for prompt in prompts]]  # (P, V)
        linear = isinstance(self.text_projection, nn.Linear)
        joint = self.text_projection(ends) if linear else ends @ self.text_projection  # (P, J)
        return functional.normalize(joint, dim=-1)

    def encode_context(self, context: Tensor, state: str) -> Tensor:
        """Return the outputs (m, U) at the positions of the context (m, V), in the prompt [start, state, context].

        The state comes first because the transformer is causal.

        Raises:
            ConfigError: the prompt is longer than the context length of the model.
        """
        start = self._embeddings([self.tokenizer.sot_token_id])  # (1, V)
        before = torch.cat([start, self.embed_tokens(state)])  # (1 + n, V)
        return self._transform([torch.cat([before, context])])[0, len(before) :]  # (m, U)

    def _embeddings(self, tokens: Sequence[int]) -> Tensor:
        indices = torch.tensor(tokens, dtype=torch.long, device=self.mask.device)
        return self.token_embedding.weight[indices]  # (n, V)

    def _transform(self, prompts: Sequence[Tensor]) -> Tensor:
        """Return the outputs (P, T, V) of prompts (T_p, V), padded to the longest. Outputs of padding are undefined."""
        rows = pad_sequence(list(prompts), batch_first=True)  # (P, T, V); no token attends to the padding after it
        length = rows.shape[1]
        if length > self.length:
            raise ConfigError(
                f"A prompt of {length} tokens, start and end included, is longer than the {self.length} that the text "
                "tower reads. Use fewer learnable tokens or a shorter state."
            )
        rows = rows + self.positional_embedding[:length]
        outputs: Tensor = self.ln_final(self.transformer(rows, attn_mask=self.mask[:length, :length]))
        return outputs


class Weights(NamedTuple):
    """The weights of a complete model, by open_clip's names. Files are memory-mapped: unused tensors take no memory."""

    state: Mapping[str, Tensor]
    mean: Sequence[float]  # pixel mean that the weights expect, R G B, white = 1
    std: Sequence[float]


def _model_settings(name: str) -> dict[str, Any]:
    """Return open_clip's settings of a model.

    Raises:
        ConfigError: the model does not exist, or is not made of open_clip's own transformers.
    """
    if name not in open_clip.list_models():  # refuses a hub address, which would download settings
        near = get_close_matches(name, open_clip.list_models(), n=3)
        raise unknown("open_clip model", name, {*near, "ViT-L-14-336-quickgelu"}, f"{SUPPORTED} {HOWTO}")
    settings: dict[str, Any] = open_clip.get_model_config(name)
    vision = open_clip.CLIPVisionCfg(**settings["vision_cfg"])
    text = open_clip.CLIPTextCfg(**settings["text_cfg"])
    if vision.timm_model_name or not isinstance(vision.layers, int) or vision.attentional_pool:
        raise ConfigError(
            f"The vision tower of {name!r} is not open_clip's plain vision transformer, whose patch tokens share a "
            f"space with text. {SUPPORTED} {HOWTO}"
        )
    if (
        set(settings) - {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
        or text.hf_model_name
        or text.hf_tokenizer_name
        or text.pool_type != "argmax"
        or text.no_causal_mask
    ):
        raise ConfigError(
            f"The text tower of {name!r} is not CLIP's causal transformer on byte pairs. {SUPPORTED} {HOWTO}"
        )
    return settings


def _without_weights(settings: Mapping[str, Any]) -> Any:
    """Return the model without memory for its weights."""
    with torch.device("meta"):
        return open_clip.CLIP(**settings)


def _indices(layers: Sequence[int], *, tower: Any, name: str) -> list[int]:
    """Return the indices of blocks, counted from 0, shallowest first.

    Raises:
        ConfigError: the tower does not have one of the blocks.
    """
    depth = len(tower.transformer.resblocks)
    absent = [layer for layer in layers if not 1 <= layer <= depth]
    if absent:
        raise ConfigError(
            f"{name} has no layer {', '.join(map(str, absent))}. It has 1..{depth}: choose from these, for example "
            f"--set features.layers=[{depth}]."
        )
    return sorted({layer - 1 for layer in layers})


def _resize(tower: Any, height: int, width: int) -> None:
    """Resize the position embeddings to the grid of images of this size."""
    grid = (height // tower.patch_size[0], width // tower.patch_size[1])
    if grid != tower.grid_size:
        class_token, patches = tower.positional_embedding[:1], tower.positional_embedding[1:]
        patches = patches.T.reshape(1, -1, *tower.grid_size)  # (1, D, h, w)
        patches = functional.interpolate(patches, grid, mode="bicubic", antialias=True, align_corners=False)
        tower.positional_embedding = nn.Parameter(torch.cat([class_token, patches[0].flatten(1).T]))  # (1 + P, D)
    tower.grid_size, tower.image_size = grid, (height, width)


def _tensors(state: Mapping[str, Tensor], used: Mapping[str, Tensor], *, prefix: str, name: str) -> dict[str, Tensor]:
    """Return float32 copies of the tensors in use, by their name without the prefix."""
    cure = f"Give open_clip's or OpenAI's state dict of {name}. {HOWTO}"
    weight_files.check_state(state, used, name=name, cure=cure, prefix=prefix)
    return {key: state[prefix + key].to(torch.float32, copy=True) for key in used}  # OpenAI's are float16


def _read(name: str, settings: Mapping[str, Any], weights: str) -> Weights:
    """Return the weights that `OpenClipConfig.weights` names.

    Raises:
        ConfigError: the tag does not exist, or the weights were trained with another activation than `name` has.
        MissingError: the weights are not on this machine and cannot be downloaded.
        DataError: the file is damaged or has another format.
    """
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    if weights == "random":
        with torch.random.fork_rng(devices=[]):  # leaves the caller's random state unchanged
            torch.manual_seed(0)
            return Weights(open_clip.CLIP(**settings).state_dict(), mean, std)
    tags = open_clip.list_pretrained_tags_by_model(name)
    quick = settings.get("quick_gelu", False)
    if weights in tags:
        origin = open_clip.get_pretrained_cfg(name, weights)
        if origin.get("quick_gelu", False) and not quick:
            raise _other_activation(name, f"The weights {weights!r}")
        return Weights(_from_file(_from_hub(name, weights, origin)), origin["mean"], origin["std"])
    path = Path(weights)
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise MissingError(
                f"The weights file '{path}' does not exist. Check --clip-weights (features.weights). {HOWTO}"
            )
        raise unknown(f"weights of {name}", weights, {*tags, "random"}, f"A path of a file is also allowed. {HOWTO}")
    state = _from_file(path)
    # Only OpenAI's archives contain this entry beside the weights.
    if "input_resolution" in state and not quick:
        raise _other_activation(name, f"OpenAI's weights in '{path}'")
    return Weights(state, mean, std)


def _other_activation(name: str, weights: str) -> ConfigError:
    # The activations differ so little that no other check would find the mistake.
    return ConfigError(
        f"{weights} were trained with QuickGELU, but {name} has GELU: every feature would be slightly wrong. "
        f"Set features.model={name}-quickgelu."
    )


def _from_file(path: Path) -> dict[str, Tensor]:
    """Return the memory-mapped tensors of a safetensors file or of a state dict saved by torch. Executes no code."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
    except zipfile.BadZipFile:
        try:
            tensors: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"'{path}' is neither safetensors ({error}) nor a state dict that torch.save wrote. Download or "
                f"convert it again. {HOWTO}"
            ) from error
        return tensors
    if any(entry.endswith("/constants.pkl") for entry in entries):
        raise DataError(
            f"'{path}' is a TorchScript archive, as OpenAI publishes CLIP: it contains code, which normweave does not "
            'execute. Convert it, if you trust it: python -c "import torch; from safetensors.torch import save_file; '
            f"save_file({{name: tensor.contiguous() for name, tensor in torch.jit.load('{path.name}', "
            f"map_location='cpu').state_dict().items()}}, '{path.stem}.safetensors')\""
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError) as error:  # torch's message advises to allow execution
        raise DataError(
            f"'{path}' is damaged, or contains objects that can only be read by executing code. Save only the model's "
            f"state_dict(), as safetensors if possible. {HOWTO}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise DataError(
            f"'{path}' contains more than a state dict. Of a training checkpoint, save only the entry 'state_dict', as "
            f"safetensors if possible. {HOWTO}"
        )
    return state


def _from_hub(name: str, tag: str, origin: Mapping[str, Any]) -> Path:
    """Return the file of a tag, from the hub's cache on this machine or downloaded."""
    from huggingface_hub import constants, try_to_load_from_cache

    repository = origin["hf_hub"].rstrip("/")
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    for file in files:
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return Path(found)
    try:
        weight_files.check_connection(constants.ENDPOINT)
        return Path(open_clip.download_pretrained(origin))
    except OSError as error:
        raise MissingError(
            f"The weights {tag!r} of {name} are not on this machine and cannot be downloaded "
            f"({type(error).__name__}: {str(error)[:200]}). Copy {files[0]} (or {files[1]}) here from a machine that "
            f"has it (hub: {repository}) and name it with --clip-weights PATH. {HOWTO}"
        ) from error
