"""Every pair of settings of Adapted-MoE is either read by the head, both of them, or refused."""

from itertools import chain, combinations
from typing import get_args

import pytest
import torch

from builders import seeded, subclass_normals
from normweave import settings
from normweave.config import AdaptedMoEConfig
from normweave.errors import ConfigError
from normweave.heads import build
from normweave.validation import fields_of, variants

OWN = {
    "moe": False,
    "top_k": 1,
    "temperature": 1.0,
    "aggregation": "mean",
    "border": 0,
    "discover": "always",
    "discovery": "mixture",
    "max_subclasses": 1,
}
SHAPE = (4, 6, 6)
FEW_PATCHES = {"fusion": {"expert.memory.max_patches": 20}, "memory": {"expert.max_patches": 20}}
"""Settings of experts that store patches, for speed."""
DATA = [subclass_normals(shape=SHAPE, labelled=labelled) for labelled in (True, False)]


def changed(field):
    """Return a value that is allowed and not the default."""
    if isinstance(field.default, bool):
        return not field.default
    return field.default * 0.5 if field.annotation is float else field.default + 1


def leaves(section, field):
    """Yield each setting of a union: the choice of its variant, and the dotted key with another value."""
    tag_name = field.discriminator
    for tag, part in variants(field).items():
        choice = {f"{section}.{tag_name}": tag}
        if part is not type(field.default) or tag != getattr(field.default, tag_name):
            yield choice
        for name, inner in fields_of(part).items():
            if name == "training":
                yield from ({**choice, f"{section}.training.{each}": 9} for each in ("epochs", "patience"))
                yield {**choice, f"{section}.training.learning_rate": 0.5}
            elif name == "use":
                yield {**choice, f"{section}.use": ["memory", "gaussian"]}
            elif fields_of(inner.annotation):
                pass  # an expert of the fusion; the settings of an expert are tested without it
            elif name != tag_name and get_args(inner.annotation) == ():
                yield {**choice, f"{section}.{name}": changed(inner)}


SETTINGS = [{name: value} for name, value in OWN.items()] + [
    leaf
    for section in ("expert", "routing", "adaption")
    for leaf in leaves(section, fields_of(AdaptedMoEConfig)[section])
]


def refusal(values):
    try:
        settings.override(settings.Config(), [f"head.{key}={value}".lower() for key, value in values.items()])
    except ConfigError as error:
        return str(error)
    return None


def unread(values, named, monkeypatch):
    """Return which of the named keys building, fitting and scoring do not read, on labelled or unlabelled images."""
    expert = values.get("expert.kind", "fusion")
    few = FEW_PATCHES.get(expert, {}) if "memory" in values.get("expert.use", "memory") else {}
    config = settings.from_dict({f"head.{key}": value for key, value in (few | values).items()}).head
    keys = {id(config): ""}
    for section in ("expert", "routing", "adaption"):
        part = getattr(config, section)
        keys |= {id(part): f"{section}.", id(getattr(part, "training", None)): f"{section}.training."}
    found = set()

    def recorded(self, name):
        if id(self) in keys:
            found.add(keys[id(self)] + name)
        return object.__getattribute__(self, name)

    classes = {type(config), *(type(getattr(config, each)) for each in ("expert", "routing", "adaption"))}
    classes |= {type(part.training) for part in (config.expert, config.routing) if hasattr(part, "training")}
    with monkeypatch.context() as patch:
        for cls in classes:
            patch.setattr(cls, "__getattribute__", recorded, raising=False)
        for _ in chain.from_iterable(steps(config, data) for data in DATA):
            if named <= found:
                break
    return named - found


def steps(config, data):
    """Build, fit and score, and yield after each step."""
    head = build(config, shape=SHAPE)
    yield
    head.begin(data)
    yield
    for stage in head.stages(data):
        stage.optimiser()
        yield
        batch, labels = data.features.read(range(8)), torch.from_numpy(data.subclasses[:8])
        stage.loss(batch, labels, generator=seeded(), training=True)
        yield
    head.finish(data)
    yield
    head(data.features.read(range(2)))
    yield


def test_every_setting_is_in_the_list():
    named = {key for values in SETTINGS for key in values}
    assert {key for key in named if "." not in key} == set(OWN)
    assert {f"{name}" for name in fields_of(AdaptedMoEConfig)} - set(OWN) == {
        "kind",
        "expert",
        "routing",
        "adaption",
    }


def test_settings_of_different_variants_are_refused_together():
    for one, other in combinations(SETTINGS, 2):
        clash = [key for key in one.keys() & other.keys() if one[key] != other[key]]
        if clash and len(one) > 1:
            key = next(key for key in one if key not in clash)
            section = clash[0].partition(".")[0]
            part = variants(fields_of(AdaptedMoEConfig)[section])[other[clash[0]]]
            if key.split(".")[1] in fields_of(part):
                continue  # both variants have this setting
            message = refusal({**other, key: one[key]})
            assert message is not None, (one, other)
            assert f"head.{key} belongs to head.{clash[0]}=" in message


def test_every_pair_is_read_or_refused(monkeypatch):
    accepted = 0
    for one, other in combinations(SETTINGS, 2):
        if any(one[key] != other[key] for key in one.keys() & other.keys()):
            continue
        both = one | other
        if (message := refusal(both)) is not None:
            assert "has no effect with" in message, (both, message)
            continue
        accepted += 1
        named = {key for key in both if not key.endswith((".kind", ".method"))}  # these two choose the class
        left = unread(both, named, monkeypatch)
        assert not left, (both, left)
    assert accepted > 300


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"moe": False, "top_k": 3}, "head.top_k has no effect with moe=false"),
        ({"moe": False, "routing.method": "network"}, "head.routing has no effect with moe=false"),
        ({"top_k": 1, "temperature": 1.0}, "head.temperature has no effect with top_k=1"),
        ({"top_k": 1, "aggregation": "min"}, "head.aggregation has no effect with top_k=1"),
        ({"expert.kind": "layout", "border": 0}, "head.border has no effect with expert.kind=layout"),
        ({"max_subclasses": 1, "discovery": "mixture"}, "head.discovery has no effect with max_subclasses=1"),
    ],
)
def test_a_setting_without_effect_is_refused(values, word):
    assert word in (refusal(values) or "")
