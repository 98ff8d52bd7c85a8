"""Synthetic textile images with defects and exact masks, for the demo, tests and examples."""

from normweave.textiles.camera import LIGHTINGS
from normweave.textiles.dataset import SEEN, UNSEEN, Textile, make_textures, render
from normweave.textiles.defects import DEFECTS
from normweave.textiles.weave import COLOURS, WEAVES

__all__ = [
    "COLOURS",
    "DEFECTS",
    "LIGHTINGS",
    "SEEN",
    "UNSEEN",
    "WEAVES",
    "Textile",
    "make_textures",
    "render",
]
