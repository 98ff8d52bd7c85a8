"""A test of each source and output of a line, for `normweave doctor --line`."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from normweave.errors import NormweaveError
from normweave.serve import outputs, source
from normweave.serve.line_config import LineConfig
from normweave.serve.source import SourceConfig

SOURCE_SECONDS = 5.0
"""Longest wait for the first image of a source that is connected."""


@dataclass(frozen=True, kw_only=True)
class LineCheck:
    """Result of the test of a source or an output."""

    name: str
    type: str
    error: str | None
    """What is wrong, and what to do; None: it works."""
    text: str = "works"
    """What came from a source."""


def check_outputs(config: LineConfig) -> list[LineCheck]:
    """Test the outputs of a line, all at the same time.

    Raises:
        ConfigError: a secret cannot be read.
    """
    made = outputs.build(config.outputs, line=config.name)

    async def check() -> list[LineCheck]:
        return list(await asyncio.gather(*(_check(one) for one in made)))

    return asyncio.run(check())


def check_sources(config: LineConfig, *, seconds: float = SOURCE_SECONDS) -> list[LineCheck]:
    """Test the sources of a line, all at the same time; each may wait so long for its first image."""
    if not config.sources:
        return []
    with ThreadPoolExecutor(len(config.sources)) as pool:
        return list(pool.map(lambda one: _check_source(one, seconds), config.sources))


def _check_source(config: SourceConfig, seconds: float) -> LineCheck:
    text, error = "", None
    try:
        text = source.check(config, seconds=seconds)
    except Exception as failure:
        error = " ".join(str(failure).split()) or type(failure).__name__
    return LineCheck(name=config.name, type=config.type, error=error, text=text)


async def _check(output: outputs.Output) -> LineCheck:
    seconds, error = output.config.timeout_seconds, None
    try:
        async with asyncio.timeout(seconds):
            await output.check()
    except TimeoutError:
        error = f"no answer within {seconds:g} s. {output.cure}"
    except Exception as failure:
        text = str(failure) if isinstance(failure, NormweaveError) else f"{type(failure).__name__}: {failure}"
        error = f"{' '.join(text.split()).rstrip('.')}. {output.cure}"
    finally:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(seconds):
                await output.close()
    return LineCheck(name=output.config.name, type=output.config.type, error=error)
