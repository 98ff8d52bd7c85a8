"""Video files: each frame waits until it can be inspected, so none is lost. For trying a line without its camera."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

from normweave.errors import ConfigError
from normweave.serve.source import Frames, SourceConfig
from normweave.serve.stream import decoded
from normweave.validation import checked


@checked
class Config(SourceConfig):
    """A video file, read once from its beginning at each start of the server."""

    type: Literal["video"]
    path: str
    """Relative to the working directory of the server."""

    drops: ClassVar[bool] = False


def frames(config: Config, *, max_bytes: int, on_drop: Callable[[int], None]) -> Frames:
    """Yield the frames of the file; their time is that of the video."""
    if not Path(config.path).is_file():
        raise ConfigError(f"There is no video file {config.path}. Correct path of the source {config.name}.")
    yield from decoded(config.path, {}, live=False)
