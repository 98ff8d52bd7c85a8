"""Options of every command, output to the terminal, and exit codes.

Results go to stdout, remarks and progress to stderr. With --json, stdout is JSON only. An error is then
`{"error": ..., "exit_code": ...}`.
"""

import inspect
import io
import json as json_text
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, TextIO

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
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


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
            help="auto, cpu, cuda or cuda:N. For a bundle also tensorrt, openvino or openvino:GPU.",
            rich_help_panel=_PANEL,
        ),
    ] = "auto"
    threads: Annotated[int | None, typer.Option(min=1, help="The number of CPU threads.", rich_help_panel=_PANEL)] = (
        None
    )

    def record(self, values: dict[str, Any]) -> None:
        r"""Print one JSON object on one line of stdout. What stdout cannot encode is escaped as JSON does (\u00e9)."""
        text = json_text.dumps(values, allow_nan=False, ensure_ascii=False)
        try:
            text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            text = json_text.dumps(values, allow_nan=False)
        _print(f"{text}\n")

    def show(self, *parts: "RenderableType") -> None:
        """Print text and tables to stdout. Control characters of a text are printed as escapes."""
        for part in parts:
            if isinstance(part, str):
                _print(f"{without_controls(part)}\n")
                continue
            # Rich exits with code 1 at a closed pipe, but here 1 means an anomalous image: let it write a text.
            console = _console(stderr=False)
            width = console.measure(part, options=console.options.update_width(1000)).maximum
            console.width = max(console.width, width)  # never truncate a number
            with console.capture() as text:
                console.print(part)
            _print(text.get())

    def remark(self, text: str) -> None:
        """Print a remark to stderr, unless --quiet."""
        if not self.quiet:
            _console(stderr=True).print(without_controls(text), soft_wrap=True, style="dim")

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


class CommandExit(SystemExit):
    """The end of a command with its exit code. Exit code 1 of any other end is not a verdict."""


def run(app: typer.Typer) -> None:
    """Run the command line and exit. Exit code 1 means that an image is not normal; no error ends with it."""
    # Read when torch is loaded, which is later. By default threads of OpenMP that wait keep their processors busy:
    # beside another program a training by gradient takes ten times as long (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _escape_unknown_characters()
    try:
        sys.exit(_exit_code(Terminal(), app))
    except CommandExit:
        raise
    except SystemExit as end:
        # Typer and Rich end with 1 where the reader has closed the pipe, as of `normweave --help | head -1`.
        if end.code == 1:
            end.code = PIPE_CLOSED
        raise


def command(
    app: typer.Typer, name: str, function: Callable[..., int], *, cls: type[TyperCommand] | None = None
) -> None:
    """Register `function(terminal, **own) -> exit code` as a command with its own and the common options."""
    common = fields(Terminal)

    def call(**values: Any) -> None:
        terminal = Terminal(**{option.name: values.pop(option.name) for option in common})
        if terminal.threads is not None:
            _limit_threads(terminal.threads)
        _escape_unknown_characters()
        logging.basicConfig(level=logging.INFO if terminal.verbose else logging.WARNING)
        raise CommandExit(_exit_code(terminal, lambda: function(terminal, **values)))

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
    try:
        return work()
    except NormweaveError as error:
        return _fail(terminal, str(error), error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "normweave":
            return _fail_with_bug(terminal, error)
        message = f'This command needs {package}, which is not installed: pip install "normweave[train]"'
        return _fail(terminal, message, MissingError.exit_code)
    except BrokenPipeError:
        _discard(sys.stdout)  # the reader has closed the pipe, as `head` does
        return PIPE_CLOSED
    except OSError as error:
        return _fail(terminal, f"{error}. Check the path, its permissions and the free space of the disk.", 2)
    except KeyboardInterrupt:
        return _fail(terminal, "Interrupted.", INTERRUPTED)
    except Exception as error:
        return _fail_with_bug(terminal, error)


def _fail_with_bug(terminal: Terminal, error: Exception) -> int:
    return _fail(terminal, f"A bug in normweave: {type(error).__name__}: {error}. Please report it.", BUG)


def _fail(terminal: Terminal, message: str, exit_code: int) -> int:
    """Print the message and return the exit code, which remains if nothing can be printed."""
    shown = False
    if terminal.json:
        try:
            terminal.record({"error": message, "exit_code": exit_code})
            shown = True
        except OSError:  # stdout is on a full disk, or closed
            _discard(sys.stdout)
    try:
        if terminal.verbose or exit_code == BUG:
            traceback.print_exc()
        if not shown:
            from rich.text import Text

            text = Text.assemble(("Error: ", "bold red"), without_controls(message))
            _console(stderr=True).print(text, soft_wrap=True)
    except OSError:
        _discard(sys.stderr)
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):  # there is no stdout if it was closed before the start
        _discard(sys.stdout)
    return exit_code


def _print(text: str) -> None:
    if sys.stdout is not None:  # it is None if it was closed before the start
        sys.stdout.write(text)
        sys.stdout.flush()


def _discard(stream: TextIO | None) -> None:
    """Send what is printed from now on, and what the stream still holds, nowhere: else the flush at exit fails."""
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _escape_unknown_characters() -> None:
    r"""Print characters that the terminal's encoding lacks, and file names that are not UTF-8, as escapes (\xe9)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _limit_threads(threads: int) -> None:
    # The libraries of numpy and torch read this when they are loaded, which is later.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)


def _console(*, stderr: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False)


def without_controls(text: str) -> str:
    r"""Return the text with control characters as escapes (\x1b), since a file name may hold orders for a terminal."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    r"""Return the text with control characters and line breaks as escapes (\n): a file name may hold them too."""
    return without_controls(text).replace("\n", "\\n")


def unreadable(image_path: str, error: str) -> str:
    """Return the line of an image that was left out, with its path also if the error does not name it."""
    return one_line(f"unreadable  {error if image_path in error else f'{image_path} {error}'}")
