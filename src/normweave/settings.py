"""Settings from YAML files and from `a.b=c`: every mistake is found, named by its key, and said at once.

YAML is read by the rules of YAML 1.2: `off` and `no` are words (PyYAML's 1.1 makes them `false`), `2e-4` is a
number (1.1 makes it text). Types are strict: text never becomes a number, nor a number a truth value.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from normweave.config import (
    AdaptedMoEConfig,
    CNCConfig,
    Config,
    DFMConfig,
    FeaturesConfig,
    HeadConfig,
    MeanShiftConfig,
    MemoryBankConfig,
    MSFlowConfig,
    OfflinePairConfig,
    PyramidFlowConfig,
    SimpleNetConfig,
    TimmConfig,
)
from normweave.errors import ConfigError, unknown

MODELS: dict[str, type[HeadConfig]] = {
    "adapted-moe": AdaptedMoEConfig,
    "cnc": CNCConfig,
    "simplenet": SimpleNetConfig,
    "patchcore": MemoryBankConfig,
    "dfm": DFMConfig,
    "msflow": MSFlowConfig,
    "pyramidflow": PyramidFlowConfig,
    "mean-shift": MeanShiftConfig,
}
"""Models by the name the command line has for them; PatchCore is the head `memory_bank`."""

UNIONS: dict[str, dict[str, Any]] = {
    section: {part.kind: part for part in get_args(union)}
    for section, union in (("features", FeaturesConfig), ("head", HeadConfig))
}
"""Sections that are of one kind or another, and their classes by `kind`, as settings files name them."""

HOWTO = "What each is for: normweave/config.py."


class _Loader(yaml.SafeLoader):
    """Safe YAML with the truth values and numbers of YAML 1.2, and no key twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML looks for this name
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:bool"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML does it, but a key that stands twice is a mistake, where PyYAML forgets the first."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(
                None, None, f"found twice in one place: {', '.join(twice)}", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


_BOOL = r"(true|True|TRUE|false|False|FALSE)$"
_FLOAT = (
    r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF|nan|NaN|NAN))$"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(_BOOL), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"))


def model_config(name: str) -> HeadConfig:
    """The head, with its defaults, of a model as the command line names it."""
    if name not in MODELS:
        raise unknown(
            "model", name, MODELS, "A new one joins HeadConfig in config.py and MODELS in settings.py."
        )
    return MODELS[name]()


def with_model(config: Config, name: str) -> Config:
    """The same settings with the head of a model, if they have another; CNC brings its own default features along.

    Raises:
        ConfigError: no such model.
    """
    head = model_config(name)
    if type(head) is type(config.head):
        return config
    features = config.features
    if isinstance(head, CNCConfig) and features == TimmConfig():
        features = OfflinePairConfig()
    return replace(config, head=head, features=features)


def as_dict(config: Config) -> dict[str, Any]:
    """The settings as JSON and YAML hold them; `from_dict` makes them whole again."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def from_dict(values: Mapping[str, Any], *, source: str = "settings") -> Config:
    """Settings from nested mappings; what is not named keeps its default.

    `head` needs its `kind`; features without one are timm's. `source` says in messages where the values come from.

    Raises:
        ConfigError: unknown keys, wrong types and values out of range, all together.
    """
    flat: dict[str, Any] = {}
    mistakes: list[str] = []
    sections = get_type_hints(Config)
    for name, value in values.items():
        if name not in sections or sections[name] is int:
            flat[str(name)] = value
        elif isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            mistakes.append(f"{name} must hold `key: value` lines, got {value!r}")
    return _build(flat, mistakes, source=source)


def read(path: Path) -> Config:
    """Settings from a YAML file; its top-level keys are the fields of `Config`.

    Raises:
        ConfigError: no such file, not YAML, or what `from_dict` refuses.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read settings from {path}: {error}. Name a YAML file in UTF-8.") from error
    values = _parse(text, source=str(path))
    if not isinstance(values, Mapping):
        known = ", ".join(get_type_hints(Config))
        raise ConfigError(f"{path} must hold `key: value` lines, with the keys {known}; got {values!r:.60}.")
    return from_dict(values, source=str(path))


def override(config: Config, assignments: Iterable[str]) -> Config:
    """The same settings with some changed: `head.top_k=2`, `features.strides=[4, 8]`, `seed=1`.

    Another `head.kind` or `features.kind` starts from its own defaults. Values are YAML, except where a setting is
    text: there the words after `=` are taken as they stand.

    Raises:
        ConfigError: as in `from_dict`.
    """
    mistakes: list[str] = []
    changes: dict[str, str] = {}
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if key and equals:
            changes[key] = text
        else:
            mistakes.append(f"{assignment!r} must be of the form a.b=c, for example head.top_k=2")
    flat = _flat(config)
    for section in UNIONS:
        kind = changes.pop(f"{section}.kind", flat[f"{section}.kind"])
        if kind != flat[f"{section}.kind"]:
            flat = {key: value for key, value in flat.items() if not key.startswith(f"{section}.")}
            flat[f"{section}.kind"] = kind
    types = _types(_classes(flat, []))
    for key, text in changes.items():
        try:
            flat[key] = text if types.get(key) is str else _parse(text, source=key)
        except ConfigError as error:
            mistakes.append(str(error))
    return _build(flat, mistakes, source="--set")


def _build(flat: Mapping[str, Any], mistakes: list[str], *, source: str) -> Config:
    """Settings from dotted keys; adds what is wrong to `mistakes` and raises them all."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # here, so that --help does not wait for it

    classes = _classes(flat, mistakes)
    types = _types(classes)
    sections: dict[str, dict[str, Any]] = {}
    parts: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        if section in classes and classes[section] is None:
            continue  # which settings there are depends on the kind
        if section not in classes:
            mistakes.append(str(unknown("setting", section, classes, HOWTO)))
            continue
        if key not in types:
            near = [known for known in types if known.startswith(f"{section}.")]
            mistakes.append(str(unknown("setting", key, near, HOWTO)))
            continue
        adapter = TypeAdapter(types[key], config=ConfigDict(strict=True, allow_inf_nan=False))
        try:
            checked = adapter.validate_python(tuple(value) if isinstance(value, list) else value)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"[{place}]" for place in first["loc"])
            allowed = first["msg"].replace("Input should be", "must be").replace("tuple", "list")
            mistakes.append(f"{key}{where} {allowed}, got {first['input']!r:.80}")
            continue
        if name:
            sections.setdefault(section, {})[name] = checked
        else:
            parts[section] = checked

    for section, chosen in sections.items():
        try:
            parts[section] = classes[section](**chosen)
        except ConfigError as error:
            mistakes.append(str(error))
    if len(mistakes) == 1:
        raise ConfigError(f"{source}: {mistakes[0]}")
    if mistakes:
        raise ConfigError(
            f"{source}: {len(mistakes)} mistakes:\n" + "\n".join(f"- {line}" for line in mistakes)
        )
    return Config(**parts)


def _classes(flat: Mapping[str, Any], mistakes: list[str]) -> dict[str, Any]:
    """The class of every section; None for one whose kind is not known, which is a mistake if it has settings."""
    classes: dict[str, Any] = get_type_hints(Config)
    for section, kinds in UNIONS.items():
        kind = flat.get(f"{section}.kind", "timm" if section == "features" else None)
        classes[section] = kinds.get(kind) if isinstance(kind, str) else None
        if kind is None and any(key.startswith(f"{section}.") for key in flat):
            mistakes.append(f"{section}.kind must be named, one of: {', '.join(sorted(kinds))}")
        elif kind is not None and classes[section] is None:
            mistakes.append(str(unknown(f"{section}.kind", str(kind), kinds, HOWTO)))
    return classes


def _types(classes: Mapping[str, Any]) -> dict[str, Any]:
    """The type of every setting by its dotted key; of a section of many kinds only if it is known which one."""
    types: dict[str, Any] = {}
    for section, part in classes.items():
        if is_dataclass(part):
            types |= {f"{section}.{name}": hint for name, hint in get_type_hints(part).items()}
        elif part is not None:
            types[section] = part
    return types


def _flat(config: Config) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, value in as_dict(config).items():
        flat |= (
            {f"{section}.{name}": inner for name, inner in value.items()}
            if isinstance(value, dict)
            else {section: value}
        )
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _parse(text: str, *, source: str) -> Any:
    # ValueError: PyYAML lets it out for impossible dates; RecursionError: thousands of nested brackets.
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
