"""A test of each output of a line, for `normweave doctor --line`."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from normweave.errors import NormweaveError
from normweave.serve import outputs
from normweave.serve.line_config import LineConfig


@dataclass(frozen=True, kw_only=True)
class OutputCheck:
    """Result of the test of an output."""

    name: str
    type: str
    error: str | None
    """What is wrong, and what to do; None: it works."""


def check_outputs(config: LineConfig) -> list[OutputCheck]:
    """Test the outputs of a line, all at the same time.

    Raises:
        ConfigError: a secret cannot be read.
    """
    made = outputs.build(config.outputs, line=config.name)

    async def check() -> list[OutputCheck]:
        return list(await asyncio.gather(*(_check(one) for one in made)))

    return asyncio.run(check())


async def _check(output: outputs.Output) -> OutputCheck:
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
    return OutputCheck(name=output.config.name, type=output.config.type, error=error)
