"""Checked dataclasses are strict and name every mistake with its key."""

from dataclasses import FrozenInstanceError
from typing import Annotated, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from normweave.errors import ConfigError
from normweave.settings import from_dict
from normweave.validation import (
    OddInt,
    PositiveInt,
    Share,
    check,
    checked,
    fields_of,
    joined,
    mistakes,
    unused,
    variants,
)


@checked
class Near:
    """A variant with one setting."""

    kind: Literal["near"] = "near"
    neighbours: PositiveInt = 3


@checked
class Far:
    """A variant with a setting that one choice of another disables."""

    kind: Literal["far"] = "far"
    share: Share = 0.5
    window: OddInt = 3
    mode: Literal["on", "off"] = "on"

    def __post_init__(self) -> None:
        if self.mode == "off":
            check(*unused(self, "share window", why="mode=off"))


@checked
class Whole:
    """A section with a union."""

    part: Annotated[Near | Far, Field(discriminator="kind")] = Near()
    count: PositiveInt = 1


def message(call):
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


def read(text):
    """Read settings from JSON, as `normweave.settings` does."""
    try:
        return TypeAdapter(Whole).validate_json(text)
    except ValidationError as error:
        raise joined(mistakes(error, Whole), source="a.yaml") from None


def test_a_mistake_names_the_class_the_key_and_the_value():
    assert message(lambda: Near(neighbours=0)) == ("Near: neighbours must be greater than or equal to 1, got 0")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"neighbours": "3"}, "neighbours must be a valid integer, got '3'"),
        ({"neighbours": 3.0}, "neighbours must be a valid integer, got 3.0"),
        ({"neighbors": 3}, "Unknown setting 'neighbors'. Did you mean 'neighbours'?"),
    ],
    ids=str,
)
def test_values_are_not_converted_and_names_not_guessed(values, complaint):
    assert complaint in message(lambda: Near(**values))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_share_is_finite_and_in_0_to_1(share):
    assert "share must be" in message(lambda: Far(share=share))


def test_an_even_window_is_refused():
    assert message(lambda: Far(window=4)) == "Far: window must be odd, got 4"
    assert Far(window=5).window == 5


def test_all_mistakes_are_in_one_error():
    assert message(lambda: Far(share=2, window=4)).startswith("Far: 2 mistakes:\n- share must be")


def test_a_mistake_in_a_variant_has_a_dotted_key():
    assert message(lambda: read('{"part": {"kind": "far", "share": 2}}')).startswith(
        "a.yaml: part.share must be less than or equal to 1, got 2"
    )


def test_a_setting_of_another_variant_names_it():
    assert message(lambda: read('{"part": {"kind": "near", "window": 3}}')) == (
        "a.yaml: part.window belongs to part.kind=far. Choose it, or remove part.window"
    )


def test_the_message_of_a_class_follows_the_key_of_its_section():
    text = '{"part": {"kind": "far", "mode": "off", "window": 5}}'
    assert message(lambda: read(text)).startswith("a.yaml: part.window has no effect with mode=off")


def test_an_unknown_variant_lists_those_that_exist():
    assert "Unknown part.kind 'fat'. Did you mean 'far'? Known: far, near." in message(
        lambda: read('{"part": {"kind": "fat"}}')
    )


def test_a_setting_without_effect_is_refused_unless_at_its_default():
    assert Far(mode="off", share=0.5).mode == "off"
    assert message(lambda: Far(mode="off", share=0.25, window=5)) == (
        "Far: 2 mistakes:\n"
        "- share has no effect with mode=off. Leave share out, or change that\n"
        "- window has no effect with mode=off. Leave window out, or change that"
    )


def test_rules_that_hold_raise_nothing():
    check((True, "never shown"))
    with pytest.raises(ValueError, match="shown") as caught:
        check((True, "never"), (False, "shown"), (False, "too"))
    assert caught.value.args == ("shown", "too")


def test_valid_values_are_read():
    assert read('{"part": {"kind": "far", "share": 0.25}}') == Whole(part=Far(share=0.25))


def test_checked_classes_are_frozen_and_list_their_fields():
    whole = Whole()
    with pytest.raises(FrozenInstanceError):
        whole.count = 2
    assert list(fields_of(Whole)) == ["part", "count"]
    assert fields_of(int) == {}
    assert variants(fields_of(Whole)["part"]) == {"near": Near, "far": Far}
    assert variants(fields_of(Whole)["count"]) == {}


def test_a_list_that_is_too_short_is_a_mistake_unless_its_items_are():
    corner = [0.0, 0.0]
    for polygon, words in (([corner, corner], "must have at least 3 items"), ([corner, corner, [0, 2]], "got 2")):
        with pytest.raises(ConfigError, match=words) as caught:
            from_dict({"regions": [{"include": {"polygons": [polygon]}}]})
        assert "settings: regions[0].include.polygons[0]" in str(caught.value)
        assert "\n" not in str(caught.value)
