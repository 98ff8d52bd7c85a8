"""`normweave data`: look at data sets, and make one."""

from pathlib import Path
from typing import Annotated

import typer

from normweave.cli import options
from normweave.cli.terminal import ALL_NORMAL, Terminal, command

WRONG_INPUT = 2


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    verbs = typer.Typer(help="Look at data sets, and make one.", no_args_is_help=True)
    command(verbs, "check")(check)
    command(verbs, "manifest")(manifest)
    command(verbs, "make-textures")(textures)
    app.add_typer(verbs, name="data")


def check(terminal: Terminal, data: options.Data, layout: options.Layout = None) -> int:
    """Look at every image, count them and list all faults; exit code 2 if there is one.

    With --layout mvtec_ad, visa, btad or mpdd, the images are counted against the published numbers.
    """
    from normweave.config import DataConfig
    from normweave.data import layouts
    from normweave.data.manifest import check as find_faults
    from normweave.data.manifest import counts

    samples = layouts.read(data, DataConfig(), layout=layout)
    faults = find_faults(samples, layout=layout)
    if terminal.json:
        found = [
            {"kind": fault.kind, "path": None if fault.path is None else str(fault.path), "text": fault.text}
            for fault in faults
        ]
        terminal.record({"images": len(samples), "counts": counts(samples), "faults": found})
    else:
        for row in counts(samples):
            kind = "/".join(str(row[name]) for name in ("category", "subclass") if row[name])
            split = row["split"] or "to be divided"
            terminal.show(f"{kind}, {split}: {row['good']} good, {row['anomalous']} anomalous")
        for fault in faults:
            terminal.show(f"{fault.kind}: {fault.text}")
        terminal.show(f"{len(samples)} images, {len(faults)} faults")
    return WRONG_INPUT if faults else ALL_NORMAL


def manifest(
    terminal: Terminal,
    data: Annotated[
        list[Path],
        typer.Argument(help="Manifests (.csv, .parquet) or folders of images.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The table, .csv or .parquet.", show_default=False)
    ],
    category: options.Category = None,
    subclass: options.Subclass = None,
    layout: options.Layout = None,
) -> int:
    """Write what folders hold as one manifest: one row an image, to look at, to correct and to train on.

    Each folder is read in its own layout, unless --layout names one for all.
    """
    from normweave.config import DataConfig
    from normweave.data import layouts
    from normweave.data.joined import join
    from normweave.data.manifest import write_manifest

    everything = join([(str(folder), layouts.read(folder, DataConfig(), layout=layout)) for folder in data])
    selection = DataConfig(category=options.chosen(category), subclass=options.chosen(subclass))
    samples = layouts.choose(everything, selection)
    write_manifest(samples, output)
    if terminal.json:
        terminal.record({"manifest": str(output), "images": len(samples)})
    else:
        terminal.show(f"{output}: {len(samples)} images")
    return ALL_NORMAL


def textures(
    terminal: Terminal,
    folder: Annotated[Path, typer.Argument(help="New folder for the images.", show_default=False)],
    train_images: Annotated[
        int, typer.Option(min=0, help="Good images to train with, a seen subclass.")
    ] = 60,
    test_images: Annotated[int, typer.Option(min=0, help="Good test images a subclass.")] = 20,
    defect_images: Annotated[int, typer.Option(min=0, help="Damaged test images a subclass.")] = 21,
    size: Annotated[int, typer.Option(min=64, help="Height and width in pixels.")] = 256,
) -> int:
    """Make textile images with planted defects and exact masks: six subclasses to train with, four unseen."""
    from normweave.textiles import make_textures

    with terminal.progress() as progress:
        written = make_textures(
            folder,
            seed=terminal.seed or 0,
            size=(size, size),
            train_images=train_images,
            test_images=test_images,
            defect_images=defect_images,
            progress=None if progress is None else lambda done, total: progress("making images", done, total),
        )
    if terminal.json:
        terminal.record({"manifest": str(written)})
    else:
        terminal.show(f"{written}")
    return ALL_NORMAL
