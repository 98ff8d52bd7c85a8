"""Encoding of images and maps."""

import io

import numpy as np
import pytest
from PIL import Image

from normweave.serve.rendering import media_type, png


def test_png_shrinks_and_never_enlarges():
    pixels = np.zeros((40, 80, 3), np.uint8)
    assert Image.open(io.BytesIO(png(pixels, max_side=20))).size == (20, 10)
    assert Image.open(io.BytesIO(png(pixels, max_side=200))).size == (80, 40)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_media_type(name):
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, name)
    assert media_type(content.getvalue()) == f"image/{name.lower()}"
    assert media_type(b"<svg onload=alert(1)>") == "application/octet-stream"
