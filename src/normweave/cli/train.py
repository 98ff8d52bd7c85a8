"""`normweave train`: good images to a bundle."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normweave.cli import options
from normweave.cli.terminal import ALL_NORMAL, UNREADABLE, Terminal, command
from normweave.errors import ConfigError

if TYPE_CHECKING:
    from normweave.config import Config
    from normweave.detector import Detector


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "train")(train)


def train(
    terminal: Terminal,
    data: options.Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the new bundle.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="adapted-moe, cnc, simplenet, patchcore, dfm, msflow, pyramidflow or mean-shift.",
            show_default="adapted-moe",
        ),
    ] = None,
    clip_weights: Annotated[
        str | None,
        typer.Option(
            help="Features of CLIP: a file of open_clip weights, or a tag as openai.", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of settings.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting, as head.top_k=2; may be repeated.", show_default=False),
    ] = None,
    category: options.Category = None,
    subclass: options.Subclass = None,
    subclass_from: Annotated[
        str | None,
        typer.Option(help="folder, column, filename-regex, auto (discover) or none.", show_default="folder"),
    ] = None,
    layout: options.Layout = None,
    false_alarm_rate: options.FalseAlarmRate = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="A smaller, faster graph: its backbone computes in eight bits.")
    ] = False,
    int8_check: Annotated[
        Path | None,
        typer.Option(
            help="Test images of both labels, as a manifest or folder: no bundle if int8 loses over half a point of "
            "AUROC.",
            show_default=False,
        ),
    ] = None,
    cache: options.Cache = None,
    no_cache: options.NoCache = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted training.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the bundle that lies there.")
    ] = False,
) -> int:
    """Learn from good images, draw the operating points, write a bundle."""
    from normweave import bundle

    settings = compose(
        config=config,
        model=model,
        clip_weights=clip_weights,
        category=category,
        subclass=subclass,
        subclass_from=subclass_from,
        false_alarm_rate=false_alarm_rate,
        seed=terminal.seed,
        assignments=set_ or [],
    )
    bundle.check_place(output, overwrite=overwrite)
    if int8_check is not None and not int8:
        raise ConfigError("--int8-check looks what int8 costs. Ask for --int8 too, or leave it out.")

    from normweave.detector import Detector

    labelled = None
    if int8_check is not None:
        from normweave.benchmark.evaluate import test_samples

        labelled = test_samples(settings, int8_check, None)
    work = output.with_name(f"{output.name}.work")
    with terminal.progress() as progress:
        detector = Detector.fit(
            data,
            config=settings,
            layout=layout,
            cache=cache,
            use_cache=not no_cache,
            work=work,
            resume=resume,
            device=terminal.device,
            progress=progress,
        )
        if int8:
            from normweave.benchmark.quantized import quantize_and_check

            detector = quantize_and_check(detector, labelled, progress=progress)
        detector.save(output, overwrite=overwrite)
    shutil.rmtree(work, ignore_errors=True)
    return report(terminal, detector, output)


def compose(
    *,
    config: Path | None,
    model: str | None,
    clip_weights: str | None,
    category: list[str] | None,
    subclass: list[str] | None,
    subclass_from: str | None,
    false_alarm_rate: float | None,
    seed: int | None,
    assignments: list[str],
) -> "Config":
    """All settings: the file, then the named options, then --set; later ones win."""
    from normweave import settings
    from normweave.config import Config, PrepareConfig

    result = Config() if config is None else settings.read(config)
    if model is not None:
        result = settings.with_model(result, model)
    if clip_weights is not None:
        result = settings.override(result, ["features.kind=open_clip", f"features.weights={clip_weights}"])
        if result.prepare == PrepareConfig() and (side := result.features.side):
            result = replace(result, prepare=replace(result.prepare, height=side, width=side))
    if category:
        result = replace(result, data=replace(result.data, category=options.chosen(category)))
    if subclass:
        result = replace(result, data=replace(result.data, subclass=options.chosen(subclass)))
    named = {"data.subclass_from": subclass_from, "outcome.false_alarm_rate": false_alarm_rate, "seed": seed}
    given = [f"{key}={value}" for key, value in named.items() if value is not None]
    return settings.override(result, given + assignments)


def report(terminal: Terminal, detector: "Detector", folder: Path) -> int:
    """Say what a detector that was just saved was made from and where its lines lie; the exit code."""
    from rich.table import Table

    record = detector.record
    calibration: dict[str, Any] = {} if detector.calibration is None else detector.calibration.as_dict()
    refused = [{"image_path": refusal.image_path, "error": refusal.reason} for refusal in detector.refused]
    if terminal.json:
        kept = ("model", "categories", "fit_images", "calibration_images", "seed")
        points = {key: calibration.get(key) for key in ("false_alarm_rate", "operating_points")}
        terminal.record(
            {"bundle": str(folder), "bundle_hash": detector.bundle_hash}
            | {key: record[key] for key in kept}
            | {key: record[key] for key in ("precision", "int8_check") if key in record}
            | points
            | {"refused": refused}
        )
        return UNREADABLE if refused else ALL_NORMAL
    for image in refused:
        terminal.show(f"unreadable  {image['image_path']}: {image['error']}")
    table = Table("subclass", "held-out normals", "operating point", title_justify="left", box=None)
    for point in calibration.get("operating_points", []):
        table.add_row(*line(point))
    terminal.show(
        f"{folder}: {record['model']}, fitted on {record['fit_images']} good images and calibrated on "
        f"{record['calibration_images']} others, for a false-alarm rate of {calibration.get('false_alarm_rate', 0):g}",
        table,
    )
    if record.get("precision") == "int8":
        terminal.show(checked(record.get("int8_check")))
    terminal.remark(f"Next: normweave predict {folder} IMAGES…")
    return UNREADABLE if refused else ALL_NORMAL


def checked(check: dict[str, Any] | None) -> str:
    """What is known of the price of int8."""
    if check is None:
        return "int8: what it costs was not checked, for want of labelled images (--int8-check)."
    prices = [
        f"{name} {before:.4f} (float) {after:.4f} (int8)"
        for name, (before, after) in (
            ("image AUROC", check["image_auroc"]),
            ("pixel AUROC", check["pixel_auroc"]),
        )
        if before is not None
    ]
    return f"int8: on {check['images']} labelled images {', '.join(prices)}."


def line(point: dict[str, Any]) -> tuple[str, str, str]:
    """Whose line it is, how many held-out normals are theirs, and where it lies."""
    name, category = point["subclass"], point.get("category")
    borrowed = ""
    if point["pooled"] and (name or category):
        borrowed = " (of its category)" if point.get("pooled_over") == "category" else " (of all together)"
    shown = name or (f"{category}, all subclasses" if category else "all together")
    return shown, str(point["normals"]), f"{point['threshold']:.4f}{borrowed}"
