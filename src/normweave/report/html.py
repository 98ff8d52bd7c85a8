"""HTML from Jinja2 templates in which every value is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image


def environment(package: str, **filters: Callable[..., str]) -> Environment:
    """Return a Jinja2 environment for the folder `templates` of a package; an undefined value is an error."""
    made = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= filters
    return made


def render(template: str, **values: Any) -> Markup:
    """Return a template of this package filled with values, safe to insert into another one."""
    return Markup(_reports().get_template(template).render(values))


@cache
def _reports() -> Environment:
    return environment("normweave.report", data_uri=data_uri, percent=percent)


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
