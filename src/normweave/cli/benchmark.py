"""`normweave benchmark`: run a plan of methods × data × seeds and write its table."""

from pathlib import Path
from typing import Annotated

import typer

from normweave.cli import options
from normweave.cli.terminal import ALL_NORMAL, Terminal
from normweave.errors import ConfigError


def benchmark(
    terminal: Terminal,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="The plan.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("results"),
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of the data sets.", show_default="NORMWEAVE_DATA, else ../shared/data"),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="The number of runs at the same time. They share the cores.")] = 1,
    cache: options.Cache = None,
    ray: options.Ray = None,
) -> int:
    """Run a benchmark plan and write its table. Finished runs are not repeated.

    Each run has --threads threads, or else its share of the cores. With --ray each run is a task with --threads
    processors (default 1) on a cluster whose nodes have the images. Scores depend on the number of threads in the last
    digits.
    """
    if ray is not None and jobs != 1:
        raise ConfigError("--jobs is not possible with --ray, which uses all processors of the cluster. Leave it out.")

    from normweave.benchmark.run import run

    with terminal.progress() as progress:
        rows = run(
            plan,
            output=output,
            root=root,
            jobs=jobs,
            cache=cache,
            ray=ray,
            threads=terminal.threads,
            progress=progress,
        )
    table = output / f"{plan.stem}.md"
    if terminal.json:
        terminal.record({"table": str(table), "rows": rows})
    else:
        terminal.show(table.read_text("utf-8"))
    return ALL_NORMAL
