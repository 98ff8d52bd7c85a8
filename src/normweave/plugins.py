"""Heads, experts, layouts, sources and outputs of other packages, found by their entry points.

A package offers, for example, a head by an entry point of the group `normweave.heads`. Only packages that are installed
are found, and nothing in a bundle or a data set can name a module. An entry that cannot be used is left out with its
reason, so that a faulty plug-in breaks nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache, reduce
from importlib.metadata import EntryPoint, entry_points
from operator import or_
from typing import Any, Literal, NamedTuple, get_args

from normweave.errors import MissingError
from normweave.validation import DISCRIMINATOR

log = logging.getLogger(__name__)

KEY = "plugins"
"""What the record of a bundle holds of the plug-ins that it needs."""
Group = Literal["heads", "experts", "layouts", "sources", "outputs"]
GROUPS: tuple[Group, ...] = get_args(Group)


class Plugin(NamedTuple):
    """An entry point of another package.

    Attributes:
        name: of the entry point: the one that the settings of a head or an expert have, the name of a layout, or the
            `type` of a source or an output.
        package, version: of the distribution that has it.
        value: what it loads; None if it cannot be used.
        reason: why it cannot be used; None if it can.
    """

    group: Group
    name: str
    package: str
    version: str
    value: Any
    reason: str | None

    @property
    def origin(self) -> str:
        """The package with its version."""
        return f"{self.package} {self.version}"


_unused: dict[tuple[Group, str, str], str] = {}
"""Why plug-ins are not used that could be imported, by group, name and package."""


@cache
def found(group: Group) -> tuple[Plugin, ...]:
    """Return the entry points of a group, sorted by name; each is loaded once in a process."""
    entries = sorted(entry_points(group=f"normweave.{group}"), key=lambda entry: (entry.name, _package(entry)))
    return tuple(_load(group, entry) for entry in entries)


def usable(
    group: Group, *, known: tuple[str, ...] = (), of: type[Any] | None = None, has: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return what the entry points of a group load, by name.

    Args:
        known: names of this package, which no plug-in replaces.
        of: class that each must be, or be derived from.
        has: names that each must have.
    """
    chosen: dict[str, Any] = {}
    for plugin in found(group):
        reason = plugin.reason
        if plugin.name in known:
            reason = f"the name {plugin.name} is one of normweave itself"
        elif plugin.name in chosen:
            reason = f"another package has the name {plugin.name}, too"
        elif reason is None and of is not None and not _is(plugin.value, of):
            reason = f"it is no {of.__name__}"
        elif reason is None and (lacking := [name for name in has if not hasattr(plugin.value, name)]):
            reason = f"it has no {' and no '.join(lacking)}"
        if reason is None:
            chosen[plugin.name] = plugin.value
            continue
        key = group, plugin.name, plugin.package
        if key not in _unused:
            log.warning("The plug-in %s of %s is not used: %s.", plugin.name, plugin.origin, reason)
        _unused[key] = reason
    return chosen


def extended(union: Any, group: Group, *, of: type[Any], known: tuple[str, ...] = ()) -> Any:
    """Return a union of classes of settings with those of the plug-ins of a group.

    Args:
        of: their base class.
        known: further names that no plug-in replaces.
    """
    own = tuple(getattr(one, DISCRIMINATOR) for one in get_args(union))
    return reduce(or_, usable(group, known=(*own, *known), of=of).values(), union)


def listed() -> list[dict[str, str | None]]:
    """Return all plug-ins as JSON values, with the reason why one is not used."""
    return [
        {
            "group": group,
            "name": plugin.name,
            "package": plugin.package,
            "version": plugin.version,
            "reason": plugin.reason or _unused.get((group, plugin.name, plugin.package)),
        }
        for group in GROUPS
        for plugin in found(group)
    ]


def recorded(config: Any) -> dict[str, Any]:
    """Return what a bundle records of the plug-ins whose head and expert its settings name; empty if there are none."""
    variants: tuple[tuple[Group, str], ...] = (
        ("heads", config.model),
        ("experts", getattr(getattr(config.head, "expert", None), DISCRIMINATOR, "")),
    )
    needed = [
        {"group": group, "name": plugin.name, "package": plugin.package, "version": plugin.version}
        for group, variant in variants
        for plugin in found(group)
        if plugin.name == variant and plugin.reason is None
    ]
    return {KEY: needed} if needed else {}


def check(record: Mapping[str, Any], *, where: object) -> None:
    """Check that the plug-ins that a bundle needs are installed; older bundles need none.

    Raises:
        MissingError: one is not.
    """
    for one in record.get(KEY, ()):
        plugin = next((each for each in found(one["group"]) if each.name == one["name"]), None)
        if plugin is None:
            raise MissingError(
                f"{where} needs the plug-in {one['name']} ({one['group']}) of {one['package']} {one['version']}, which "
                f"is not installed: pip install {one['package']}"
            )
        if plugin.reason is not None:
            raise MissingError(
                f"{where} needs the plug-in {plugin.name} of {plugin.origin}, which failed: {plugin.reason}"
            )


def _is(value: Any, of: type[Any]) -> bool:
    return issubclass(value, of) if isinstance(value, type) else isinstance(value, of)


def _package(entry: EntryPoint) -> str:
    return "" if entry.dist is None else entry.dist.name


def _load(group: Group, entry: EntryPoint) -> Plugin:
    version = "" if entry.dist is None else entry.dist.version
    try:
        return Plugin(group, entry.name, _package(entry), version, entry.load(), None)
    except (Exception, SystemExit) as error:  # of any type: it is the code of others
        return Plugin(group, entry.name, _package(entry), version, None, f"{type(error).__name__}: {error}")
