"""`normweave data from-reviews`: reviewed images of a server as a manifest, and the rates that the reviews measure."""

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normweave.cli.terminal import ALL_NORMAL, Terminal
from normweave.errors import ConfigError, DataError, MissingError

if TYPE_CHECKING:
    from rich.table import Table

    from normweave.serve.reviews import Export

SHOWN = {
    "normal": "good",
    "borderline": "good, close to the limit",
    "anomalous": "defective",
    "unknown": "unknown product",
}


def from_reviews(
    terminal: Terminal,
    source: Annotated[
        str,
        typer.Argument(help="Data folder of 'normweave serve', or the URL of a running server.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The manifest, .csv or .parquet.", show_default=False)],
    bundle: Annotated[
        Path | None,
        typer.Option(help="Compare operating points of this bundle. A server uses its own.", show_default=False),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(help="postgresql://… of the server instead of SQLite in the folder.", show_default=False),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder or s3://… of the images, if the server has them elsewhere (serve --images).",
            show_default=False,
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a token of the server.", show_default=False)
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="Regular expression on file names whose first group is the part: its images are one group.",
            show_default=False,
        ),
    ] = None,
    wrong_reviews: Annotated[float, typer.Option(help="Largest share of wrong decisions, 0 to 0.5.")] = 0.05,
    detection: Annotated[
        float, typer.Option(min=0, max=1, help="Detection rate that the proposed operating point must reach.")
    ] = 0.95,
) -> int:
    """Write the reviewed images of a server as a manifest, and print the rates that the reviews measure.

    Good images are marked train, defective ones test. The image files are copied beside the manifest. The proposed
    operating point is printed only.
    """
    from normweave.data.manifest import check_ending
    from normweave.data.stored import is_url
    from normweave.outcome.measured import check_wrong_reviews
    from normweave.outcome.parts import compile_pattern

    check_ending(output)
    check_wrong_reviews(wrong_reviews)
    try:
        from normweave import serve as server
        from normweave.serve import rates, reviews
        from normweave.serve.files import read_content
        from normweave.serve.object_files import ObjectFiles
        from normweave.serve.store import Store
    except ImportError as error:
        raise MissingError(
            f'Reading a server needs {error.name}, which is not installed: pip install "normweave[serve]"'
        ) from error
    pattern = compile_pattern(part)
    if source.startswith(("http://", "https://")):
        if bundle is not None or database is not None or images is not None:
            raise ConfigError(
                "--bundle, --database and --images are for a data folder; a server uses its own. Leave them out."
            )
        remote = reviews.ServerSource(source, "" if token_file is None else _token(token_file))
        with terminal.progress() as progress:
            exported = reviews.export(remote, output, part=pattern, progress=progress)
        measured = remote.read("/v1/reviews/rates", wrong_reviews=wrong_reviews, detection=detection)
        return _report(terminal, output, exported, measured, bundle=None)
    folder = Path(source)
    if database is None and not (folder / server.DATABASE).is_file():
        raise DataError(
            f"{folder} has no {server.DATABASE}, so it is no data folder of a server. Give the folder of serve --data, "
            "or the database (--database)."
        )
    files = images or str(folder / server.FILES)
    if not is_url(files) and not Path(files).is_dir():
        raise DataError(f"There is no folder {files} with the images. Give that of serve --images with --images.")
    read = ObjectFiles(files).read if is_url(files) else partial(read_content, Path(files))
    calibration = bundle_hash = None
    if bundle is not None:
        from normweave.detector import Detector

        detector = Detector.load(bundle, threads=terminal.threads, device=terminal.device)
        calibration, bundle_hash = detector.calibration, detector.bundle_hash
    with closing(Store.open(database or folder / server.DATABASE, migrate=False)) as store:
        with terminal.progress() as progress:
            exported = reviews.export(reviews.StoreSource(store, read), output, part=pattern, progress=progress)
        found = rates.measured_rates(
            store,
            bundle_hash or rates.newest_bundle(store),
            calibration=calibration,
            part=pattern,
            wrong_reviews=wrong_reviews,
            detection=detection,
        )
    return _report(terminal, output, exported, found.as_dict(), bundle=bundle)


def _token(path: Path) -> str:
    """Return the token of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_text("utf-8-sig").strip()
    except (OSError, UnicodeError) as error:
        raise DataError(f"The token cannot be read from {path}: {error}. Give a text file with it.") from error


def _report(terminal: Terminal, output: Path, exported: "Export", rates: dict[str, Any], *, bundle: Path | None) -> int:
    """Print what was written and measured, and return the exit code."""
    good = sum(sample.label == "normal" for sample in exported.samples)
    command = None
    if rates["proposed"] is not None and rates["proposed"] != rates["present"]:
        command = f"normweave calibrate {bundle or 'BUNDLE'} GOOD_IMAGES --false-alarm-rate {rates['proposed']:g}"
    if terminal.json:
        terminal.record(
            {
                "manifest": str(output),
                "good": good,
                "defective": len(exported.samples) - good,
                "reported": exported.reported,
                "removed": exported.removed,
                "contradictions": [one._asdict() for one in exported.contradictions],
                "rates": rates,
                "command": command,
            }
        )
        return ALL_NORMAL
    terminal.show(f"{output}: {good} good images (train), {len(exported.samples) - good} defective ones (test)")
    if exported.removed:
        terminal.show(f"{exported.removed} reviewed images are left out: retention has removed them.")
    for name, inspection, decisions in exported.contradictions:
        different = ", ".join(f"{decision} by {reviewer}" for reviewer, decision in decisions.items())
        image = f"{name} (inspection {inspection})" if name else f"inspection {inspection}"
        terminal.show(f"contradiction: {image}: {different}. The last one counts.")
    for line in measured_lines(rates):
        terminal.show(line)
    if rates["operating_points"]:
        terminal.show("", table(rates))
        terminal.show(_proposal(rates, command))
    if exported.reported > good / 2:
        terminal.remark(
            f"{exported.reported} of the {good} good images had been reported. Train with them; operating points that "
            "are computed from them alone are too high: calibrate with a random sample of good images."
        )
    return ALL_NORMAL


def measured_lines(rates: dict[str, Any]) -> list[str]:
    """Return the measured rates in words."""
    measured = rates["measured"]
    strata = "; ".join(
        f"{SHOWN[one['shown']]}: {one['reviewed']:,} of {one['images']:,}, {one['defective']:,} defective"
        for one in measured["strata"]
        if one["images"]
    )
    lines = [f"Reviewed of the {rates['inspections']:,} inspections of bundle {rates['bundle_hash'][:12]}: {strata}"]
    for name, key in (("Detection rate", "detection"), ("False-alarm rate", "false_alarms")):
        lines.append(f"{name}: {_rate(measured[key], reason=True)}")
        for further in ("by_defect", "by_subclass"):
            for part, rate in measured.get(f"{key}_{further}", {}).items():
                lines.append(f"  {part}: {_rate(rate)}")
    lines.append(
        f"In brackets the {100 * measured['level']:g} % interval, if at most {100 * measured['wrong_reviews']:g} % of "
        "the decisions are wrong, and the reviewed images of each verdict are a random part of them."
    )
    return lines


def table(rates: dict[str, Any]) -> "Table":
    """Return a table of the operating points, in percent."""
    from rich.table import Table

    result = Table("false alarms, at most", "threshold", "detection", "false alarms, measured", "", box=None)
    for point in rates["operating_points"]:
        rate = point["false_alarm_rate"]
        notes = [word for word in ("present", "proposed") if rates[word] == rate]
        cells = [_rate(point["detection"]), _rate(point["false_alarms"]), ", ".join(notes)]
        result.add_row(f"{100 * rate:g} %", f"{point['threshold']:.4g}", *cells)
    return result


def _proposal(rates: dict[str, Any], command: str | None) -> str:
    wanted = f"a measured detection rate of {100 * rates['detection']:g} %"
    if rates["proposed"] is None:
        return f"No operating point reaches {wanted}."
    if command is None:
        return f"The present operating point is the lowest that reaches {wanted}."
    return (
        f"The lowest that reaches {wanted} has {100 * rates['proposed']:g} % false alarms. It was chosen with the same "
        f"reviews, so that its detection rate is rather too good. It is not used until you do so: {command}"
    )


def _rate(rate: dict[str, Any], *, reason: bool = False) -> str:
    interval = f"({100 * rate['low']:.1f}–{100 * rate['high']:.1f} %)"
    if rate["estimate"] is None:
        return f"not measured {interval}. {rate['reason']}" if reason else f"not measured {interval}"
    return f"{100 * rate['estimate']:.1f} % {interval}"
