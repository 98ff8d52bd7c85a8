"""The command line. Each command is one module: it parses options, calls one function, prints and returns an exit code.

Not commands: `terminal` (options of every command, output, exit codes), `options` (options of several commands) and
`results` (result tables).
"""

from typing import Annotated

import typer

from normweave import __version__
from normweave.cli import benchmark, calibrate, data, demo, doctor, evaluate, predict, serve, train

app = typer.Typer(
    name="normweave",
    help="Visual inspection that learns from good images only.",
    epilog=(
        "Exit codes: 0 done, all images normal; 1 an image is anomalous or unknown; 2 wrong call or input; "
        "3 a rate cannot be guaranteed or a check failed; 4 an image could not be read."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (demo, train, evaluate, predict, calibrate, serve, data, doctor, benchmark):
    module.add_to(app)


def _print_version(given: bool) -> None:
    if given:
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
    """Run the command line."""
    app()
