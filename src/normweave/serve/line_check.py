"""A test of each source, output and bundle of a view of a line, for `normweave doctor --line`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from normweave.detector import Detector
from normweave.errors import NormweaveError, reason
from normweave.serve import outputs, source
from normweave.serve.line_config import LineConfig
from normweave.serve.source import SourceConfig

SOURCE_SECONDS = 5.0
"""Longest wait for the first image of a source that is connected."""


@dataclass(frozen=True, kw_only=True)
class LineCheck:
    """Result of the test of a source, an output or the bundle of a view."""

    name: str
    type: str
    error: str | None
    """What is wrong, and what to do; None: it works."""
    text: str = "works"
    """What came from a source, or what a bundle is of."""


def check_outputs(config: LineConfig) -> list[LineCheck]:
    """Test the outputs of a line, all at the same time."""

    async def check() -> list[LineCheck]:
        return list(await asyncio.gather(*(_check(one, config.name) for one in config.outputs)))

    with _quiet():
        return asyncio.run(check())


def check_sources(config: LineConfig, *, seconds: float = SOURCE_SECONDS) -> list[LineCheck]:
    """Test the sources of a line, all at the same time; each may wait so long for its first image."""
    if not config.sources:
        return []
    with _quiet(), ThreadPoolExecutor(len(config.sources)) as pool:
        return list(pool.map(lambda one: _check_source(one, seconds), config.sources))


def check_bundles(config: LineConfig) -> list[LineCheck]:
    """Load the bundle of each view, one after the other, as the server does at its start."""
    found = []
    for view, path in config.view_bundles.items():
        name, error, text = f"view_bundles.{view}", None, ""
        try:
            detector = Detector.load(path, threads=1, device="cpu")
            categories = sorted({category for category, _ in detector.subclasses.values()})
            text = f"works, {detector.model} of {', '.join(categories)}"
        except NormweaveError as failure:
            error = " ".join(str(failure).split())
        found.append(LineCheck(name=name, type="bundle", error=error, text=text))
    return found


def _check_source(config: SourceConfig, seconds: float) -> LineCheck:
    text, error = "", None
    try:
        text = source.check(config, seconds=seconds)
    except Exception as failure:
        error = " ".join(str(failure).split()) or type(failure).__name__
    return LineCheck(name=config.name, type=config.type, error=error, text=text)


async def _check(config: outputs.OutputConfig, line: str) -> LineCheck:
    seconds, error = config.timeout_seconds, None
    try:
        (output,) = outputs.build([config], line=line)
    except NormweaveError as failure:
        return LineCheck(name=config.name, type=config.type, error=" ".join(str(failure).split()))
    try:
        async with asyncio.timeout(output.connect_seconds):
            await output.check()
    except TimeoutError:
        error = f"no answer within {output.connect_seconds:g} s. {output.cure}"
    except Exception as failure:
        text = " ".join(reason(failure).split())
        error = f"{text}." if output.cure.rstrip(".") in text else f"{text}. {output.cure}"
    finally:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(seconds):
                await output.close()
    return LineCheck(name=config.name, type=config.type, error=error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries from logging what the result of the test names anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
