"""The command line: each file is one verb that parses, calls one function, prints, and answers with an exit code."""

from typing import Annotated

import typer

from normweave import __version__
from normweave.cli import benchmark, calibrate, data, demo, doctor, evaluate, predict, serve, train

app = typer.Typer(
    name="normweave",
    help="Visual inspection that learns from good parts only.",
    epilog=(
        "Exit codes: 0 done, all normal; 1 something anomalous or unknown; 2 wrong call or input; "
        "3 a promise cannot be kept; 4 some images could not be read."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (demo, train, evaluate, predict, calibrate, serve, data, doctor, benchmark):
    verb.add_to(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normweave {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command that the arguments name."""
    app()
