"""Builders and fixtures that several test modules share."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from normweave import settings
from normweave.config import Config, DataConfig, OutcomeConfig, PrepareConfig, TimmConfig, TrainingConfig
from normweave.data import layouts
from normweave.detector import Detector
from normweave.testing import SHAPE as SHAPE
from normweave.testing import InMemory as InMemory
from normweave.testing import InParts as InParts
from normweave.testing import fit as fit
from normweave.testing import normals as normals
from normweave.testing import random as random
from normweave.testing import seeded as seeded
from normweave.testing import subclass_images as subclass_images
from normweave.testing import subclass_normals as subclass_normals
from normweave.textiles import SEEN, UNSEEN, make_textures
from normweave.types import JointMaps

# ── random numbers ───────────────────────────────────────────────────────────────────────────────────────────────────


def perturb(module, seed=9):
    """Change every parameter, so that no term of an equation keeps its neutral initial value."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def head_config(kind="adapted_moe", **values):
    """Settings of a head, its sections as mappings; `expert="memory"` is short for `expert={"kind": "memory"}`."""
    for section, discriminator in (("expert", "kind"), ("routing", "method"), ("adaption", "method")):
        if isinstance(values.get(section), str):
            values[section] = {discriminator: values[section]}
    return settings.from_dict({"head": {"kind": kind} | values}).head


def quick_training(**fields):
    return TrainingConfig(**{"epochs": 8, "batch_images": 4, "learning_rate": 1e-2} | fields)


# ── features and fit data ────────────────────────────────────────────────────────────────────────────────────────────


def begun(head, data):
    """Fit what a head fits before its training stages."""
    head.begin(data)
    return head


# ── a vision-language pair that is small enough to compute by hand ───────────────────────────────────────────────────

WORD_DIM, TOKEN_DIM, JOINT_DIM = 8, 10, 6


class Small(nn.Module):
    """An untrained extractor: pixels to a few numbers for each patch of 4 x 4."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0)) / 500)

    def forward(self, pixels):
        return nn.functional.conv2d(pixels.float(), self.kernel, stride=4)


class TinyText(nn.Module):
    """One frozen transformer layer over words whose embeddings are seeded by their letters."""

    embedding_dim, output_dim, joint_dim = WORD_DIM, TOKEN_DIM, JOINT_DIM

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            # Without dropout, train mode changes nothing. Eval mode would run a fused kernel with other rounding.
            self.layer = nn.TransformerEncoderLayer(WORD_DIM, 2, 16, dropout=0.0, batch_first=True)
            self.widen = nn.Linear(WORD_DIM, TOKEN_DIM)
            self.project = nn.Linear(TOKEN_DIM, JOINT_DIM)
        self.requires_grad_(False)

    def embed_tokens(self, text):
        seeds = [sum(ord(letter) * 31**index for index, letter in enumerate(word)) for word in text.split()]
        return torch.stack([random(WORD_DIM, seed=seed % 2**31) for seed in seeds])

    def _read(self, context, state):
        return self.widen(self.layer(torch.cat([context, self.embed_tokens(state)])[None])[0])

    def encode_prompts(self, context, states):
        outputs = torch.stack([self.project(self._read(context, state)).mean(0) for state in states])
        return functional.normalize(outputs, dim=1)

    def encode_context(self, context, state):
        return self._read(context, state)[: len(context)]


class TinyPair:
    """A pair with random maps to the joint space; records the features that it was fitted on."""

    def __init__(self, dims, *, text=True, layer_norm=False):
        self.dims = dims
        self.text = TinyText() if text else None
        self.layer_norm = layer_norm
        self.fitted_on = None

    def joint_maps(self, normals):
        self.fitted_on = torch.cat(list(normals))
        generator = seeded(6)
        return JointMaps(
            weights=tuple(torch.randn(D, JOINT_DIM, generator=generator) for D in self.dims),
            biases=tuple(0.1 * torch.randn(JOINT_DIM, generator=generator) for _ in self.dims),
            layer_norm=self.layer_norm,
        )


# ── a small detector of three subclasses of cloth, with random backbone weights, and its bundle ──────────────────────


@pytest.fixture(scope="session")
def cloth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtime") / "cloth"
    return make_textures(
        folder,
        size=(64, 64),
        seed=3,
        train_images=18,
        test_images=3,
        defect_images=3,
        seen=SEEN[:3],
        unseen=UNSEEN[:1],
    )


@pytest.fixture(scope="session")
def detector(cloth):
    return Detector.fit(
        cloth,
        config=Config(
            data=DataConfig(subclass_from="column", calibration="split"),
            prepare=PrepareConfig(height=64, width=64),
            features=TimmConfig(weights="random", strides=(8,), batch_images=4),
            head=head_config(expert="gaussian"),
            outcome=OutcomeConfig(false_alarm_rate=0.1, unknown_rate=0.1),
        ),
        use_cache=False,
        device="cpu",
    )


@pytest.fixture(scope="session")
def bundle(detector, tmp_path_factory):
    return detector.save(tmp_path_factory.mktemp("bundles") / "cloth.bundle")


@pytest.fixture(scope="session")
def photos(cloth):
    """The test images: seen and unseen subclasses, normal and anomalous."""
    return sorted(str(path) for path in cloth.parent.glob("cloth/*/test/*/*.png"))


@pytest.fixture(scope="session")
def fusion_bundle(cloth, tmp_path_factory):
    """A bundle of the default head, fitted to two of the three subclasses, with few stored patches."""
    samples = layouts.read(cloth, DataConfig(subclass_from="column"))
    names = sorted({each.subclass for each in samples if each.split == "train"})
    small = {"memory": {"max_patches": 100, "max_pool": 2000}, "layout": {"cells": 4}}
    fitted = Detector.fit(
        [each for each in samples if each.subclass in names[:2]],
        config=Config(
            data=DataConfig(subclass_from="column", calibration="split"),
            prepare=PrepareConfig(height=64, width=64),
            features=TimmConfig(weights="random", strides=(8,), batch_images=4),
            head=head_config(expert={"kind": "fusion"} | small),
            outcome=OutcomeConfig(false_alarm_rate=0.1, unknown_rate=0.1),
        ),
        use_cache=False,
        device="cpu",
    )
    return fitted.save(tmp_path_factory.mktemp("fusion") / "fusion.bundle")
