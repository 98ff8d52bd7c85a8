"""HTML pages from the templates of this package; every value is escaped."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image


def render(template: str, **values: Any) -> Markup:
    """Return a template filled with values, safe to insert into another one."""
    return Markup(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("normweave.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "percent": percent}
    return environment


def percent(share: float) -> str:
    """Return a share in [0, 1] as per cent with one digit after the point."""
    return f"{100 * share:.1f}"


def data_uri(image: NDArray[np.uint8] | Path) -> str:
    """Return an image as a URI that holds its data: pixels (h, w, 3) as JPEG, or a JPEG or SVG file."""
    if isinstance(image, Path):
        content, subtype = image.read_bytes(), "jpeg" if image.suffix == ".jpg" else "svg+xml"
    else:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=88, subsampling=0)
        content, subtype = file.getvalue(), "jpeg"
    return f"data:image/{subtype};base64,{base64.b64encode(content).decode()}"
