"""Settings from YAML files and from `a.b=c`. One error names all mistakes by their dotted key.

YAML is read by the rules of YAML 1.2: `off` and `no` are text (PyYAML's 1.1 makes them `false`), `2e-4` is a number
(1.1 makes it text), dates are text. Types are strict: text is not converted to numbers, and numbers
are not converted to booleans.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from normweave.atomic import write_atomically
from normweave.config import Config, HeadConfig, PrepareConfig, RegionConfig, models
from normweave.data import regions
from normweave.errors import ConfigError, unknown
from normweave.validation import DISCRIMINATOR, fields_of, joined, mistakes, variants


class _Loader(yaml.SafeLoader):
    """Loader of safe YAML with the booleans and numbers of YAML 1.2. Duplicate keys are an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name that PyYAML reads
        first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in ("bool", "timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping and raise an error for a duplicate key, where PyYAML keeps the last value."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if duplicates := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate key: {', '.join(duplicates)}", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


_BOOL = r"(true|True|TRUE|false|False|FALSE)$"
_FLOAT = r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF|nan|NaN|NAN))$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(_BOOL), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"))


def model_config(name: str) -> HeadConfig:
    """Return the default settings of the head that the command line calls `name`.

    Raises:
        ConfigError: no such model.
    """
    if name not in models():
        raise unknown("model", name, models(), "A new one is added to HeadConfig in normweave/config/heads.py.")
    return models()[name]()


def with_model(config: Config, name: str) -> Config:
    """Return the same settings with the head of a model; settings of that head are kept.

    Features that are at their default become the default features of the new head.

    Raises:
        ConfigError: no such model.
    """
    head = model_config(name)
    if type(head) is type(config.head):
        return config
    default = config.features == Config().features
    return replace(config, head=head, features=type(head).features() if default else config.features)


def with_clip(config: Config, weights: str) -> Config:
    """Return the same settings with features of CLIP, and their input size unless `prepare` was changed."""
    config = override(config, [f"features.{DISCRIMINATOR}=open_clip", f"features.weights={weights}"])
    if config.prepare == PrepareConfig() and (side := config.features.side):
        config = replace(config, prepare=replace(config.prepare, height=side, width=side))
    return config


def as_dict(config: Config) -> dict[str, Any]:
    """Return the settings as JSON values; `from_dict` reads them back."""
    return dict(json.loads(json.dumps(asdict(config))))


def from_dict(values: Mapping[str, Any], *, source: str = "settings") -> Config:
    """Return settings from nested mappings. What is not named keeps its default, also which variant a section is.

    Args:
        source: where the values come from, for error messages.

    Raises:
        ConfigError: unknown keys, wrong types and values out of range, all together.
    """
    return _build(Config(), values, [], source=source)


def read(path: Path) -> Config:
    """Read settings from a YAML file; its top-level keys are the fields of `Config`.

    Raises:
        ConfigError: no such file, not YAML, or as in `from_dict`.
    """
    return from_dict(read_yaml(path, known=fields_of(Config)), source=str(path))


def read_yaml(path: Path, *, known: Iterable[str]) -> Mapping[Any, Any]:
    """Read a YAML file whose top level is a mapping.

    Args:
        known: the keys that it may have, for the error message.

    Raises:
        ConfigError: it cannot be read, is not YAML, has a duplicate key, or is no mapping.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read settings from {path}: {error}. Name a YAML file in UTF-8.") from error
    values = _parse(text, source=str(path))
    if not isinstance(values, Mapping):
        keys = ", ".join(known)
        raise ConfigError(f"{path} must hold `key: value` lines, with the keys {keys}; got {values!r:.60}.")
    return values


def read_regions(path: Path) -> tuple[RegionConfig, ...]:
    """Read the regions of interest from a file, which has the single key `regions` of the settings.

    Raises:
        ConfigError: as in `read`, the file has other keys, or a region is empty or very small.
    """
    values = read_yaml(path, known=["regions"])
    if list(values) != ["regions"]:
        raise ConfigError(
            f"{path} must have the key regions alone, got {', '.join(map(str, values)) or 'none'}. Write it with: "
            "normweave data roi. For other settings use a config file (-c)."
        )
    found = from_dict(values, source=str(path)).regions
    regions.check(found)
    return found


def write_regions(path: Path, found: Iterable[RegionConfig]) -> None:
    """Write regions of interest as JSON, for `read_regions`.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = regions_text(found)
    try:
        write_atomically(Path(path), lambda partial: partial.write_text(text, "utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot write the regions to {path}: {error}. Name another file.") from error


def regions_text(found: Iterable[RegionConfig]) -> str:
    """Return regions of interest as the JSON of such a file."""
    lines = ",\n".join(json.dumps(_given(asdict(each))) for each in found)
    return f'{{"regions": [\n{lines}\n]}}\n'


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings without what is empty."""
    nested = {key: _given(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in nested.items() if value and value != "none"}


def override(config: Config, assignments: Iterable[str], *, source: str = "--set") -> Config:
    """Return the same settings with some changed: `head.top_k=2`, `features.strides=[4, 8]`, `seed=1`.

    Another variant of a section starts from its own defaults. Values are YAML, except where a setting is text:
    there everything after `=` is the value.

    Args:
        source: the option that made them, for the message of an error.

    Raises:
        ConfigError: as in `from_dict`.
    """
    found: list[str] = []
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not (key and equals):
            found.append(f"{assignment!r} must be of the form a.b=c, for example head.top_k=2")
            continue
        try:
            values[key] = _value(key, text)
        except ConfigError as error:
            found.append(str(error))
    return _build(config, values, found, source=source)


def named(path: Path | None, assignments: Iterable[str]) -> frozenset[str]:
    """Return the dotted keys of the settings that a YAML file and assignments name, also with their default values.

    Raises:
        ConfigError: as in `read` and `override`.
    """
    values: dict[Any, Any] = {}
    if path is not None:
        values |= read_yaml(path, known=fields_of(Config))
        from_dict(values, source=str(path))  # for its errors
    for assignment in assignments:
        key, _, text = (part.strip() for part in assignment.partition("="))
        values[key] = _value(key, text)
    return frozenset(_keys(_nested(values)))


def _value(key: str, text: str) -> Any:
    """Return the value of an assignment to a dotted key."""
    return text if key in _texts(Config) else _parse(text, source=key)


def _keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _build(base: Config, values: Mapping[str, Any], found: list[str], *, source: str) -> Config:
    """Return `base` with other values, or raise one error for these and for the mistakes `found` before."""
    merged = _merged(base, _nested(values))
    checked = base
    try:
        # As JSON, pydantic's strict mode takes lists for tuples and mappings for classes.
        checked = TypeAdapter(Config).validate_json(json.dumps(merged, default=_plain))
    except ValidationError as error:
        found = found + mistakes(error, Config)
    if found:
        raise joined(found, source=source)
    return checked


def _nested(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return mappings in mappings from dotted keys; of two values for one key the later one is kept."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = str(key).split(".")
        inner = result
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[name] = _nested(value) if isinstance(value, Mapping) else value
    return result


def _merged(base: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `base` with the values over them, section by section."""
    result = {name: getattr(base, name) for name in fields_of(base)}
    for name, value in values.items():
        if is_dataclass(current := result.get(name)) and isinstance(value, Mapping):
            field = fields_of(base)[name]
            tag = value.get(str(field.discriminator))
            variant = variants(field).get(tag) if isinstance(tag, str) else None
            if variant is not None and tag != getattr(current, str(field.discriminator)):
                current = variant(**{str(field.discriminator): tag})  # another variant: with its own defaults
            result[name] = _merged(current, value)
        else:
            result[name] = value
    return result


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _texts(cls: Any, prefix: str = "") -> set[str]:
    """Return the dotted keys of all settings of type `str`."""
    keys = set()
    for name, field in fields_of(cls).items():
        if field.annotation is str:
            keys.add(prefix + name)
        for part in {*variants(field).values(), field.annotation}:
            keys |= _texts(part, f"{prefix}{name}.")
    return keys


def _parse(text: str, *, source: str) -> Any:
    # ValueError: PyYAML raises it for impossible numbers; RecursionError: thousands of nested brackets.
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
