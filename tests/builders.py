"""Builders and fixtures that several test modules share."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from normweave import settings
from normweave.config import Config, DataConfig, OutcomeConfig, PrepareConfig, TimmConfig, TrainingConfig
from normweave.data import layouts
from normweave.detector import Detector
from normweave.textiles import SEEN, UNSEEN, make_textures
from normweave.training import train
from normweave.types import FitData, JointMaps

# ── random numbers ───────────────────────────────────────────────────────────────────────────────────────────────────


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


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


class InMemory:
    """A feature source over a tensor (n, D, h, w) that records the rows of each read."""

    def __init__(self, features: Tensor | ArrayLike) -> None:
        self.features = torch.as_tensor(features, dtype=torch.float32)
        self.shape = tuple(self.features.shape[1:])
        self.reads: list[NDArray[np.int64]] = []

    @property
    def largest_read(self) -> int:
        """The largest number of images in one read."""
        return max((len(rows) for rows in self.reads), default=0)

    def __len__(self) -> int:
        return len(self.features)

    def read(self, rows: Sequence[int]) -> Tensor:
        self.reads.append(np.asarray(rows))
        return self.features[torch.as_tensor(np.asarray(rows), dtype=torch.int64)]


def normals(features, **fields):
    """Fit data without subclass labels; each image is its own group and every fifth is held out."""
    number = np.arange(len(features))
    defaults = {
        "subclasses": np.full(len(features), -1),
        "names": (),
        "groups": number,
        "holdout": number % 5 == 0,
        "seed": 0,
    }
    return FitData(features=InMemory(features), **defaults | fields)


SHAPE = (16, 8, 8)


def subclass_images(count, *, subclasses=3, shape=SHAPE, seed):
    """Standardised features of normal images, and their subclasses, which differ in the mean of every channel."""
    means = random(subclasses, shape[0], 1, 1, seed=1)
    noise = random(count, *shape, seed=seed)
    subclass = torch.arange(count) % subclasses
    spread = means.var(0, unbiased=False).add(0.25).sqrt()
    return (means[subclass] - means.mean(0) + 0.5 * noise) / spread, subclass.numpy()


def subclass_normals(*, count=24, subclasses=3, shape=SHAPE, labelled=True, holdout=True):
    """Fit data of several subclasses; a group is two images of one subclass."""
    features, subclass = subclass_images(count, subclasses=subclasses, shape=shape, seed=2)
    groups = np.arange(count) // (2 * subclasses) * subclasses + subclass
    labels = {"subclasses": subclass, "names": tuple(f"cloth/{name}" for name in "abc"[:subclasses])}
    return normals(features, groups=groups, holdout=(groups < subclasses) & holdout, **labels if labelled else {})


def begun(head, data):
    """Fit what a head fits before its training stages."""
    head.begin(data)
    return head


def fit(head, data):
    """Fit a head as `normweave.fitting` does."""
    head.begin(data)
    for stage in head.stages(data):
        train(stage, data, device="cpu")
    head.finish(data)
    return head


# ── a vision-language pair that is small enough to compute by hand ───────────────────────────────────────────────────

WORD_DIM, TOKEN_DIM, JOINT_DIM = 8, 10, 6


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
