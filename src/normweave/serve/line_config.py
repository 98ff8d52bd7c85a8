"""`line.yaml`: sources, outputs and parts of a line. One error names all mistakes by their dotted key.

Mistakes of several settings together are in the same error, as far as none of these settings has a mistake of its own.

The `type` of an entry is the name of a module of `normweave.serve.sources` or `normweave.serve.outputs`, whose class
`Config` has its settings. A module, and the library that it uses, is imported only if an entry has its type.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import pkgutil
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_args

from pydantic import AfterValidator, TypeAdapter, ValidationError

from normweave import plugins
from normweave.errors import ConfigError, MissingError, unknown
from normweave.outcome.parts import PartRule, check_named, check_view_bundles
from normweave.settings import read_yaml
from normweave.validation import check, checked, fields_of, joined, mistakes

HOWTO = "Every setting is explained in docs/reference/line.md."
SECTIONS = ("sources", "outputs")
"""Lists of entries; each is a package of `normweave.serve`."""
EXTRAS = {"genicam": "genicam"}
"""Extra of the package that installs what a type uses, if it is not `line`."""
KEYS = ("name", "parts", "view_bundles", *SECTIONS)
"""Keys of the file."""

NAME_LENGTH = 60
"""Maximum number of characters of the name of a line."""
ATTEMPTS = 4
"""How often settings are read: as given, without wrong ones, and with values for the required ones among these."""

T = TypeVar("T")


def _entry_name(value: str) -> str:
    right = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", value)
    check(
        (
            right is not None,
            "must have 1 to 60 letters (a to z), digits, '.', '_' and '-', and begin with a letter or digit, "
            f"got {value!r:.80}",
        )
    )
    return value


EntryName = Annotated[str, AfterValidator(_entry_name)]


@checked
class EntryConfig:
    """Settings of every source and output."""

    type: str
    name: EntryName
    """Unique among the sources and outputs of the line; shown on the page, in metrics and in messages."""

    def __post_init__(self) -> None:
        check(*self.rules())

    def rules(self) -> list[tuple[bool, str]]:
        """Return the rules for several settings together, as `normweave.validation.check` takes them.

        A class that has more adds them to those of its base classes.
        """
        return []

    def contradictions(self, parts: PartRule) -> list[str]:
        """Return what does not fit to the parts of the line; each text begins with the name of a setting."""
        return []


@dataclass(frozen=True, kw_only=True)
class LineConfig:
    """The sources, outputs and parts of a line."""

    name: str = ""
    """Name of the line, as of `serve --name`."""
    parts: PartRule = field(default_factory=PartRule)
    """Parts of several views."""
    view_bundles: dict[str, Path] = field(default_factory=dict)
    """The bundle of each view that has one of its own."""
    sources: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()


def read(path: Path) -> LineConfig:
    """Read a YAML file.

    Raises:
        ConfigError: it cannot be read, or has unknown keys, wrong types, or values out of range, all together.
        MissingError: the library of a source or an output is not installed.
    """
    values = read_yaml(path, known=KEYS)
    found = [str(unknown("key", str(key), KEYS, HOWTO)) for key in values if key not in KEYS]
    name = values.get("name", "")
    if not isinstance(name, str):
        found.append(f"name must be text, got {name!r:.80}")
    elif len(name) > NAME_LENGTH or not name.isprintable():
        found.append(f"name must have at most {NAME_LENGTH} printable characters, got {name[:80]!r}")
    parts = values.get("parts")
    rule = _checked(PartRule, {} if parts is None else parts, "parts", found)
    bundles = _view_bundles(values.get("view_bundles"), rule, found)
    entries = {section: _entries(section, values.get(section), rule, found) for section in SECTIONS}
    names = Counter(name for section in SECTIONS for name in _names(values.get(section)))
    if repeated := [each for each, count in names.items() if count > 1]:
        found.append(f"name must be unique among sources and outputs, got {', '.join(repeated)} more than once")
    if found:
        raise joined(found, source=str(path))
    assert rule.settings is not None  # there are no mistakes
    return LineConfig(
        name=name,
        parts=rule.settings,
        view_bundles=bundles,
        sources=tuple(entries["sources"]),
        outputs=tuple(entries["outputs"]),
    )


def types(section: str) -> list[str]:
    """Return the values of `type` in a section."""
    return sorted({*_own(section), *_others(section)})


def load(section: str, type: str) -> Any:
    """Return the module of a type: of this package, or of a plug-in.

    Raises:
        MissingError: its library is not installed.
    """
    others = _others(section)
    if type in others:
        return others[type]
    try:
        return importlib.import_module(f"normweave.serve.{section}.{type}")
    except ImportError as error:
        raise MissingError(
            f"{section} of type {type} need {error.name}, which is not installed: "
            f'pip install "normweave[{EXTRAS.get(type, "line")}]"'
        ) from error


def _own(section: str) -> tuple[str, ...]:
    package = importlib.import_module(f"normweave.serve.{section}")
    return tuple(module.name for module in pkgutil.iter_modules(package.__path__))


def _others(section: str) -> dict[str, Any]:
    if section == "sources":
        return plugins.usable("sources", known=_own(section), has=("Config", "frames"))
    return plugins.usable("outputs", known=_own(section), has=("Config", "Output"))


class _Checked(NamedTuple, Generic[T]):
    """Settings, and which of them have mistakes of their own."""

    settings: T | None
    """Without the wrong ones; None: then there are mistakes of several settings, or one that is required is wrong."""
    wrong: frozenset[str]
    """Names of the settings with mistakes of their own."""

    def true(self, texts: Sequence[str]) -> list[str]:
        """Return the texts that name no setting with a mistake of its own: its value is not known.

        No text is about the setting `name`, which is a word of them.
        """
        wrong = self.wrong - {"name"}
        return [text for text in texts if not any(re.search(rf"\b{re.escape(name)}\b", text) for name in wrong)]


def _names(values: Any) -> list[str]:
    """Return the names of the entries of a section, also of those with mistakes."""
    given = [one.get("name") for one in values if isinstance(one, Mapping)] if isinstance(values, list) else []
    return [name for name in given if isinstance(name, str)]


def _view_bundles(values: Any, parts: _Checked[PartRule], found: list[str]) -> dict[str, Path]:
    """Return the bundle of each view, and add the mistakes to `found`."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        found.append(f"view_bundles must hold `view: folder of a bundle` lines, got {values!r:.80}")
        return {}
    bundles = {}
    for view, path in values.items():
        if not (isinstance(view, str) and view and isinstance(path, str) and path):
            found.append(f"view_bundles must hold `view: folder of a bundle` lines, got {view!r}: {path!r:.80}")
            continue
        bundles[view] = Path(path)
    if parts.settings is not None and bundles and "views" not in parts.wrong:
        views = parts.settings.views
        found += check_view_bundles(bundles, views, what="view_bundles", of="parts.views")
        found += check_named(views, what="view_bundles", of="parts.views")
    return bundles


def _entries(section: str, values: Any, parts: _Checked[PartRule], found: list[str]) -> list[EntryConfig]:
    """Return the entries of a section, and add their mistakes to `found`."""
    if values is None:
        return []
    if not isinstance(values, list):
        found.append(f"{section} must be a list, got {values!r:.80}")
        return []
    entries: list[EntryConfig] = []
    for place, value in enumerate(values):
        at = f"{section}[{place}]"
        if not isinstance(value, Mapping) or "type" not in value:
            found.append(
                f"{at} must hold `key: value` lines, also type ({', '.join(types(section))}), got {value!r:.80}"
            )
            continue
        if value["type"] not in types(section):
            found.append(str(unknown(f"{at}.type", str(value["type"]), types(section), HOWTO)))
            continue
        entry: _Checked[EntryConfig] = _checked(load(section, value["type"]).Config, value, at, found)
        if entry.settings is not None:
            entries.append(entry.settings)
            if parts.settings is not None:
                texts = entry.true(entry.settings.contradictions(parts.settings))
                found += [f"{at}.{text}" for text in parts.true(texts)]
    return entries


def _checked(config: type[T], value: Any, at: str, found: list[str]) -> _Checked[T]:
    """Return the settings, and add the mistakes to `found`, also those of several settings together."""
    reader, wrong, rest = TypeAdapter(config), set[str](), value
    for _ in range(ATTEMPTS):
        checked = _Checked[T](None, frozenset(wrong))
        try:
            # As JSON, pydantic's strict mode takes lists for tuples and mappings for classes.
            return checked._replace(settings=reader.validate_json(json.dumps(rest, default=str)))
        except ValidationError as error:
            texts = mistakes(error, config, at=at, howto=HOWTO)
            found += [text for text in checked.true(texts) if text not in found]
            # pydantic compares settings with each other only if each of them is right.
            rest, names = _corrected(config, rest, error)
        if not names:
            break
        wrong |= names
    return _Checked(None, frozenset(wrong))


def _corrected(config: type[T], value: Any, error: ValidationError) -> tuple[Any, set[str]]:
    """Return a copy of settings with right values for those with a mistake of their own, and the names of these.

    A wrong one is left out; one that is required has any value.
    """
    rest, names = copy.deepcopy(value), set[str]()
    for each in error.errors(include_url=False):
        place = each["loc"]
        holder: Any = None
        inner, name = rest, ""
        for part in place:  # those that are no key are items of a list, or the variant of a union
            if isinstance(inner, Mapping) and part in inner:
                holder, name = inner, str(part)
                inner = inner[part]
        field = fields_of(config).get(str(place[0])) if len(place) == 1 else None
        if (each["type"] == "missing" and isinstance(inner, dict)) or (field is not None and field.is_required()):
            choices = get_args(field.annotation) if field is not None else ()
            (inner if each["type"] == "missing" else holder)[place[-1]] = choices[0] if choices else "x"
            names.add(str(place[-1]))
        elif holder is not None and not (isinstance(inner, Mapping) and name != place[-1]):
            del holder[name]
            names.add(name)
    return rest, names


def login_rules(config: Any) -> list[tuple[bool, str]]:
    """Return the rules for `username`, `password_env` and `password_file` of settings."""
    named = "password_env" if config.password_env else "password_file" if config.password_file else ""
    return [
        (
            not (config.password_env and config.password_file),
            f"password_env and password_file are both given, got {config.password_env!r} and "
            f"{config.password_file!r}. Keep one of them",
        ),
        (
            bool(config.username) or not named,
            f"{named} has no effect without username. Give username too, or leave {named} out",
        ),
    ]


def secret(name: str, *, env: str, file: str) -> str | None:
    """Return a secret from an environment variable or a file, without white space around it; None: neither is named.

    Args:
        name: of the setting, for error messages, which never hold the secret.
        env: name of the variable; empty: none.
        file: path, relative to the working directory; empty: none.

    Raises:
        ConfigError: the variable is not set, the file cannot be read, or the secret is empty.
    """
    if env and file:
        raise ConfigError(f"{name}_env and {name}_file are both given. Keep one of them.")
    if not (env or file):
        return None
    if env:
        value, where = os.environ.get(env, ""), f"The environment variable {env}, named by {name}_env,"
    else:
        where = f"The file {file}, named by {name}_file,"
        try:
            value = Path(file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} cannot be read: {error}.") from error
    if not value.strip():
        raise ConfigError(f"{where} is not set or empty. Put the secret there.")
    return value.strip()
