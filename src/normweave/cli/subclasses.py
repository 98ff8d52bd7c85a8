"""`normweave add-subclass` and `normweave remove-subclass`: change one subclass of a bundle and nothing else."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normweave.cli import options
from normweave.cli.terminal import ALL_NORMAL, UNREADABLE, Terminal, unreadable

if TYPE_CHECKING:
    from normweave.detector import Detector

Category = Annotated[
    str | None,
    typer.Option(
        "--category", help="Category of the subclass; may be new. By default, data names it.", show_default=False
    ),
]
KnownCategory = Annotated[str, typer.Option("--category", help="Category of the subclass.", show_default=False)]
Name = Annotated[
    str | None,
    typer.Option("--subclass", help="Name of the subclass. By default, data names it.", show_default=False),
]
KnownName = Annotated[str, typer.Option("--subclass", help="Name of the subclass.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.", show_default=False)]
Check = Annotated[
    Path | None,
    typer.Option(help="Images whose scores are compared, beside those in the bundle.", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")]


def add_subclass(
    terminal: Terminal,
    bundle: options.Bundle,
    data: options.Data,
    output: Output,
    category: Category = None,
    subclass: Name = None,
    regions: Annotated[
        Path | None,
        typer.Option(help="File with the region of interest of a new category, from 'data roi'.", show_default=False),
    ] = None,
    check: Check = None,
    layout: options.Layout = None,
    overwrite: Overwrite = False,
) -> int:
    """Add a subclass from 5 to 50 good images, and write a new bundle. No other score changes by a bit.

    Without --category and --subclass, data is a manifest, and every subclass that it names is added. The training data
    is not needed. A new category may bring its region; a known one keeps that of the bundle. Exit
    code 3, and no bundle, if the score of a stored image that is routed as before has changed. Needs torch, as training
    does.
    """
    from normweave import settings
    from normweave.bundle import check_target
    from normweave.detector import Detector
    from normweave.errors import ConfigError

    if (category is None) != (subclass is None):
        raise ConfigError(
            "--category and --subclass belong together. Give both, or neither: then the manifest names the subclasses."
        )
    check_target(output, overwrite=overwrite)
    drawn = () if regions is None else settings.read_regions(regions)
    with terminal.progress() as progress:
        loaded = Detector.load(bundle, threads=terminal.threads)
        detector = loaded.with_subclass(
            data,
            category=category,
            subclass=subclass,
            regions=drawn,
            check=check,
            layout=layout,
            progress=progress,
        )
        detector.save(output, overwrite=overwrite)
    names = detector.subclass_names[len(loaded.subclass_names) :]
    refused = [{"image_path": each.image_path, "error": each.reason} for each in detector.refused]
    found = [_added(detector, name) for name in names]
    if terminal.json:
        result: dict[str, Any] = {"bundle": str(output), "bundle_hash": detector.bundle_hash}
        result |= found[0] if category is not None else {"subclasses": found}
        terminal.record(result | {"refused": refused})
        return UNREADABLE if refused else ALL_NORMAL
    for image in refused:
        terminal.show(unreadable(**image))
    for added in found:
        for path, other in added["routed_to_others"]:
            terminal.show(f"not used    {path}: it is nearer to {other} when it is held out")
        terminal.show(
            f"{output}: {added['subclass']} added, from {added['images']} good images of {added['groups']} groups"
        )
        if (point := added["operating_point"]) is not None:
            terminal.show(f"threshold {point['threshold']:.4f}. {point['promise']}")
    show_check(terminal, found[-1]["check"])
    terminal.remark(f"Next: normweave predict {output} IMAGES…")
    return UNREADABLE if refused else ALL_NORMAL


def _added(detector: "Detector", name: str) -> dict[str, Any]:
    """Return what is known of an added subclass, as JSON values."""
    point = None
    if (calibration := detector.calibration) is not None:
        rows = {row["subclass"]: row for row in calibration.table(detector.subclass_names)}
        own = calibration.added[detector.subclass_names.index(name) - len(calibration.subclass_names)].calibration
        point = rows[name] | {"guarantee": own.guarantee, "promise": own.promise}
    added: dict[str, Any] = detector.record["added"][name]
    return {"subclass": name, "operating_point": point} | added


def remove_subclass(
    terminal: Terminal,
    bundle: options.Bundle,
    category: KnownCategory,
    subclass: KnownName,
    output: Output,
    check: Check = None,
    layout: options.Layout = None,
    overwrite: Overwrite = False,
) -> int:
    """Remove a subclass that was added, and write a new bundle. No other score changes by a bit.

    Exit code 3, and no bundle, if the score of a stored image that did not use the subclass has changed. Needs
    torch, as training does.
    """
    from normweave.bundle import check_target
    from normweave.detector import Detector

    check_target(output, overwrite=overwrite)
    detector = Detector.load(bundle, threads=terminal.threads).without_subclass(
        category=category, subclass=subclass, check=check, layout=layout
    )
    detector.save(output, overwrite=overwrite)
    step = detector.record["history"][-1]
    if terminal.json:
        result = {"bundle": str(output), "bundle_hash": detector.bundle_hash, "subclass": step["subclass"]}
        terminal.record(result | {"check": step["check"]})
        return ALL_NORMAL
    terminal.show(f"{output}: {step['subclass']} removed")
    show_check(terminal, step["check"])
    return ALL_NORMAL


def show_check(terminal: Terminal, check: dict[str, Any]) -> None:
    """Print the comparison of scores before and after."""
    if check["tiles"] == 0:
        terminal.show("No score was compared: the bundle holds no images for this. Give some with --check.")
        return
    terminal.show(f"scores of {check['equal']} of {check['tiles']} other images are the same in every bit")
    for name, before, now in check["moved"]:
        moved = f"nearer to {now} than to {before}" if before != now else f"scored with a part of {before} before"
        terminal.show(f"changed     {name}: {moved}")
