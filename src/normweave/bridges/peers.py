"""Peers: the models of anomalib for comparison in a benchmark, their settings and differences from the papers.

The `model` of a plan is then `anomalib/NAME`, and `bridges/peer_network.py` trains it. This file needs neither anomalib
nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import yaml

from normweave import settings
from normweave.config import Config, MapsConfig, TimmConfig
from normweave.errors import ConfigError, unknown
from normweave.validation import DISCRIMINATOR

PREFIX = "anomalib/"
SECTIONS = ("data", "prepare", "features", "outcome", "seed")
"""Sections of `Config` that apply to a peer; of `features` only the backbone, its weights and `batch_images`."""


class PeerModel(NamedTuple):
    """One model of anomalib."""

    paper: str
    settings: Mapping[str, Any]
    """Settings with their defaults. `epochs` are the paper's, for a GPU; `max_steps` ends the training earlier (0 =
    never)."""
    differs: str
    """How it differs from the published method; {backbone} is filled in."""


PEERS: dict[str, PeerModel] = {
    "patchcore": PeerModel(
        "Roth et al. 2022, arXiv 2106.08265",
        {"strides": (8, 16), "coreset_sampling_ratio": 0.1, "num_neighbors": 9, "batch_images": 8},
        "{backbone} for wide_resnet50_2",
    ),
    "padim": PeerModel(
        "Defard et al. 2020, arXiv 2011.08785",
        {"strides": (4, 8, 16), "n_features": 100, "batch_images": 8},
        "{backbone} for resnet18",
    ),
    "dfm": PeerModel(
        "Ahuja et al. 2019, arXiv 1909.11786",
        {"strides": (16,), "pooling_kernel_size": 4, "pca_level": 0.97, "batch_images": 8},
        "{backbone} for resnet50",
    ),
    "stfpm": PeerModel(
        "Wang et al. 2021, arXiv 2103.04257",
        {"strides": (4, 8, 16), "epochs": 100, "max_steps": 0, "batch_images": 8},
        "{backbone} for resnet18",
    ),
    "reverse_distillation": PeerModel(
        "Deng and Li 2022, arXiv 2201.10703",
        {"epochs": 200, "max_steps": 0, "batch_images": 8},
        "{backbone} for wide_resnet50_2 as the teacher; where anomalib has no decoder for it, the bottleneck and "
        "decoder of resnet18, on the features' positive and negative parts",
    ),
    "fastflow": PeerModel(
        "Yu et al. 2021, arXiv 2111.07677",
        {"strides": (4, 8, 16), "flow_steps": 8, "hidden_ratio": 1.0, "epochs": 500, "max_steps": 0, "batch_images": 8},
        "{backbone} for resnet18",
    ),
    "supersimplenet": PeerModel(
        "Rolih et al. 2024, arXiv 2408.03143",
        {"strides": (8, 16), "perlin_threshold": 0.2, "epochs": 300, "max_steps": 0, "batch_images": 8},
        "{backbone} for wide_resnet50_2",
    ),
    "draem": PeerModel(
        "Zavrtanik et al. 2021, arXiv 2108.07610",
        {"anomaly_source": "", "epochs": 700, "max_steps": 0, "batch_images": 8},
        "synthetic textiles for the texture images of DTD, unless anomaly_source names a folder of images",
    ),
    "efficient_ad": PeerModel(
        "Batzner et al. 2024, arXiv 2303.14535",
        {
            "model_size": "small",
            "teacher": "",
            "teacher_steps": 500,
            "penalty_images": "",
            "epochs": 1000,
            "max_steps": 70_000,
        },
        "unless teacher names a .safetensors file of the published one: a teacher distilled from {backbone} on fit "
        "normals and synthetic textiles; synthetic textiles for ImageNet in the penalty, unless penalty_images names a "
        "folder of folders of images",
    ),
    "dinomaly": PeerModel(
        "Guo et al. 2025, arXiv 2405.14573",
        {
            "encoder": "vit_base_patch14_reg4_dinov2",
            "weights": "",
            "epochs": 1000,
            "max_steps": 5000,
            "batch_images": 16,
        },
        "the size of our preparation for a crop of 392 out of 448 pixels",
    ),
}

RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "strides": (lambda value: len(value) > 0 and all(type(one) is int for one in value), "name stages, as [8, 16]"),
    "coreset_sampling_ratio": (lambda value: 0 < value <= 1, "be in (0, 1]"),
    "pca_level": (lambda value: 0 < value < 1, "be in (0, 1)"),
    "hidden_ratio": (lambda value: value > 0, "be positive"),
    "perlin_threshold": (lambda value: 0 < value < 1, "be in (0, 1)"),
    "max_steps": (lambda value: value >= 0, "be 0 or more"),
    "model_size": (lambda value: value in ("small", "medium"), "be small or medium"),
}
"""Further checks of a value besides the type of its default; an integer without a rule must be 1 or more."""


@dataclass(frozen=True, kw_only=True)
class PeerPlan:
    """A peer with all its settings: `values` holds its own, `config` those it shares with our models."""

    name: str
    values: Mapping[str, Any]
    config: Config

    @property
    def differs(self) -> str:
        """How it differs from the published method, with the name of the backbone."""
        assert isinstance(self.config.features, TimmConfig)
        return PEERS[self.name].differs.format(backbone=self.config.features.backbone)


def is_peer(model: str) -> bool:
    """Return whether the `model` of a plan is one of anomalib's."""
    return model.startswith(PREFIX)


def read(model: str, assignments: Sequence[str], *, seed: int) -> PeerPlan:
    """Read a peer of a plan: `epochs=5` is a setting of the peer, `prepare.height=128` is a setting of `Config`.

    Raises:
        ConfigError: no such peer, no such setting, or a value out of range; all mistakes in one message.
    """
    name = model.removeprefix(PREFIX)
    if name not in PEERS:
        raise unknown(
            "peer", model, [PREFIX + known for known in PEERS], "All are listed in normweave/bridges/peers.py."
        )
    allowed = PEERS[name].settings
    shared, own, mistakes = [], dict(allowed), []
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals:
            mistakes.append(f"{assignment!r} must be of the form key=value, for example epochs=5")
        elif key.split(".")[0] in SECTIONS:
            shared.append(assignment)
        elif key not in allowed:
            mistakes.append(
                str(
                    unknown(
                        f"setting of {model}",
                        key,
                        [*allowed, *(f"{section}.…" for section in SECTIONS[:-1])],
                        "All are listed in normweave/bridges/peers.py.",
                    )
                )
            )
        else:
            try:
                own[key] = _value(key, text, allowed[key])
            except ConfigError as error:
                mistakes.append(str(error))
    if mistakes:
        raise ConfigError(f"{model}: " + "; ".join(mistakes))
    config = settings.override(replace(Config(), seed=seed), shared)
    if not isinstance(config.features, TimmConfig):
        raise ConfigError(f"{model}: the features must be timm, got {getattr(config.features, DISCRIMINATOR)}.")
    if config.features.blocks:
        raise ConfigError(f"{model}: features.blocks has no effect, its stages are named by strides. Leave it out.")
    # A peer's maps are not smoothed again.
    return PeerPlan(name=name, values=own, config=replace(config, maps=MapsConfig(smoothing=0)))


def _value(key: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        value: Any = text
    else:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key} is not YAML: {' '.join(str(error).split())}") from error
    value = tuple(value) if isinstance(value, list) else value
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ConfigError(f"{key} must be like {_shown(default)}, got {text!r:.60}")
    holds, must = RULES.get(key, (lambda one: type(one) is not int or one >= 1, "be 1 or more"))
    if not holds(value):
        raise ConfigError(f"{key} must {must}, got {_shown(value)}")
    return value


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
