"""Remarks name what may be a mistake, with the cure."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from normweave.config import DataConfig
from normweave.data.layouts import read
from normweave.data.remarks import remarks
from normweave.types import Sample


def colour_png(array):
    """16 bits per colour, which Pillow does not write (ISO 15948)."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture
def images(tmp_path):
    """Write arrays as PNG and return their samples."""

    def write(*arrays):
        samples = []
        for number, array in enumerate(arrays):
            path = tmp_path / f"{number}.png"
            if array.ndim == 3 and array.dtype == np.uint16:
                path.write_bytes(colour_png(array))
            else:
                Image.fromarray(array).save(path)
            samples.append(Sample(image_path=path))
        return samples

    return write


def shade(value, shape=(9, 9)):
    pixels = np.full(shape, value // 2, np.uint16)
    pixels[4, 4] = value
    return pixels


@pytest.mark.parametrize(("value", "bits", "factor"), [(4095, 12, 16), (1024, 12, 16), (1023, 10, 64), (300, 10, 64)])
@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 3)], ids=["grey", "colour"])
def test_a_camera_with_10_or_12_bits(value, bits, factor, shape, images, tmp_path):
    samples = images(shade(value, shape), shade(100, shape), np.full((9, 9), 255, np.uint8))
    (text,) = remarks(tmp_path, samples)
    assert "all 2 images with 16 bits have values up to" in text
    assert f"a camera with {bits} bits" in text
    assert f"Multiply their values by {factor}" in text


def test_other_values_and_other_bits_have_no_remark(images, tmp_path):
    table = tmp_path / "parts.csv"
    assert remarks(table, images(shade(4096), shade(100))) == []
    assert remarks(table, images(shade(0), shade(0))) == []
    assert remarks(table, images(np.full((9, 9), 3, np.uint8))) == []


def test_images_that_are_not_used(tmp_path):
    for name in ("good/1.png", "hole/2.png", "Ground_Truth/hole/2.png", "Ground_Truth/hole/9.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(path)
    (text,) = remarks(tmp_path, read(tmp_path, DataConfig()))
    assert text.startswith(f"1 images are not used, for example {tmp_path / 'Ground_Truth/hole/9.png'}:")
    assert text.endswith("or write a manifest.")


def test_images_that_cannot_be_read_are_faults_and_no_remarks(tmp_path):
    (tmp_path / "1.png").write_bytes(b"no image")
    assert remarks(tmp_path, [Sample(image_path=tmp_path / "1.png")]) == []
