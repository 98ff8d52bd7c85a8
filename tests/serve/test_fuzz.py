"""Ten thousand malformed uploads: each one is answered, and the server keeps working."""

import io
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from normweave.serve import create_app
from normweave.serve.records import Filter

REQUESTS, IMAGES = 500, 20
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "ICO")


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, data, *, depth=8, colour=2):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb(side):
    """Return a file of a few kilobytes with side² pixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * side)
    return png(side, side, b"".join([packer.compress(row) for _ in range(side)]) + packer.flush())


def archive():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../../evil.png", bytes(10**7))
    return content.getvalue()


@pytest.fixture(scope="module")
def seeds(photos):
    """Valid images of every format, and malformed or hostile files."""
    image = Image.open(photos[0]).convert("RGB")
    whole = []
    for name in FORMATS:
        content = io.BytesIO()
        image.save(content, name)
        whole.append(content.getvalue())
    for mode in ("L", "1", "P", "LA", "RGBA", "CMYK", "I;16", "F"):
        content = io.BytesIO()
        name = "TIFF" if mode in ("CMYK", "F") else "PNG"
        (Image.new(mode, (20, 30)) if mode == "I;16" else image.convert(mode)).save(content, name)
        whole.append(content.getvalue())
    traps = [
        b"",
        b"\x00",
        bomb(3000),
        png(2**31 - 1, 2**31 - 1, b""),
        png(100_000, 100_000, zlib.compress(bytes(1000))),
        png(0, 0, b""),
        png(1, 1, zlib.compress(b"\x00\x00\x00\x00")),
        png(64, 64, zlib.compress(b"\xff" * 64 * (1 + 3 * 64))),
        archive(),
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) (r) file",
        b"GIF89a" + bytes(10),
        b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(30),
        b"II*\x00\x08\x00\x00\x00" + b"\xff" * 200,  # a TIFF whose directory is all ones
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 2**32 - 1, 0, 0, 54, 40, 2**30, -(2**30), 1, 24, 0, 0, 0, 0, 0, 0),
    ]
    return whole, traps


class Recipe(NamedTuple):
    """Numbers from which an upload is built, so that hypothesis can print and shrink it."""

    what: str
    first: int
    second: int
    position: int
    changes: list[tuple[int, int]]
    name: str
    content_type: str


recipes = st.builds(
    Recipe,
    what=st.sampled_from(["whole", "cut", "changed", "spliced", "grown", "trap", "noise"]),
    first=st.integers(0, 99),
    second=st.integers(0, 99),
    position=st.integers(0, 10**6),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
    name=st.sampled_from(["part.png", "../../../etc/passwd", "/etc/shadow", "C:\\Windows\\x", "a\x00b.png", "con", "."])
    | st.text(min_size=1, max_size=12),
    content_type=st.sampled_from(["image/png", "image/jpeg", "text/html", "application/x-sh", ""]),
)


def make(recipe, whole, traps):
    """(name, content, content type)."""
    content = whole[recipe.first % len(whole)]
    other = [*whole, *traps][recipe.second % (len(whole) + len(traps))]
    position = recipe.position % (len(content) + 1)
    if recipe.what == "cut":
        content = content[:position]
    elif recipe.what == "changed":
        changed = bytearray(content)
        for at, value in recipe.changes:
            changed[at % len(content)] = value
        content = bytes(changed)
    elif recipe.what == "spliced":
        content = content[:position] + other[position % (len(other) + 1) :]
    elif recipe.what == "grown":
        content += other
    elif recipe.what == "trap":
        content = traps[recipe.first % len(traps)]
    elif recipe.what == "noise":
        content = bytes(value for _, value in recipe.changes) * (1 + recipe.first)
    return recipe.name, content, recipe.content_type


@pytest.mark.slow
def test_ten_thousand_uploads(start, access, keys, seeds):
    service = start(max_pixels=5_000_000)
    app = create_app(service, access=access, pages=False)
    seen = Counter()

    with TestClient(app, headers={"Authorization": f"Bearer {keys['operator']}"}) as client:

        @settings(
            max_examples=REQUESTS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=True,
        )
        @given(st.lists(recipes, min_size=IMAGES, max_size=IMAGES))
        def send(batch):
            files = [("images", make(recipe, *seeds)) for recipe in batch]
            answer = client.post("/v1/inspect", files=files)
            assert answer.status_code == 200, answer.text
            inspections = answer.json()["inspections"]
            assert len(inspections) == IMAGES
            for one in inspections:
                assert (one["verdict"] is None) == (one["error"] is not None)
                assert (one["image_url"] is None) == (one["error"] is not None)
                seen[one["verdict"] or "error"] += 1

        send()
        assert client.get("/readyz").status_code == 200
    assert seen.total() >= REQUESTS * IMAGES
    assert seen["error"] > 1000  # some were refused, some accepted
    assert seen.total() - seen["error"] > 1000
    assert service.store.count(Filter()) == seen.total()
    assert service.store.count(Filter(unreadable=True)) == seen["error"]
    outside = [path for path in Path(service.files.folder).rglob("*") if len(path.name) not in (2, 5, 64)]
    assert outside == []
