"""`normweave data`: check data sets, write manifests, make a synthetic data set."""

from pathlib import Path
from typing import Annotated

import typer

from normweave.cli import options
from normweave.cli.terminal import ALL_NORMAL, Terminal, one_line

WRONG_INPUT = 2


def check(terminal: Terminal, data: options.Data, layout: options.Layout = None) -> int:
    """Read every image, count the images and list all faults. Exit code 2 if there are faults, not for remarks.

    With --layout mvtec_ad, visa, btad or mpdd, the counts are compared with the published ones.
    """
    from normweave.config import DataConfig
    from normweave.data import layouts
    from normweave.data.manifest import check as find_faults
    from normweave.data.manifest import counts
    from normweave.data.remarks import remarks

    samples = layouts.read(data, DataConfig(), layout=layout)
    faults = find_faults(samples, layout=layout)
    notes = remarks(data, samples)
    if terminal.json:
        found = [
            {"type": fault.type, "path": None if fault.path is None else str(fault.path), "text": fault.text}
            for fault in faults
        ]
        terminal.record({"images": len(samples), "counts": counts(samples), "faults": found, "remarks": notes})
    else:
        for row in counts(samples):
            name = "/".join(str(row[key]) for key in ("category", "subclass") if row[key])
            split = row["split"] or "no split"
            terminal.show(f"{name}, {split}: {row['good']} good, {row['anomalous']} anomalous")
        for fault in faults:
            terminal.show(one_line(f"{fault.type}: {fault.text}"))
        for note in notes:
            terminal.show(f"remark: {note}")
        terminal.show(f"{len(samples)} images, {len(faults)} faults")
    return WRONG_INPUT if faults else ALL_NORMAL


def manifest(
    terminal: Terminal,
    data: Annotated[
        list[Path],
        typer.Argument(help="Manifests (.csv, .parquet) or folders of images.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The manifest, .csv or .parquet.", show_default=False)],
    category: options.Category = None,
    subclass: options.Subclass = None,
    layout: options.Layout = None,
) -> int:
    """Write one manifest of all images in folders: a table with one row per image, to check, correct and train on.

    The layout of each folder is recognized, unless --layout names one for all folders.
    """
    from normweave.config import DataConfig
    from normweave.data import layouts
    from normweave.data.joined import join
    from normweave.data.manifest import write_manifest

    joined = join([(str(folder), layouts.read(folder, DataConfig(), layout=layout)) for folder in data])
    selection = DataConfig(category=options.chosen(category), subclass=options.chosen(subclass))
    samples = layouts.choose(joined, selection)
    write_manifest(samples, output)
    if terminal.json:
        terminal.record({"manifest": str(output), "images": len(samples)})
    else:
        terminal.show(f"{output}: {len(samples)} images")
    return ALL_NORMAL


def make_textures(
    terminal: Terminal,
    folder: Annotated[Path, typer.Argument(help="New folder for the images.", show_default=False)],
    train_images: Annotated[int, typer.Option(min=0, help="Good training images of each seen subclass.")] = 60,
    test_images: Annotated[int, typer.Option(min=0, help="Good test images of each subclass.")] = 20,
    defect_images: Annotated[int, typer.Option(min=0, help="Defective test images of each subclass.")] = 21,
    size: Annotated[int, typer.Option(min=64, help="Height and width in pixels.")] = 256,
) -> int:
    """Make synthetic textile images with defects and exact masks: six subclasses with training images, four without."""
    from normweave import textiles

    with terminal.progress() as progress:
        manifest = textiles.make_textures(
            folder,
            seed=terminal.seed or 0,
            size=(size, size),
            train_images=train_images,
            test_images=test_images,
            defect_images=defect_images,
            progress=None if progress is None else lambda done, total: progress("making images", done, total),
        )
    if terminal.json:
        terminal.record({"manifest": str(manifest)})
    else:
        terminal.show(f"{manifest}")
    return ALL_NORMAL
