"""Settings come back as they were written, and every mistake is named with its cure."""

import json
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from typing import get_args

import pytest
import yaml

from normweave import settings
from normweave.config import (
    AdaptedMoEConfig,
    CNCConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    HeadConfig,
    MemoryBankConfig,
    NetworkRoutingConfig,
    OfflinePairConfig,
    OpenClipConfig,
    PlainAdaptionConfig,
    SimpleNetConfig,
    TimmConfig,
    models,
)
from normweave.errors import ConfigError
from normweave.validation import fields_of


def refused(call, *words):
    """The message of a refusal, which must hold all of these words."""
    with pytest.raises(ConfigError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return str(caught.value)


@pytest.fixture(params=get_args(HeadConfig), ids=lambda head: head.kind)
def config(request):
    return Config(
        data=DataConfig(category=("bottle", "01"), subclass_from="filename-regex", subclass_regex="^(a[0-9])"),
        features=TimmConfig(strides=(8, 16)),
        head=request.param(),
        seed=7,
    )


def test_comes_back_from_json(config):
    assert settings.from_dict(json.loads(json.dumps(settings.as_dict(config)))) == config


def test_comes_back_from_yaml(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings.as_dict(config)))
    assert settings.read(path) == config


@pytest.mark.parametrize("kind", get_args(FeaturesConfig), ids=lambda kind: kind.kind)
def test_features_of_every_variant_come_back(kind):
    config = Config(features=kind(batch_images=3))
    values = json.loads(json.dumps(settings.as_dict(config)))
    assert values["features"]["kind"] == kind.kind
    assert settings.from_dict(values) == config


def test_features_without_a_variant_are_timms():
    """As in all settings that were written before there were others."""
    old = settings.as_dict(Config(features=TimmConfig(strides=(8,))))
    del old["features"]["kind"]
    assert settings.from_dict(old).features == TimmConfig(strides=(8,))
    assert settings.from_dict({"seed": 1}).features == TimmConfig()


def test_what_is_not_named_keeps_its_default(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("# a comment\nhead:\n  kind: memory_bank\n  share: 0.2\nmaps.smoothing: 0\n")
    assert settings.read(path) == Config(head=MemoryBankConfig(share=0.2), maps=replace(Config().maps, smoothing=0))


@pytest.mark.parametrize(
    ("text", "head"),
    [
        (
            "{kind: adapted_moe, adaption: {method: off}}",
            AdaptedMoEConfig(adaption=PlainAdaptionConfig(method="off")),
        ),  # YAML 1.1 reads off as false
        ("{kind: simplenet, noise: 2e-4}", SimpleNetConfig(noise=0.0002)),  # and 2e-4 as text
        ("{kind: simplenet, noise: 1.5E-3}", SimpleNetConfig(noise=0.0015)),
        ("{kind: simplenet, noise: 1}", SimpleNetConfig(noise=1.0)),
        ("{kind: adapted_moe, moe: false}", AdaptedMoEConfig(moe=False)),
    ],
)
def test_yaml_means_what_it_looks_like(tmp_path, text, head):
    path = tmp_path / "config.yaml"
    path.write_text(f"head: {text}\n")
    assert settings.read(path).head == head


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("head: {kind: adapted_moe, topk: 2}", ["Unknown setting 'head.topk'", "Did you mean 'head.top_k'?"]),
        (
            "head: {kind: adapted_moe, share: 0.1}",
            ["head.share belongs to head.kind=memory_bank. Choose it, or remove head.share"],
        ),
        ("head: {share: 0.1}", ["head.share belongs to head.kind=memory_bank"]),
        ("head: {routing: {alpha: 0.1}}", ["head.routing.alpha belongs to head.routing.method=network"]),
        (
            "head: {expert: {kind: layout, pooled: 0}}",
            ["head.expert.pooled belongs to head.expert.kind=gaussian"],
        ),
        (
            "head: {expert: {kind: memory, cells: 4}}",
            ["head.expert.cells belongs to head.expert.kind=layout or subspace"],
        ),
        ("head: {moe: false, top_k: 3}", ["head.top_k has no effect with moe=false. Leave top_k out"]),
        ("head: {adaption: {method: none}}", ["Unknown head.adaption.method 'none'"]),
        ("head: {expert: 5}", ["head.expert must hold `key: value` lines, got 5"]),
        ("head: {kind: simplenet, training: {epoch: 5}}", ["Did you mean 'head.training.epochs'?"]),
        (
            "head: {kind: simplenet, training: {epochs: 0}}",
            ["head.training.epochs must be greater than or equal to 1"],
        ),
        ("head: {kind: cnc, gating: {top_k: 9}}", ["head.gating.top_k must be at most experts (5), got 9"]),
        ("head: {kind: memory_bnk}", ["Unknown head.kind 'memory_bnk'. Did you mean 'memory_bank'?"]),
        ("head: {kind: [1]}", ["Unknown head.kind '[1]'"]),
        (
            "features: {kind: open_clp}",
            [
                "Unknown features.kind 'open_clp'. Did you mean 'open_clip'?",
                "Known: offline_pair, open_clip, timm",
            ],
        ),
        (
            "features: {kind: open_clip, strides: [8]}",
            ["features.strides belongs to features.kind=timm or offline_pair"],
        ),
        ("features: {layers: [1]}", ["features.layers belongs to features.kind=open_clip"]),
        ("features: {kind: offline_pair, strides: [8]}", ["strides must hold 32, got [8]"]),
        (
            "features: {kind: open_clip, layers: [0]}",
            ["features.layers[0] must be greater than or equal to 1, got 0"],
        ),
        ("haed: {kind: dfm}", ["Unknown setting 'haed'", "Did you mean 'head"]),
        ("head: 5", ["head must hold `key: value` lines, got 5"]),
        ("prepare: {height: '256'}", ["prepare.height must be a valid integer, got '256'"]),
        ("prepare: {height: 256.5}", ["prepare.height must be a valid integer, got 256.5"]),
        ("head: {kind: adapted_moe, moe: 1}", ["head.moe must be a valid boolean, got 1"]),
        ("head: {kind: adapted_moe, moe: no}", ["head.moe must be a valid boolean, got 'no'"]),
        ("head: {kind: adapted_moe, top_k: true}", ["head.top_k must be a valid integer, got True"]),
        (
            "head: {kind: adapted_moe, aggregation: total}",
            ["head.aggregation must be ", "'paper', 'min' or 'mean', got 'total'"],
        ),
        ("data: {category: bottle}", ["data.category must be a valid list, got 'bottle'"]),
        ("data: {category: [a, 1]}", ["data.category[1] must be a valid string, got 1"]),
        ("maps: {smoothing: .inf}", ["maps.smoothing must be a finite number, got inf"]),
        ("maps: {smoothing: .nan}", ["maps.smoothing must be a finite number, got nan"]),
        ("maps: {smoothing: -1}", ["maps.smoothing must be greater than or equal to 0, got -1"]),
        ("seed: one", ["seed must be a valid integer, got 'one'"]),
        ("seed: 1\nseed: 2", ["is not YAML", "duplicate key: seed"]),
        ("seed: [1", ["is not YAML", "line 1"]),
        ("seed: 2026-13-45", ["seed must be a valid integer, got '2026-13-45'"]),
        ("seed: !!python/object/apply:os.getcwd []", ["is not YAML", "could not determine a constructor"]),
        ("[" * 5000, ["is not YAML"]),
        ("- a", ["must hold `key: value` lines", "with the keys data, prepare, regions, features, head"]),
        ("", ["must hold `key: value` lines", "got None"]),
    ],
)
def test_mistakes_are_named(tmp_path, text, words):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    refused(lambda: settings.read(path), "config.yaml", *words)


def test_all_mistakes_are_reported_together(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("sead: 1\nprepare: {height: 3, width: 4}\nhead: {kind: dfm, cells: a, variance: 2}\n")
    message = refused(
        lambda: settings.read(path), "5 mistakes", "'sead'", "head.cells", "head.variance must be less than 1"
    )
    assert "prepare.height must be greater than or equal to 32, got 3" in message


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["missing", "binary"])
def test_a_file_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    refused(lambda: settings.read(path), "Cannot read settings from", "Name a YAML file in UTF-8.")


def test_override_changes_only_what_it_names():
    changed = settings.override(
        Config(),
        [
            "head.adaption.method=off",
            "features.strides=[4, 8]",
            "seed = 3",
            "head.routing.alpha=1e-1",
            "head.routing.method=network",
            "head.top_k=3",
        ],
    )
    assert changed == Config(
        head=AdaptedMoEConfig(
            adaption=PlainAdaptionConfig(method="off"), routing=NetworkRoutingConfig(alpha=0.1), top_k=3
        ),
        features=TimmConfig(strides=(4, 8)),
        seed=3,
    )


@pytest.mark.parametrize("text", ["[ab]+_(.*)", "007", "a=b", "true"])
def test_text_is_taken_as_it_stands(text):
    assert settings.override(Config(), [f"data.subclass_regex={text}"]).data.subclass_regex == text


def test_another_variant_starts_from_its_own_defaults():
    changed = settings.override(Config(), ["head.share=0.2", "head.kind=memory_bank"])
    assert changed.head == MemoryBankConfig(share=0.2)


def test_another_variant_of_features_starts_from_its_own_defaults():
    config = Config(features=TimmConfig(strides=(4, 8), batch_images=2), head=MemoryBankConfig(share=0.2))
    changed = settings.override(config, ["features.layers=[2, 4]", "features.kind=open_clip"])
    assert changed == replace(config, features=OpenClipConfig(layers=(2, 4)))


def test_another_model_brings_its_head_and_only_cnc_its_features():
    config = Config(head=AdaptedMoEConfig(top_k=3), seed=4)
    assert settings.with_model(config, "dfm") == replace(config, head=settings.model_config("dfm"))
    assert settings.with_model(config, "cnc") == replace(config, head=CNCConfig(), features=OfflinePairConfig())
    refused(lambda: settings.with_model(config, "cnn"), "Unknown model 'cnn'", "'cnc'")


def test_the_smoothing_is_that_of_the_head_unless_it_is_set():
    assert Config().smoothing == 1
    assert settings.override(Config(), ["head.expert.kind=memory"]).smoothing == 4
    assert settings.with_model(Config(), "patchcore").smoothing == 4
    assert settings.override(Config(), ["maps.smoothing=2.5"]).smoothing == 2.5
    assert settings.override(Config(), ["maps.smoothing=0"]).smoothing == 0


@pytest.mark.parametrize("features", [TimmConfig(strides=(8,)), OpenClipConfig(), OfflinePairConfig(batch_images=2)])
def test_features_that_were_chosen_stay(features):
    config = Config(features=features)
    assert settings.with_model(config, "cnc").features == features


def test_the_same_model_keeps_what_was_set():
    config = Config(head=CNCConfig(width=32))
    assert settings.with_model(config, "cnc") == config  # and its features, which someone has chosen


def test_the_same_variant_keeps_what_was_set():
    config = Config(head=AdaptedMoEConfig(top_k=2))
    assert settings.override(config, ["head.kind=adapted_moe", "seed=1"]) == replace(config, seed=1)


def test_named_settings_are_those_of_the_file_and_of_the_assignments(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("prepare: {height: 256}\nhead.top_k: 2\nseed: 1\n")
    named = settings.named(
        path, ["features.strides=[4, 8]", "data.subclass_regex=^(a|b)", "head.expert={kind: memory}"]
    )
    assert named == {
        "prepare.height",
        "head.top_k",
        "seed",
        "features.strides",
        "data.subclass_regex",
        "head.expert.kind",
    }
    assert settings.named(None, []) == frozenset()


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("head.topk=2", ["Unknown setting 'head.topk'. Did you mean 'head.top_k'?"]),
        ("head.top_k", ["'head.top_k' must be of the form a.b=c"]),
        ("=2", ["'=2' must be of the form a.b=c"]),
        ("head.top_k=two", ["head.top_k must be a valid integer, got 'two'"]),
        ("head.top_k=[", ["head.top_k is not YAML"]),
        ("head=2", ["head must hold `key: value` lines, got 2"]),
        ("head.top_k.x=2", ["head.top_k must be a valid integer, got {'x': 2}"]),
        ("head.kind=unet", ["Unknown head.kind 'unet'"]),
        ("head.top_k=0", ["head.top_k must be greater than or equal to 1, got 0"]),
    ],
)
def test_overrides_with_mistakes(assignment, words):
    refused(lambda: settings.override(Config(), [assignment]), "--set: ", *words)


def test_every_model_of_the_command_line_is_a_head_and_every_head_a_model():
    heads = [settings.model_config(name) for name in models()]
    assert {type(head) for head in heads} == set(get_args(HeadConfig))
    assert settings.model_config("patchcore") == MemoryBankConfig()


def test_an_unknown_model_lists_the_known_ones():
    refused(lambda: settings.model_config("patch-core"), "Unknown model 'patch-core'. Did you mean 'patchcore'?")


def test_importing_settings_loads_no_torch():
    script = "import sys, normweave.settings; print({'torch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_command_line_shows_help_without_pydantic():
    script = "import sys, normweave.cli; print({'torch', 'pydantic'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def numbers(cls, prefix=""):
    """Dotted keys of the numbers of a settings class, its sections included."""
    for field in fields(cls):
        hint = fields_of(cls)[field.name].annotation
        if hint in (int, float):
            yield prefix + field.name
        elif is_dataclass(hint):
            yield from numbers(hint, f"{prefix}{field.name}.")


@pytest.mark.parametrize("head", get_args(HeadConfig), ids=lambda head: head.kind)
def test_numbers_out_of_range_are_refused_together(head):
    wrong = {f"head.{key}": -1e9 if key == "margin" else -1 for key in numbers(head) if key != "margin"}
    message = refused(lambda: settings.from_dict({"head.kind": head.kind} | wrong))
    for key in wrong:
        assert re.search(rf"(^|- |: ){re.escape(key)} must be .*, got -1", message, re.M), key


def test_a_training_keeps_the_values_of_its_head():
    changed = settings.override(Config(head=SimpleNetConfig()), ["head.training.epochs=3"])
    assert changed.head.training == replace(SimpleNetConfig().training, epochs=3)
    read = settings.from_dict({"head": {"kind": "simplenet", "training": {"epochs": 3}}})
    assert read == changed


def test_a_class_checks_its_values_too():
    refused(
        lambda: AdaptedMoEConfig(top_k=0, temperature=-1.0),
        "AdaptedMoEConfig: 2 mistakes:\n- top_k must be greater than or equal to 1, got 0\n- temperature must be",
    )
    refused(lambda: AdaptedMoEConfig(topk=2), "AdaptedMoEConfig: Unknown setting 'topk'. Did you mean 'top_k'?")
    refused(lambda: replace(Config(), seed="1"), "Config: seed must be a valid integer, got '1'")


def test_adapted_moe_has_few_settings_of_its_own():
    assert len(fields(AdaptedMoEConfig)) - 1 <= 15  # all but `kind`
