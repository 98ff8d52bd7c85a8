"""Write a file completely or not at all."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder, then rename that file to `path`.

    A reader of `path` finds the old content or the new content, never a part. If `write` raises, the temporary file is
    removed and `path` keeps its old content. Nothing is synced to the disk: a power failure can lose the
    new content.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # no other process has it, on any machine
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
