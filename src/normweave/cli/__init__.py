"""The command line. Each command is one module: it parses options, calls one function, prints and returns an exit code.

Not commands: `terminal` (options of every command, output, exit codes), `options` (options of several commands) and
`results` (result tables).
"""

from typing import Annotated

import typer

from normweave import __version__
from normweave.cli import (
    benchmark,
    bundle,
    calibrate,
    data,
    demo,
    doctor,
    drift,
    evaluate,
    predict,
    regions,
    reviews,
    serve,
    subclasses,
    train,
)
from normweave.cli.terminal import command, run

app = typer.Typer(
    name="normweave",
    help="Visual inspection that learns from good images only.",
    epilog=(
        "Exit codes: 0 done, all images normal; 1 an image is anomalous or unknown, or drift raised an alarm; "
        "2 wrong call or input; 3 a rate cannot be guaranteed or a check failed; 4 an image could not be read."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
command(app, "demo", demo.demo)
command(app, "train", train.train, cls=train.TrainCommand)
command(app, "evaluate", evaluate.evaluate)
command(app, "predict", predict.predict)
command(app, "calibrate", calibrate.calibrate)
command(app, "add-subclass", subclasses.add_subclass)
command(app, "remove-subclass", subclasses.remove_subclass)
command(app, "serve", serve.serve)
command(app, "drift", drift.drift)
data_app = typer.Typer(
    help="Check data sets, write manifests, export reviewed images, make synthetic images, draw regions.",
    no_args_is_help=True,
)
command(data_app, "check", data.check)
command(data_app, "manifest", data.manifest)
command(data_app, "from-reviews", reviews.from_reviews)
command(data_app, "make-textures", data.make_textures)
command(data_app, "roi", regions.roi)
app.add_typer(data_app, name="data")
bundle_app = typer.Typer(help="Show, compare and verify bundles, with their history.", no_args_is_help=True)
command(bundle_app, "show", bundle.show)
command(bundle_app, "diff", bundle.diff)
command(bundle_app, "verify", bundle.verify)
app.add_typer(bundle_app, name="bundle")
command(app, "doctor", doctor.doctor)
command(app, "benchmark", benchmark.benchmark)


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
    run(app)
