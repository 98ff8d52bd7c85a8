"""Image files as frames of a source."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normweave.data import images
from normweave.serve.source import Frame
from normweave.serve.trigger import SMALL


def frame(content: bytes, *, part: str | None = None, view: str | None = None) -> Frame:
    """Return an image file as a frame; it may be no image, which its inspection tells."""
    return Frame(content=lambda: content, grey=lambda: grey(content), part=part, view=view)


def grey(content: bytes) -> NDArray[np.float32]:
    """Return an image file as (SMALL, SMALL) grey values.

    Raises:
        ImageError: it is no image.
    """
    small = Image.fromarray(images.decode(content)).convert("L").resize((SMALL, SMALL), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)
