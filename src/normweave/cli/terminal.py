"""Options of every command, output to the terminal, and exit codes.

Results go to stdout, remarks and progress to stderr. With --json, stdout is JSON only. An error is then
`{"error": ..., "exit_code": ...}`.
"""

import inspect
import json as json_text
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from normweave.errors import MissingError, NormweaveError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from normweave.types import Progress

ALL_NORMAL = 0
NOT_NORMAL = 1
UNREADABLE = 4
BUG = 70
INTERRUPTED = 130
PIPE_CLOSED = 141

_PANEL = "Every command"


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """The options of every command, and its output."""

    json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_PANEL)] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print no remarks and no progress.", rich_help_panel=_PANEL)
    ] = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log more, and print tracebacks.", rich_help_panel=_PANEL)
    ] = False
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of all random numbers.", rich_help_panel=_PANEL)] = None
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda or cuda:N. For a bundle also openvino or openvino:GPU.",
            rich_help_panel=_PANEL,
        ),
    ] = "auto"
    threads: Annotated[int | None, typer.Option(min=1, help="The number of CPU threads.", rich_help_panel=_PANEL)] = (
        None
    )

    def record(self, values: dict[str, Any]) -> None:
        """Print one JSON object on one line of stdout."""
        typer.echo(json_text.dumps(values, allow_nan=False, ensure_ascii=False))

    def show(self, *parts: "RenderableType") -> None:
        """Print text and tables to stdout."""
        for part in parts:
            if isinstance(part, str):
                typer.echo(part)
                continue
            # Rich exits with code 1 at a closed pipe, but here 1 means an anomalous image: print by typer.echo.
            console = _console(stderr=False)
            width = console.measure(part, options=console.options.update_width(1000)).maximum
            console.width = max(console.width, width)  # never truncate a number
            with console.capture() as text:
                console.print(part)
            typer.echo(text.get(), nl=False)

    def remark(self, text: str) -> None:
        """Print a remark to stderr, unless --quiet."""
        if not self.quiet:
            _console(stderr=True).print(text, soft_wrap=True, style="dim")

    @contextmanager
    def progress(self) -> "Iterator[Progress | None]":
        """Yield a progress callback that draws bars on stderr, or None if stderr is no terminal."""
        console = _console(stderr=True)
        if self.quiet or not console.is_terminal:
            yield None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bars:
            tasks = {}

            def report(task: str, done: int, total: int) -> None:
                if task not in tasks:
                    tasks[task] = bars.add_task(task)
                bars.update(tasks[task], completed=done, total=total)

            yield report


def command(
    app: typer.Typer, name: str, function: Callable[..., int], *, cls: type[TyperCommand] | None = None
) -> None:
    """Register `function(terminal, **own) -> exit code` as a command with its own and the common options."""
    common = fields(Terminal)

    def call(**values: Any) -> None:
        terminal = Terminal(**{option.name: values.pop(option.name) for option in common})
        if terminal.threads is not None:
            _limit_threads(terminal.threads)
        raise typer.Exit(_exit_code(terminal, lambda: function(terminal, **values)))

    keyword = inspect.Parameter.KEYWORD_ONLY
    _, *own = inspect.signature(function, eval_str=True).parameters.values()
    parameters = [parameter.replace(kind=keyword) for parameter in own]
    parameters += [
        inspect.Parameter(option.name, keyword, annotation=option.type, default=option.default) for option in common
    ]
    # Typer reads the signature and the annotations.
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__doc__ = function.__doc__
    app.command(name, cls=cls)(call)


def _exit_code(terminal: Terminal, work: Callable[[], int]) -> int:
    """Call `work` and return its exit code. An exception is printed and never becomes 1: that is a verdict."""
    logging.basicConfig(level=logging.INFO if terminal.verbose else logging.WARNING)
    try:
        return work()
    except NormweaveError as error:
        return _fail(terminal, str(error), error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "normweave":
            raise
        message = f'This command needs {package}, which is not installed: pip install "normweave[train]"'
        return _fail(terminal, message, MissingError.exit_code)
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does. The interpreter flushes stdout at exit: redirect it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        return _fail(terminal, f"{error}. Check the path, its permissions and the free space of the disk.", 2)
    except KeyboardInterrupt:
        return _fail(terminal, "Interrupted.", INTERRUPTED)
    except Exception as error:
        traceback.print_exc()
        return _fail(terminal, f"A bug in normweave: {type(error).__name__}: {error}. Please report it.", BUG)


def _fail(terminal: Terminal, message: str, exit_code: int) -> int:
    if terminal.verbose and exit_code != BUG:
        traceback.print_exc()
    if terminal.json:
        terminal.record({"error": message, "exit_code": exit_code})
    else:
        from rich.text import Text

        _console(stderr=True).print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=True)
    return exit_code


def _limit_threads(threads: int) -> None:
    # The libraries of numpy and torch read this when they are loaded, which is later.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)


def _console(*, stderr: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False)
