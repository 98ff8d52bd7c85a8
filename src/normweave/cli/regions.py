"""`normweave data roi`: write, check and show the regions of interest of a detector."""

from enum import StrEnum
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normweave.cli.terminal import ALL_NORMAL, Terminal
from normweave.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PREVIEWS = (".png", ".jpg", ".jpeg")
BESIDE = 100
"""Images beside that of a region whose proportions are compared with it, at most."""


class Align(StrEnum):
    """Whether the region follows the part."""

    none = "none"
    translation = "translation"
    rigid = "rigid"


def roi(
    terminal: Terminal,
    image: Annotated[Path, typer.Argument(help="An image of the line, to which the shapes refer.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="File of regions, .json; other categories in it stay.", show_default=False),
    ],
    category: Annotated[str, typer.Option(help="Category of the region; '*': all that have none of their own.")] = "*",
    rectangle: Annotated[
        list[str] | None,
        typer.Option(help="Look here: x,y,width,height as shares of the image. Repeatable.", show_default=False),
    ] = None,
    polygon: Annotated[
        list[str] | None,
        typer.Option(help="Look here: corners 'x,y x,y x,y …' as shares. Repeatable.", show_default=False),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Look here: pixels of an image that are not black.", show_default=False)
    ] = None,
    ignore_rectangle: Annotated[
        list[str] | None, typer.Option(help="Leave out: x,y,width,height. Repeatable.", show_default=False)
    ] = None,
    ignore_polygon: Annotated[
        list[str] | None, typer.Option(help="Leave out: corners. Repeatable.", show_default=False)
    ] = None,
    ignore_mask: Annotated[
        Path | None, typer.Option(help="Leave out: pixels that are not black.", show_default=False)
    ] = None,
    align: Annotated[
        Align, typer.Option(help="Find the part of IMAGE in each image: its shift, or (rigid) its rotation too.")
    ] = Align.none,
    preview: Annotated[
        Path | None, typer.Option(help="New image (.png) that shows the region.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --preview.")] = False,
) -> int:
    """Write the region of interest of a category to a file for `normweave train --regions`.

    Without shapes, the file is checked and described. Outside the region nothing is learnt, scored or shown.
    """
    from normweave import settings
    from normweave.data import alignment, images
    from normweave.data import regions as drawn

    pixels = images.decode(image)
    height, width = pixels.shape[:2]
    found = {each.category: each for each in settings.read_regions(output)} if output.exists() else {}
    parts = {
        name: _given(
            rectangles=[_numbers(each) for each in rectangles or ()],
            polygons=[[_numbers(corner) for corner in each.split()] for each in polygons or ()],
            mask="" if path is None else _mask(path, height=height, width=width),
        )
        for name, rectangles, polygons, path in (
            ("include", rectangle, polygon, mask),
            ("ignore", ignore_rectangle, ignore_polygon, ignore_mask),
        )
    }
    if preview is not None and preview.suffix.lower() not in PREVIEWS:
        raise ConfigError(f"The preview must end in {' or '.join(PREVIEWS)}, got {preview}. Nothing was written.")
    if preview is not None and preview.exists() and not overwrite:
        raise DataError(f"The preview {preview} exists. Choose another path, or give --overwrite. Nothing was written.")
    if given := _given(**parts):
        if align is not Align.none:
            given |= {"align": align.value, "reference": alignment.encode_reference(pixels)}
        own = settings.from_dict({"regions": [{"category": category, **given}]}, source="The options").regions
        drawn.check(own)
        found |= {category: own[0]}
        settings.write_regions(output, found.values())
    elif align is not Align.none:
        raise ConfigError(
            f"--align {align.value} is about a region that is drawn now. Draw it over {image}, for example with "
            "--rectangle 0.1,0.1,0.8,0.8."
        )
    region = drawn.of(found.values(), category)
    if region is None:
        raise ConfigError(
            f"{output} holds no region of {category!r}. Draw one, for example with --rectangle 0.1,0.1,0.8,0.8."
        )
    inside = drawn.mask(region, height, width)
    if preview is not None:
        _save_preview(preview, pixels, inside)
    share = float(inside.mean())
    if terminal.json:
        described = drawn.described(tuple(found.values()))
        terminal.record({"file": str(output), "category": category, "inside": share, "regions": described})
    else:
        follows = "" if region.align == "none" else f", and follows the part ({region.align})"
        terminal.show(f"{output}: the region of {category} is {share:.1%} of {image}{follows}")
        if preview is not None:
            terminal.show(f"{preview}: the region over the image")
        if given and align is not Align.none and (other := _of_other_proportions(image, (height, width))):
            terminal.remark(other)
        terminal.remark(f"Next: normweave train DATA -o BUNDLE --regions {output}")
    return ALL_NORMAL


def _of_other_proportions(image: Path, size: tuple[int, int]) -> str:
    """Return a remark if an image beside that of the region has other proportions: a region cannot follow there."""
    from normweave.data import alignment, images, layouts

    # Those of the folder itself come first.
    beside = takewhile(lambda path: path.parent == image.parent, layouts.images_below(image.parent))
    for path in islice(beside, BESIDE):
        try:
            found = images.size(path)
        except DataError:
            continue  # training names it
        if not alignment.same_proportions(found, size):
            return (
                f"{path} has {found[0]} x {found[1]} pixels (height x width), and the reference {image} has "
                f"{size[0]} x {size[1]}: images of other proportions are refused, in training too. Draw the region "
                "over an image like those of the line, or use --align none."
            )
    return ""


def _mask(path: Path, *, height: int, width: int) -> str:
    from normweave.data import images, regions

    try:
        return regions.encode_mask(images.read_mask(path, height=height, width=width))
    except DataError as error:
        raise DataError(
            f"{error} The mask of a region has two values: 255 (white) where to look, 0 (black) elsewhere."
        ) from error


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value}


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"A shape must be numbers between commas, shares of width and height, got {text!r:.80}. Examples: "
            "--rectangle 0.1,0.1,0.8,0.8 --polygon '0,0 1,0 0.5,1'"
        ) from None


def _save_preview(path: Path, pixels: "NDArray[np.uint8]", inside: "NDArray[np.bool_]") -> None:
    from PIL import Image

    from normweave.maps.overlay import dimmed_outside

    try:
        Image.fromarray(dimmed_outside(pixels, inside)).save(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot write the preview {path}: {error}. Name a file that ends in .png.") from error
