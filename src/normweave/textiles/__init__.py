"""Textile images with planted defects, for the demo, tests and examples."""

from normweave.textiles.dataset import (
    COLOURS,
    DEFECT_SHARE,
    DEFECTS,
    LIGHTINGS,
    SEEN,
    UNSEEN,
    WEAVES,
    Textile,
    interlacing,
    make_textures,
    render,
)

__all__ = [
    "COLOURS",
    "DEFECTS",
    "DEFECT_SHARE",
    "LIGHTINGS",
    "SEEN",
    "UNSEEN",
    "WEAVES",
    "Textile",
    "interlacing",
    "make_textures",
    "render",
]
