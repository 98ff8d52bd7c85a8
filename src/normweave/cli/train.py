"""`normweave train`: train a detector on good images and write a bundle."""

import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from normweave.cli import options
from normweave.cli.terminal import ALL_NORMAL, UNREADABLE, Terminal, one_line, unreadable
from normweave.errors import ConfigError

if TYPE_CHECKING:
    from normweave.config import Config
    from normweave.detector import Detector

DARK_IMAGES = 64
"""Images, at most, that are looked at for a camera of 10 or 12 bits before the training."""


class TrainCommand(TyperCommand):
    """Adds the names of the models to the help of --model. They are read from the settings only for this command."""

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters of the command."""
        from normweave.config import Config, models

        params = super().get_params(ctx)
        (model,) = (param for param in params if isinstance(param, TyperOption) and param.name == "model")
        model.help, model.show_default = f"{', '.join(models())}.", Config().head.model
        return params


def train(
    terminal: Terminal,
    data: options.Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Model to train.", show_default=False)] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="Time for an image: fast (coarser grid, smaller memory bank), balanced (the default settings) or "
            "best (compares input sizes and tilings on the good images). Settings that you give are never changed."
        ),
    ] = "balanced",
    clip_weights: Annotated[
        str | None,
        typer.Option(
            help="Use features of CLIP: a file of open_clip weights, or a tag such as openai.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of settings.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting, such as seed=3 or prepare.height=320. Repeatable.", show_default=False),
    ] = None,
    category: options.Category = None,
    subclass: options.Subclass = None,
    regions: Annotated[
        Path | None,
        typer.Option(help="File of regions of interest, from 'normweave data roi'.", show_default=False),
    ] = None,
    subclass_from: Annotated[
        str | None,
        typer.Option(help="folder, column, filename-regex, auto (discover) or none.", show_default="folder"),
    ] = None,
    layout: options.Layout = None,
    false_alarm_rate: options.FalseAlarmRate = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize the backbone to int8: smaller and faster.")] = False,
    int8_check: Annotated[
        Path | None,
        typer.Option(
            help="Labelled test images (manifest or folder) for an accuracy check: if int8 loses more than 0.005 of "
            "an AUROC, no bundle is written.",
            show_default=False,
        ),
    ] = None,
    no_references: Annotated[
        bool, typer.Option("--no-references", help="Leave pictures of good images out of the bundle.")
    ] = False,
    cache: options.Cache = None,
    no_cache: options.NoCache = False,
    ray: options.Ray = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted training.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
) -> int:
    """Train on good images, compute the operating points and write a bundle.

    With --ray each machine of a cluster computes the features of some images, by tasks with --threads processors
    (default 1), and the statistics of these images that the model is fitted from. The features are sent to this
    machine, which then fits alone, for cross-validation (too few images for --set data.calibration=split), regions of
    interest and discovered subclasses. Models that are trained by gradient are trained on all machines: the batch is
    divided between them, and the gradients are averaged after each.
    """
    if ray is not None and no_cache:
        raise ConfigError("--no-cache is not possible with --ray, whose machines keep features there. Leave it out.")
    if cache is not None and no_cache:
        raise ConfigError("--cache names a folder that --no-cache does not use. Leave out one of them.")

    from normweave import bundle
    from normweave import settings as all_settings

    settings = compose_settings(
        config=config,
        model=model,
        clip_weights=clip_weights,
        regions=regions,
        category=category,
        subclass=subclass,
        subclass_from=subclass_from,
        false_alarm_rate=false_alarm_rate,
        seed=terminal.seed,
        assignments=[*(["outcome.references=false"] if no_references else []), *(set_ or [])],
    )
    bundle.check_target(output, overwrite=overwrite)
    if int8_check is not None and not int8:
        raise ConfigError("--int8-check needs --int8. Add --int8, or leave out --int8-check.")

    from normweave.budget import image_ms
    from normweave.data.remarks import dark
    from normweave.detector import Detector, samples_of

    labelled = None
    if int8_check is not None:
        from normweave.benchmark.evaluate import test_samples

        labelled = test_samples(settings, int8_check, None)
    samples = samples_of(data, settings, layout)
    for remark in dark(samples[:: -(-len(samples) // DARK_IMAGES) or 1]):
        terminal.remark(f"Remark: {remark}")
    target = Path(os.path.abspath(output))  # `.` has no name
    work = target.with_name(f"{target.name}.work")
    with ExitStack() as stack:
        progress = stack.enter_context(terminal.progress())
        sources = None
        if ray is not None:
            from normweave.bridges import ray_fit

            sources = stack.enter_context(ray_fit.sources(ray, threads=terminal.threads))
        detector = Detector.fit(
            data,
            config=settings,
            budget=budget,
            keep=all_settings.named(config, set_ or []),
            layout=layout,
            cache=cache,
            use_cache=not no_cache,
            work=work,
            resume=resume,
            device=terminal.device,
            sources=sources,
            progress=progress,
        )
        if int8:
            from normweave.benchmark.quantized import quantize_and_check

            detector = quantize_and_check(detector, labelled, progress=progress)
        detector.save(output, overwrite=overwrite)
    shutil.rmtree(work, ignore_errors=True)
    if sources is not None:
        terminal.remark(sources.summary)
    timed = image_ms(Detector.load(output, device=terminal.device), samples)
    return report(terminal, detector, output, timed)


def compose_settings(
    *,
    config: Path | None,
    model: str | None,
    clip_weights: str | None,
    regions: Path | None = None,
    category: list[str] | None,
    subclass: list[str] | None,
    subclass_from: str | None,
    false_alarm_rate: float | None,
    seed: int | None,
    assignments: list[str],
) -> "Config":
    """Return the settings of the file, overridden by the named options, overridden by --set."""
    from normweave import settings
    from normweave.config import Config

    result = Config() if config is None else settings.read(config)
    if model is not None:
        result = settings.with_model(result, model)
    if clip_weights is not None:
        result = settings.with_clip(result, clip_weights)
    if regions is not None:
        result = replace(result, regions=settings.read_regions(regions))
    if category:
        result = replace(result, data=replace(result.data, category=options.chosen(category)))
    if subclass:
        result = replace(result, data=replace(result.data, subclass=options.chosen(subclass)))
    if false_alarm_rate is not None:
        rate = f"outcome.false_alarm_rate={false_alarm_rate}"
        result = settings.override(result, [rate], source="--false-alarm-rate")
    named = {"data.subclass_from": subclass_from, "seed": seed}
    given = [f"{key}={value}" for key, value in named.items() if value is not None]
    return settings.override(result, given + assignments)


def report(terminal: Terminal, detector: "Detector", folder: Path, image_ms: float | None = None) -> int:
    """Print the training data and operating points of a saved detector, and return the exit code.

    Args:
        image_ms: measured time in ms from image file to verdict.
    """
    from rich.table import Table

    record = detector.record
    calibration: dict[str, Any] = {}
    if detector.calibration is not None:
        rows = detector.calibration.table(detector.subclass_names)
        calibration = detector.calibration.as_dict() | {"operating_points": rows}
    fusion = record.get("notes", {}).get("fusion") or []
    refused = [{"image_path": refusal.image_path, "error": refusal.reason} for refusal in detector.refused]
    if terminal.json:
        keys = ("model", "categories", "fit_images", "calibration_images", "seed")
        of_points = ("false_alarm_rate", "guarantee", "cross_validated", "operating_points")
        points = {key: calibration.get(key) for key in of_points}
        terminal.record(
            {"bundle": str(folder), "bundle_hash": detector.bundle_hash}
            | {key: record[key] for key in keys}
            | {key: record[key] for key in ("precision", "int8_check") if key in record}
            | points
            | {"fusion": fusion, "budget": record.get("budget"), "image_ms": image_ms}
            | {"suspects": record.get("suspects", []), "refused": refused}
        )
        return UNREADABLE if refused else ALL_NORMAL
    for image in refused:
        terminal.show(unreadable(**image))
    crossed, fitted_on = calibration.get("cross_validated", False), f"{record['fit_images']} good images"
    table = Table(
        "subclass",
        "good images" if crossed else "held-out images",
        "groups",
        "threshold",
        title_justify="left",
        box=None,
    )
    for point in calibration.get("operating_points", []):
        table.add_row(*point_row(point))
    done = (
        f"fitted and, by cross-validation, calibrated on the same {fitted_on}"
        if crossed
        else f"fitted on {fitted_on}, calibrated on {record['calibration_images']} others"
    )
    rate = calibration.get("false_alarm_rate", 0)
    # The name of the command line; `record` has that of the head.
    terminal.show(f"{folder}: {detector.config.head.model}, {done} for a false-alarm rate of {rate:g}", table)
    for category in fusion:
        terminal.show(weights(category))
    if "budget" in record:
        show_budget(terminal, record["budget"], image_ms)
    if detector.calibration is not None:
        terminal.show(detector.calibration.promise)
    for path, score in record.get("suspects", []):
        doubt = f"score {score:.4f}, far above the others of its subclass. Is it a good image?"
        terminal.show(one_line(f"suspect     {path}: {doubt}"))
    if record.get("precision") == "int8":
        terminal.show(int8_summary(record.get("int8_check")))
    terminal.remark(f"Next: normweave predict {folder} IMAGES…")
    return UNREADABLE if refused else ALL_NORMAL


def show_budget(terminal: Terminal, budget: dict[str, Any], image_ms: float | None) -> None:
    """Print what was chosen within the budget, and the time for an image."""
    from rich.table import Table

    size = f"input {budget['height']} x {budget['width']}, tiles beyond {budget['tile_beyond']:g} times this size"
    if budget["name"] == "fast":
        size += (
            f", {', '.join(budget['settings']) or 'no other setting: this model or your settings have no faster one'}"
        )
    timed = "" if image_ms is None else f"; {image_ms:.1f} ms an image on this machine"
    terminal.show(f"budget {budget['name']}: {size}{timed}")
    compared = [each for each in budget["candidates"] if each["auroc"] is not None]
    if compared:
        table = Table("input", "tiles beyond", "AUROC of synthetic defects", "relative cost", "ms", "", box=None)
        for each in compared:
            table.add_row(
                f"{each['height']} x {each['width']}",
                f"{each['tile_beyond']:g}",
                f"{each['auroc']:.4f}",
                f"{each['cost']:.2f}",
                f"{each['image_ms']:.1f}",
                "chosen" if each["chosen"] else "",
            )
        terminal.show(table)
    elif budget["name"] == "best":
        terminal.show("No other input size or tiling was compared: none fits the images, or there are too few groups.")


def weights(category: dict[str, Any]) -> str:
    """Return the weights of the experts in a category as text."""
    from normweave.validation import DISCRIMINATOR

    experts = ", ".join(f"{expert['name']} {expert['weight']:.2f}" for expert in category["experts"])
    source = "equal weights, since no good image could be held out"
    if category["synthetic_defects"]:
        source = (
            f"weights from {category['synthetic_defects']} synthetic defects in {category['held_out_images']} "
            "held-out good images"
        )
    return f"{category['category']}: {experts} ({source}; --set head.expert.{DISCRIMINATOR}=… uses one alone)"


def int8_summary(check: dict[str, Any] | None) -> str:
    """Return the result of the int8 accuracy check as text."""
    if check is None:
        return "int8: the accuracy was not checked, because no labelled images were given (--int8-check)."
    changes = [
        f"{name} {before:.4f} (float) {after:.4f} (int8)"
        for name, (before, after) in (
            ("image AUROC", check["image_auroc"]),
            ("pixel AUROC", check["pixel_auroc"]),
        )
        if before is not None
    ]
    return f"int8: on {check['images']} labelled images {', '.join(changes)}."


def point_row(point: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return the subclass, the number of its held-out normal images and groups, and the threshold with its pool."""
    subclass, category = point["subclass"], point.get("category")
    pool = ""
    if point["pooled"] and (subclass or category):
        pool = " (of its category)" if point.get("pooled_over") == "category" else " (of all together)"
    name = subclass or (f"{category}, all subclasses" if category else "all together")
    return name, str(point["normals"]), str(point["groups"]), f"{point['threshold']:.4f}{pool}"
