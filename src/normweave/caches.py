"""Folders on disk of what can be computed again."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return the default folder of a cache, below XDG_CACHE_HOME or ~/.cache, as the XDG specification describes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normweave" / name
