"""Build anomalib's models for our benchmark with our backbone and input size, without downloads or rescaling.

Visualiser, evaluator and post-processor are off, so that maps and scores are raw: anomalib's normalisation clips maps
to 0..1, and its default validation set is the test set.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from normweave.bridges import backbones
from normweave.bridges.backbones import RegisteredBackbone
from normweave.bridges.peers import PeerPlan
from normweave.config import TimmConfig
from normweave.errors import ConfigError, MissingError
from normweave.features import build as build_features
from normweave.logs import quiet
from normweave.textiles import SEEN, UNSEEN, make_textures

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # anomalib imports what timm and itself call deprecated
    from anomalib.models import (
        AnomalibModule,
        Dfm,
        Dinomaly,
        Draem,
        EfficientAd,
        Fastflow,
        Padim,
        Patchcore,
        ReverseDistillation,
        Stfpm,
        Supersimplenet,
    )
    from anomalib.models.components import TimmFeatureExtractor
    from anomalib.models.image.fastflow.torch_model import create_fast_flow_block
    from anomalib.pre_processing import PreProcessor

DECODED = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
"""Backbones that anomalib has a decoder for."""
STAND_IN = "resnet18"
STAND_IN_CHANNELS = (64, 128, 256)
"""Channels of resnet18 at strides 4, 8 and 16, which its decoder reconstructs."""
RAW: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
DINOV2 = "https://huggingface.co/timm/{encoder}.lvd142m/resolve/main/model.safetensors"
MIN_EFFICIENT_AD = 256
"""Smallest side in pixels for EfficientAD: its autoencoder halves the side five times, then uses 8 x 8 kernels."""
MIN_PERLIN = 32
"""Cells of the coarsest noise that anomalib draws; it does not fit a smaller grid."""
TEXTILE_IMAGES = 4
"""Synthetic images of each textile, if textures are needed and none are given."""
DISTILLATION_RATE = 1e-3
"""Learning rate of Adam while a teacher is distilled, with the paper's weight decay."""


@contextlib.contextmanager
def quiet_anomalib() -> Iterator[None]:
    """Suppress the progress bars, warnings and messages of anomalib and Lightning."""
    with quiet("anomalib", "lightning.pytorch", "lightning.fabric"), contextlib.redirect_stderr(io.StringIO()):
        yield


def build(plan: PeerPlan, *, work: Path) -> AnomalibModule:
    """Return an untrained model of anomalib.

    Args:
        work: an empty folder for generated textures, which are needed until the end of the training.

    Raises:
        MissingError: weights that the model needs are not available.
        ConfigError: the model cannot use a setting.
    """
    config = plan.config
    size = (config.prepare.height, config.prepare.width)
    assert isinstance(config.features, TimmConfig)
    makers: dict[str, Callable[[], AnomalibModule]] = {
        "draem": lambda: _draem(plan, size, work),
        "efficient_ad": lambda: _efficient_ad(plan, size, work),
        "dinomaly": lambda: _dinomaly(plan, size),
    }
    if plan.name in makers:
        return makers[plan.name]()
    backbone = backbones.register(config.features, strides=plan.values.get("strides", (4, 8, 16)))
    own = {
        key: value
        for key, value in plan.values.items()
        if key not in ("strides", "epochs", "max_steps", "batch_images")
    }
    common = RAW | {"pre_processor": pre_processor(size, backbone.mean, backbone.std)}
    named = common | {"backbone": backbone.name}
    match plan.name:
        case "patchcore":
            return Patchcore(layers=backbone.layers, **own, **named)
        case "padim":
            if own["n_features"] > sum(backbone.channels):
                raise ConfigError(
                    f"anomalib/padim: n_features must be at most {sum(backbone.channels)}, the channels of strides "
                    f"{list(plan.values['strides'])} of {config.features.backbone}, got {own['n_features']}."
                )
            return Padim(layers=backbone.layers, **own, **named)
        case "dfm":
            if len(backbone.layers) != 1:
                raise ConfigError(f"anomalib/dfm: strides must name one stage, got {list(plan.values['strides'])}.")
            return Dfm(layer=backbone.layers[0], **own, **named)
        case "stfpm":
            return Stfpm(layers=backbone.layers, **named)
        case "supersimplenet":
            finest = min(plan.values["strides"])
            if 2 * min(size) // finest < MIN_PERLIN:
                least = MIN_PERLIN * finest // 2
                raise ConfigError(
                    f"anomalib/supersimplenet with strides {list(plan.values['strides'])} needs {least} x {least} "
                    f"pixels or more, got {size[0]} x {size[1]}. Set prepare.height={least} and prepare.width={least}."
                )
            return Supersimplenet(layers=backbone.layers, **own, **named)
        case "fastflow":
            return _fastflow(backbone, size, own, common)
        case "reverse_distillation":
            return _reverse_distillation(config.features.backbone.partition(".")[0], backbone, common)
    raise AssertionError(plan.name)


def pre_processor(
    size: tuple[int, int], mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> PreProcessor:
    """Return a preprocessor that resizes, from which anomalib reads its input size, and normalises."""
    steps: list[v2.Transform] = [v2.Resize(size, antialias=True)]
    if mean is not None and std is not None:
        steps.append(v2.Normalize(mean=list(mean), std=list(std)))
    return PreProcessor(transform=v2.Compose(steps))


def _fastflow(
    backbone: RegisteredBackbone, size: tuple[int, int], own: dict[str, Any], common: dict[str, Any]
) -> AnomalibModule:
    """Build FastFlow on our backbone; anomalib supports only four by name, so it is built on resnet18 first."""
    model = Fastflow(backbone=STAND_IN, pre_trained=False, **own, **common)
    inner: Any = model.model
    inner.feature_extractor = timm.create_model(
        backbone.name, pretrained=True, features_only=True, out_indices=backbone.indices
    ).requires_grad_(False)
    with torch.no_grad():
        grids = [grid.shape[1:] for grid in inner.feature_extractor.eval()(torch.zeros(1, 3, *size))]
    inner.norms = nn.ModuleList(nn.LayerNorm(list(grid)) for grid in grids)
    inner.fast_flow_blocks = nn.ModuleList(
        create_fast_flow_block(
            input_dimensions=list(grid),
            conv3x3_only=False,
            hidden_ratio=own["hidden_ratio"],
            flow_steps=own["flow_steps"],
        )
        for grid in grids
    )
    return model


class SplitTeacher(nn.Module):
    """Teacher features in the form that the decoder of another backbone reconstructs: not negative, more channels.

    x' = [max(x, 0); max(−x, 0); 0 …] keeps all information and the norm.
    """

    def __init__(self, teacher: nn.Module, *, channels: Sequence[int], decoder_channels: Sequence[int]) -> None:
        super().__init__()
        if any(2 * have > want for have, want in zip(channels, decoder_channels, strict=True)):
            raise ConfigError(
                f"anomalib/reverse_distillation: a backbone without a decoder of its own may have at most "
                f"{[want // 2 for want in decoder_channels]} channels at strides 4, 8 and 16, got {list(channels)}. "
                f"Choose one of anomalib's: features.backbone={DECODED[0]}."
            )
        self.teacher = teacher
        self.decoder_channels = tuple(decoder_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features (B, D', h, w) of (B, 3, H, W) images by layer."""
        split = {}
        for (layer, grid), want in zip(self.teacher(images).items(), self.decoder_channels, strict=True):
            both = torch.cat([grid.relu(), (-grid).relu()], dim=1)  # (B, 2D, h, w)
            split[layer] = functional.pad(both, (0, 0, 0, 0, 0, want - both.shape[1]))
        return split


def _reverse_distillation(architecture: str, backbone: RegisteredBackbone, common: dict[str, Any]) -> AnomalibModule:
    teacher: nn.Module = TimmFeatureExtractor(backbone=backbone.name, layers=backbone.layers)
    known = architecture in DECODED
    if not known:
        teacher = SplitTeacher(teacher, channels=backbone.channels, decoder_channels=STAND_IN_CHANNELS)
    model = ReverseDistillation(backbone=architecture if known else STAND_IN, pre_trained=False, **common)
    model.model.encoder = teacher.requires_grad_(False)
    return model


# ── instead of downloads ──────────────────────────────────────────────────────────────────────────────────────────────


def textures(work: Path, size: tuple[int, int]) -> Path:
    """Make images of synthetic textiles, one folder each, and return their folder."""
    make_textures(
        work / "textures",
        seed=1,  # other textiles than those of a plan, whose seed is 0
        size=size,
        train_images=TEXTILE_IMAGES,
        test_images=0,
        defect_images=0,
        seen=SEEN + UNSEEN,
        unseen=(),
    )
    return work / "textures" / "cloth"


def _existing(folder: str, *, setting: str) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise MissingError(f"There is no folder {folder!r}. Correct {setting}, or leave it empty.")
    return path


def _draem(plan: PeerPlan, size: tuple[int, int], work: Path) -> AnomalibModule:
    given = plan.values["anomaly_source"]
    source = _existing(given, setting="anomaly_source") if given else textures(work, size)
    return Draem(dtd_dir=source, pre_processor=pre_processor(size), **RAW)


def _dinomaly(plan: PeerPlan, size: tuple[int, int]) -> AnomalibModule:
    encoder, weights = plan.values["encoder"], plan.values["weights"]
    if not weights:
        raise MissingError(
            f"anomalib/dinomaly needs the weights of {encoder}, which no package contains. Copy the file from "
            f"{DINOV2.format(encoder=encoder)} here and name it in the plan's set: weights=PATH.safetensors"
        )
    if size[0] % 14 or size[1] % 14:
        raise ConfigError(
            f"anomalib/dinomaly uses patches of 14 pixels: height and width must be multiples of 14, got "
            f"{size[0]} x {size[1]}. Set prepare.height=392 and prepare.width=392."
        )
    backbone = backbones.register(TimmConfig(backbone=encoder, weights=weights), strides=[14])
    return Dinomaly(encoder_name=backbone.name, pre_processor=pre_processor(size, backbone.mean, backbone.std), **RAW)


class OfflineEfficientAd(EfficientAd):  # type: ignore[misc]
    """EfficientAD with a teacher that exists before the training starts."""

    def prepare_pretrained_model(self) -> None:
        """Do nothing, where anomalib downloads the teacher."""


def _efficient_ad(plan: PeerPlan, size: tuple[int, int], work: Path) -> AnomalibModule:
    if min(size) < MIN_EFFICIENT_AD:
        raise ConfigError(
            f"anomalib/efficient_ad needs {MIN_EFFICIENT_AD} x {MIN_EFFICIENT_AD} pixels or more, got {size[0]} x "
            f"{size[1]}. Set prepare.height=256 and prepare.width=256."
        )
    features = plan.config.features
    assert isinstance(features, TimmConfig)
    values = plan.values
    given, penalty = values["teacher"], values["penalty_images"]
    if given:
        teacher = _teacher_state(Path(given))
        channels = teacher["conv4.bias" if values["model_size"] == "small" else "conv6.bias"].shape[0]
    else:
        channels = sum(backbones.register(features, strides=(4, 8, 16)).channels)
    model = OfflineEfficientAd(
        imagenet_dir=_existing(penalty, setting="penalty_images") if penalty else textures(work, size),
        teacher_out_channels=channels,
        model_size=values["model_size"],
        pre_processor=pre_processor(size),
        **RAW,
    )
    if given:
        model.model.teacher.load_state_dict(teacher)
    return model


def _teacher_state(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise MissingError(
            f"'{path}' cannot be read as the safetensors of EfficientAD's teacher ({error}). Convert anomalib's "
            'pretrained_teacher_small.pth with: python -c "import torch; from safetensors.torch import save_file; '
            "save_file(torch.load('pretrained_teacher_small.pth', weights_only=True), 'teacher.safetensors')\""
        ) from error
    return tensors


def distil(
    teacher: nn.Module, plan: PeerPlan, load: Callable[[int], Tensor], count: int, *, generator: torch.Generator
) -> None:
    """Train EfficientAD's patch description network to predict the features of the backbone.

    Batzner et al. 2024, algorithm 1: the mean squared distance to the backbone's features, standardised by channel. The
    paper uses ImageNet and WideResNet-101.

    Args:
        load: returns one of `count` images, (3, H, W) uint8.
    """
    config = plan.config
    assert isinstance(config.features, TimmConfig)
    extractor = build_features(
        TimmConfig(
            backbone=config.features.backbone,
            weights=config.features.weights,
            strides=(4, 8, 16),
            grid_stride=4,
            batch_images=1,
        ),
        height=config.prepare.height,
        width=config.prepare.width,
    )
    some = torch.randperm(count, generator=generator)[:32]
    seen = torch.stack([extractor(load(int(row))[None])[0] for row in some])  # (n, D, h, w)
    mean, std = seen.mean(dim=(0, 2, 3)).view(1, -1, 1, 1), seen.std(dim=(0, 2, 3)).view(1, -1, 1, 1) + 1e-6
    teacher.train().requires_grad_(True)
    optimiser = torch.optim.Adam(teacher.parameters(), lr=DISTILLATION_RATE, weight_decay=1e-5)
    for _ in range(plan.values["teacher_steps"]):
        pixels = load(int(torch.randint(count, (1,), generator=generator)))[None]
        predicted = teacher(pixels.float() / 255)  # (1, D, h', w'), smaller because it has no padding
        target = (extractor(pixels) - mean) / std
        top, left = ((target.shape[axis] - predicted.shape[axis]) // 2 for axis in (2, 3))
        target = target[:, :, top : top + predicted.shape[2], left : left + predicted.shape[3]]
        loss = functional.mse_loss(predicted, target)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    teacher.eval().requires_grad_(False)
