"""Contract of every class of settings, which covers the modules of `normweave.config`.

The classes are found from `Config`; values and messages are tested in tests/test_settings.py.
"""

import importlib
import json
import pkgutil
from dataclasses import FrozenInstanceError, asdict, is_dataclass, replace

import pytest
from pydantic import TypeAdapter

import normweave.config
from normweave.config import DISCRIMINATOR, Config, RegionConfig, ShapesConfig, models
from normweave.errors import ConfigError
from normweave.validation import fields_of, variants


def sections(config):
    """Return this section and all below it, with every variant of a union at its defaults."""
    found = {type(config): config}
    for name, field in fields_of(type(config)).items():
        value = getattr(config, name)
        items = value if isinstance(value, tuple) else [value]
        below = [each() for each in variants(field).values()] + [each for each in items if is_dataclass(each)]
        for each in below:
            found = sections(each) | found
    return found


REGION = RegionConfig(include=ShapesConfig(rectangles=((0.0, 0.0, 0.5, 0.5),)))
SECTIONS = sections(Config(regions=(REGION,)))
MODULES = [
    importlib.import_module(each.name) for each in pkgutil.iter_modules(normweave.config.__path__, "normweave.config.")
]


@pytest.fixture(params=SECTIONS.values(), ids=lambda section: type(section).__name__)
def section(request):
    return request.param


def message(call):
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


def test_every_class_of_the_package_is_part_of_the_settings_and_in_config():
    classes = {
        each
        for module in (normweave.config, *MODULES)
        for each in vars(module).values()
        if isinstance(each, type) and is_dataclass(each) and each.__module__.startswith("normweave.config")
    }
    assert classes == set(SECTIONS)
    assert all(getattr(normweave.config, each.__name__) is each for each in classes)


def test_it_comes_back_from_json(section):
    text = json.dumps(asdict(section))
    assert TypeAdapter(type(section)).validate_json(text) == section


def test_every_field_refuses_a_value_of_another_type(section):
    for name in fields_of(type(section)):
        text = message(lambda name=name: replace(section, **{name: object()}))
        assert text.startswith(f"{type(section).__name__}: {name}"), text


def test_numbers_are_finite(section):
    for name, field in fields_of(type(section)).items():
        if field.annotation is float:
            for value in (float("nan"), float("inf")):
                assert f": {name} must be" in message(lambda name=name, value=value: replace(section, **{name: value}))


def test_a_misspelt_setting_is_refused_with_the_correct_name(section):
    for name in fields_of(type(section)):
        text = message(lambda name=name: type(section)(**asdict(section) | {f"{name}x": 1}))
        assert f"Did you mean '{name}'" in text


def test_it_is_frozen(section):
    for name in fields_of(type(section)):
        with pytest.raises(FrozenInstanceError):
            setattr(section, name, getattr(section, name))


def test_variants_of_a_union_keep_their_name(section):
    for field in fields_of(type(section)).values():
        for name, each in variants(field).items():
            assert getattr(each(**{field.discriminator: name}), field.discriminator) == name
            text = json.dumps({field.discriminator: name})
            assert type(TypeAdapter(field.rebuild_annotation()).validate_json(text)) is each


def test_every_head_has_a_model_and_an_implementation():
    heads = list(variants(fields_of(Config)["head"]).values())
    assert sorted(head.model for head in heads) == sorted(models())
    for head in heads:
        module, _, name = head.implementation.partition(":")
        assert hasattr(importlib.import_module(f"normweave.heads.{module}"), name)
        assert DISCRIMINATOR in fields_of(head)
