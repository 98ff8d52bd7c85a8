"""The history of a bundle: one step for each command that changed it, as JSON values in its record. No torch."""

from __future__ import annotations

import getpass
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

KEY = "history"
"""Of the record."""


def step(action: str, *, images: int, parent: str | None, data_fingerprint: str | None, **more: Any) -> dict[str, Any]:
    """Return a step of the history.

    Args:
        action: trained, added, removed or calibrated.
        images: how many images it used.
        parent: the hash of the bundle that it changed.
        data_fingerprint: of these images, as `rows.fingerprint`.
        more: other JSON values.
    """
    return {
        "action": action,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "user": _user(),
        "command": _command(),
        "software": version("normweave"),
        "parent": parent,
        "images": images,
        "data_fingerprint": data_fingerprint,
        **more,
    }


def extended(record: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the history of a record with one more step."""
    return [*record.get(KEY, ()), dict(new)]


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container without a user database
        return None


def _command() -> str | None:
    """Return the command line if it is one of normweave, else None: that of another program is not ours to store."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    if name in ("__main__.py", "supervised.py") and Path(sys.argv[0]).parent.name == "normweave":
        name = "normweave"
    return shlex.join([name, *sys.argv[1:]]) if name in ("normweave", "normweave.exe") else None
