"""Frozen dataclasses whose fields pydantic checks, and its errors as one `ConfigError` with dotted keys."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import field as dataclass_field
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, cast, dataclass_transform, get_args, get_origin

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from normweave.errors import ConfigError, unknown

DISCRIMINATOR = "kind"
"""Field that names the variant of `features`, `head` and `head.expert`."""

PositiveInt = Annotated[int, Field(ge=1)]
NaturalInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NaturalFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
InnerShare = Annotated[float, Field(gt=0, lt=1)]


def _odd(value: int) -> int:
    check((value % 2 == 1, f"must be odd, got {value}"))
    return value


OddInt = Annotated[int, Field(ge=1), AfterValidator(_odd)]

HOWTO = "Every setting is explained in normweave/config/."

_Class = TypeVar("_Class")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclass_field,))
def checked(cls: type[_Class]) -> type[_Class]:
    """Make a frozen dataclass that is strict about types and raises `ConfigError` with all mistakes."""
    strict = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    made = pydantic_dataclass(cls, frozen=True, kw_only=True, config=strict)
    initialise = made.__init__

    @functools.wraps(initialise)
    def __init__(self: Any, **values: Any) -> None:  # noqa: N807
        try:
            initialise(self, **values)
        except ValidationError as error:
            raise joined(mistakes(error, cls), source=cls.__name__) from None

    made.__init__ = __init__  # type: ignore[method-assign]
    return cast("type[_Class]", made)


def check(*rules: tuple[bool, str]) -> None:
    """Raise one error for all rules that do not hold; each is a condition and what is wrong without it."""
    if wrong := [text for holds, text in rules if not holds]:
        raise ValueError(*wrong)


def unused(settings: Any, names: str, *, why: str) -> list[tuple[bool, str]]:
    """Return a rule for each of these settings that is not at its default, since it would have no effect."""
    changed = []
    for name, field in fields_of(type(settings)).items():
        if name in names.split() and getattr(settings, name) != field.get_default(call_default_factory=True):
            changed.append((False, f"{name} has no effect with {why}. Leave {name} out, or change that"))
    return changed


def fields_of(cls: Any) -> dict[str, FieldInfo]:
    """Return the fields of a checked class by name; empty for any other type."""
    return dict(getattr(cls, "__pydantic_fields__", {}))


def variants(field: FieldInfo) -> dict[str, Any]:
    """Return the classes of a union by the value of its discriminator; empty if the field holds no union."""
    if not isinstance(field.discriminator, str):
        return {}
    return {
        tag: part
        for part in get_args(field.annotation)
        for tag in get_args(fields_of(part)[field.discriminator].annotation)
    }


def joined(found: Sequence[str], *, source: str) -> ConfigError:
    """Return one error for all mistakes; `source` names where the values come from."""
    if len(found) == 1:
        return ConfigError(f"{source}: {found[0]}")
    return ConfigError(f"{source}: {len(found)} mistakes:\n" + "\n".join(f"- {line}" for line in found))


def mistakes(error: ValidationError, settings: Any, *, at: str = "", howto: str = HOWTO) -> list[str]:
    """Return one line for each mistake: the dotted key, what is allowed, what was given.

    Args:
        at: dotted key of the settings themselves, which the keys begin with.
        howto: where the settings are explained.
    """
    found: list[str] = []
    places = [each["loc"] for each in error.errors(include_url=False)]
    for each in error.errors(include_url=False):
        place = _locate(settings, each["loc"], at)
        key, given, context = place.key, each["input"], each.get("ctx", {})
        if place.members and any(one[:-1] == each["loc"][: place.depth] for one in places):
            # pydantic has a line for each type of a union; this is the one that has the whole value.
            if len(each["loc"]) == place.depth + 1:
                *first, last = map(_in_words, place.members)
                text = f"{key} must be {', '.join(first)} or {last}, got {given!r:.80}"
                found += [text] if text not in found else []
            continue
        match each["type"]:
            case "unexpected_keyword_argument":
                name = str(each["loc"][-1])
                owners = [tag for tag, part in place.choices.items() if name in fields_of(part)]
                if owners:
                    choice = f"{place.section}{place.discriminator}={' or '.join(owners)}"
                    found.append(f"{key} belongs to {choice}. Choose it, or remove {key}")
                else:
                    known = [f"{place.section}{field}" for field in fields_of(place.owner)]
                    found.append(str(unknown("setting", key, known, howto)))
            case "union_tag_invalid":
                name = f"{key}.{str(context['discriminator']).strip(chr(39))}"
                found.append(str(unknown(name, str(context["tag"]), _tags(context), howto)))
            case "union_tag_not_found":
                name, tags = place.tag, ", ".join(place.tags)
                found.append(f"{key} must have {name}, which is one of {tags}, got {given!r:.80}")
            case "missing":
                found.append(f"{key} must be given: it has no default")
            case "string_pattern_mismatch":
                found.append(f"{key} must match the pattern {context['pattern']}, got {given!r:.80}")
            case "too_short" if any(_is_below(each["loc"], place) for place in places):
                pass  # its items are wrong, and have their own lines
            case "value_error":
                # Of a class, each message begins with the name of a setting; of a value, it follows its key.
                dot = "" if not key else f"{key}." if isinstance(given, dict) or is_dataclass(given) else f"{key} "
                found += [f"{dot}{message}" for message in context["error"].args]
            case "dataclass_type" | "dataclass_exact_type" | "dict_type" | "model_attributes_type":
                found.append(f"{key} must hold `key: value` lines, got {given!r:.80}")
            case _:
                allowed = each["msg"].replace("Input should be", "must be").replace("valid array", "valid list")
                allowed = re.sub("^(Tuple|String|List) should have", "must have", allowed)
                allowed = allowed.replace(" after validation", "")
                found.append(f"{key} {allowed}, got {given!r:.80}")
    return found


def _is_below(above: tuple[int | str, ...], place: tuple[int | str, ...]) -> bool:
    """Return whether a location is that of an item of another one."""
    return len(place) > len(above) and place[: len(above)] == above


def _tags(context: dict[str, Any]) -> list[str]:
    return [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]


class _Place(NamedTuple):
    """What a location of pydantic is in the settings."""

    key: str
    """Dotted key; of a plain union its own key, without what is below it."""
    section: str
    """The key of the section, with a dot."""
    owner: Any
    """Class that holds the key."""
    choices: dict[str, Any]
    """Variants of the union that the section is, by tag."""
    discriminator: str
    """Field that names the variant of the section."""
    tag: str
    """Field that names the variant of the key itself."""
    tags: tuple[str, ...]
    """Its values."""
    members: tuple[Any, ...]
    """Types of the plain union, without a discriminator, that the location is in; empty: in none."""
    depth: int
    """Number of the parts of the location up to the key."""


def _locate(settings: Any, location: Sequence[int | str], at: str) -> _Place:
    """Return what a location of pydantic is."""
    key, section = at, ""
    owner, choices, discriminator = settings, {}, ""  # of the section that the next part is in
    union: dict[str, Any] = {}
    holder: tuple[Any, dict[str, Any], str] = (settings, {}, "")
    members: tuple[Any, ...] = ()
    depth = 0
    for part in location:
        if union and part in union:  # pydantic names the variant in the location
            owner, choices, union = union[str(part)], union, {}
            depth += 1
            continue
        if members := _members(owner, union):
            break
        depth += 1
        section, holder = (f"{key}." if key else ""), (owner, choices, discriminator)
        key = f"{key}[{part}]" if isinstance(part, int) else f"{section}{part}"
        field = fields_of(owner).get(str(part))
        owner, choices, discriminator, union = _item(owner), {}, "", {}
        if field is not None:
            owner, union = field.annotation, variants(field)
            discriminator = str(field.discriminator or "")
    return _Place(key, section, *holder, discriminator, tuple(union), members, depth)


def _item(annotation: Any) -> Any:
    """Return the type of the items of a list, or of the values of a mapping; None: it is neither."""
    inner = get_args(annotation)
    return (inner[-1] if get_origin(annotation) is dict else inner[0]) if inner else None


def _members(annotation: Any, union: dict[str, Any]) -> tuple[Any, ...]:
    """Return the types of a union without a discriminator, but None; empty: it is no such union."""
    if union or get_origin(annotation) not in (Union, UnionType):
        return ()
    inner = tuple(part for part in get_args(annotation) if part is not NoneType)
    return inner if len(inner) > 1 else ()


def _in_words(annotation: Any) -> str:
    """Return what a type is called in messages."""
    plain = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if annotation in plain:
        return plain[annotation]
    return f"a list of {_in_words(_item(annotation))}" if _item(annotation) else str(annotation)
