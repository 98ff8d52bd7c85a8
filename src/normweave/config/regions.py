"""Settings of the regions of interest: which part of an image is inspected, per category."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from normweave.validation import PositiveShare, Share, check, checked

MAX_SHAPES = 100
"""The most polygons, and the most rectangles, of a region."""
MAX_POINTS = 1000
"""The most corners of a polygon."""
MAX_MASK_LETTERS = 2**20
"""The most letters of a mask as base64 text."""
MAX_REFERENCE_LETTERS = 2**18
"""The most letters of a reference image as base64 text."""
EVERY = "*"
"""The category of a region for all categories that have none of their own."""


def _inside_the_image(rectangle: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    x, y, width, height = rectangle
    fits = x + width <= 1 + 1e-9 and y + height <= 1 + 1e-9
    check(
        (fits, f"must lie inside the image: x + width and y + height at most 1, got {x + width:g} and {y + height:g}")
    )
    return rectangle


Polygon = Annotated[tuple[tuple[Share, Share], ...], Field(min_length=3, max_length=MAX_POINTS)]
Rectangle = Annotated[tuple[Share, Share, PositiveShare, PositiveShare], AfterValidator(_inside_the_image)]


@checked
class ShapesConfig:
    """Parts of an image: the union of all shapes. Coordinates are shares of width and height, from the upper left."""

    polygons: Annotated[tuple[Polygon, ...], Field(max_length=MAX_SHAPES)] = ()
    """Each a list of corners [x, y], at least three; where a polygon crosses itself, the even-odd rule decides."""
    rectangles: Annotated[tuple[Rectangle, ...], Field(max_length=MAX_SHAPES)] = ()
    """Each [x, y, width, height]."""
    mask: Annotated[str, Field(max_length=MAX_MASK_LETTERS)] = ""
    """A PNG image as base64 text, stretched over the image: pixels that are not black belong to the part."""

    @property
    def empty(self) -> bool:
        """Whether there is no shape."""
        return not (self.polygons or self.rectangles or self.mask)


@checked
class RegionConfig:
    """The region of interest of a category. Outside of it nothing is learnt, scored or shown."""

    category: Annotated[str, Field(min_length=1)] = EVERY
    """The category; `*`: all that have no region of their own."""
    include: ShapesConfig = ShapesConfig()
    """The part to inspect; without shapes the whole image."""
    ignore: ShapesConfig = ShapesConfig()
    """Parts of it that are left out."""
    align: Literal["none", "translation", "rigid"] = "none"
    """Whether the region follows the part: `translation` finds where the part is, `rigid` also how it is turned.

    Needs OpenCV, `pip install "normweave[align]"`.
    """
    reference: Annotated[str, Field(max_length=MAX_REFERENCE_LETTERS)] = ""
    """The image over which the shapes were drawn, a small grey PNG image as base64 text; needed by `align`."""

    def __post_init__(self) -> None:
        aligned = self.align != "none"
        write = "write the region with normweave data roi IMAGE --align"
        check(
            (not aligned or bool(self.reference), f"align={self.align} must have a reference image: {write}"),
            (aligned or not self.reference, "reference must be empty with align=none, which does not use it"),
        )
        given = not (self.include.empty and self.ignore.empty)
        check((given, "include must have a polygon, a rectangle or a mask, or ignore must have one"))
