"""TIFF of many layouts, written by hand (TIFF 6.0): decoded to the right pixels, or refused with the reason."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from normweave.data.images import decode, size
from normweave.errors import ImageError

GREY = (np.arange(12 * 20).reshape(12, 20) * 37 % 256).astype(np.uint8)
COLOUR = np.stack([GREY, GREY.T.reshape(12, 20), 255 - GREY], axis=2)
SHORT, LONG = 3, 4


def tiff(*pages, order="<", **tags):
    """Return a file with one page for each (stored bytes, height, width, tags), or for one page given by `tags`."""
    content = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    for number, (stored, height, width, own) in enumerate(pages):
        entries = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 278: height, 284: 1}
        entries |= {int(name[1:]): value for name, value in tags.items()} | own
        entries = {
            tag: value if isinstance(value, tuple) else (value,) for tag, value in entries.items() if value != ()
        }
        parts = stored if isinstance(stored, list) else [stored]
        start = len(content) + 2 + 12 * (len(entries) + 2) + 4
        extra = b""
        for part in parts:
            extra += part
        offsets = tuple(start + sum(map(len, parts[:index])) for index in range(len(parts)))
        entries |= {273: offsets, 279: tuple(map(len, parts))} if 273 not in entries else {}
        directory = struct.pack(order + "H", len(entries))
        for tag, values in sorted(entries.items()):
            form = LONG if tag in (273, 279) or max(values) > 65535 else SHORT
            code = {SHORT: "H", LONG: "I"}[form]
            packed = struct.pack(f"{order}{len(values)}{code}", *values)
            if len(packed) > 4:
                packed, extra = struct.pack(order + "I", start + len(extra)), extra + packed
            directory += struct.pack(order + "HHI", tag, form, len(values)) + packed.ljust(4, b"\0")
        end = start + len(extra)
        following = end if number + 1 < len(pages) else 0
        content += (directory + struct.pack(order + "I", following)).ljust(start - len(content), b"\0") + extra
    return content


def page(pixels, order="<", **tags):
    stored = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    bits = pixels.dtype.itemsize * 8
    own = {258: bits} if pixels.ndim == 2 else {258: (bits,) * 3, 262: 2, 277: 3}
    return stored, *pixels.shape[:2], own | {int(name[1:]): value for name, value in tags.items()}


def both(content, tmp_path):
    """Decode by path and from bytes; both and `size` agree."""
    path = tmp_path / "part.tif"
    path.write_bytes(content)
    outcomes = []
    for source in (path, content):
        try:
            outcomes.append(decode(source))
        except ImageError as error:
            outcomes.append(str(error))
    by_path, by_bytes = outcomes
    if isinstance(by_path, str):
        assert by_path.removeprefix(f"{path}: ") == by_bytes.removeprefix("bytes: ")
        return by_path
    np.testing.assert_array_equal(by_path, by_bytes)
    assert size(path) == size(content) == by_path.shape[:2]
    with Image.open(path) as image:
        if not image.is_animated:
            np.testing.assert_array_equal(by_path, decode(image))
    return by_path


def grey(array):
    return np.stack([array] * 3, axis=2)


def packed(values, bits):
    """Rows of samples with 1 to 16 bits, most significant first, filled to whole bytes (TIFF 6.0, BitsPerSample)."""
    spread = (values[..., None].astype(int) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(spread.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


@pytest.mark.parametrize("order", "<>")
def test_the_plain_layouts(order, tmp_path):
    np.testing.assert_array_equal(both(tiff(page(GREY), order=order), tmp_path), grey(GREY))
    np.testing.assert_array_equal(both(tiff(page(COLOUR), order=order), tmp_path), COLOUR)
    wide = GREY.astype(np.uint16) * 257
    np.testing.assert_array_equal(both(tiff(page(wide, order), order=order), tmp_path), grey(GREY))
    floats = GREY.astype(np.float32) / 255
    np.testing.assert_array_equal(both(tiff(page(floats, order, t339=3), order=order), tmp_path), grey(GREY))


TURNS = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_every_layout_is_turned_upright(orientation, tmp_path):
    """Tag 274; Pillow maps uncompressed files into memory, and then reads them with the sides swapped."""
    alpha = np.dstack([COLOUR, GREY])
    ramp = tuple(np.arange(256) * 257)
    cases = {
        "8 bit": (page(GREY, t274=orientation), grey(GREY)),
        "16 bit": (page(GREY.astype(np.uint16) * 257, t274=orientation), grey(GREY)),
        "float": (page(GREY.astype(np.float32) / 255, t274=orientation, t339=3), grey(GREY)),
        "colour": (page(COLOUR, t274=orientation), COLOUR),
        "alpha": (
            (alpha.tobytes(), 12, 20, {258: (8,) * 4, 262: 2, 277: 4, 338: 2, 274: orientation}),
            COLOUR,
        ),
        "palette": (page(GREY, t274=orientation, t262=3, t320=ramp * 3), grey(GREY)),
        "inks": (
            (np.dstack([255 - COLOUR, 0 * GREY]).tobytes(), 12, 20, {258: (8,) * 4, 262: 5, 277: 4, 274: orientation}),
            COLOUR,
        ),
        "12 bit": (
            (packed(GREY.astype(int) * 4095 // 255, 12), 12, 20, {258: 12, 274: orientation}),
            grey(GREY),
        ),
    }
    for name, (one, want) in cases.items():
        np.testing.assert_allclose(both(tiff(one), tmp_path), TURNS[orientation](want), atol=1, err_msg=name)


def test_white_is_zero(tmp_path):
    """Tag 262 is 0: the highest value is black."""
    want = grey(GREY)
    for pixels, tags in (
        (255 - GREY, {}),
        ((255 - GREY).astype(np.uint16) * 257, {}),
        (1 - GREY.astype(np.float32) / 255, {"t339": 3}),
    ):
        np.testing.assert_array_equal(both(tiff(page(pixels, **tags), t262=0), tmp_path), want)
    small = GREY >> 4
    four = tiff((packed(15 - small, 4), 12, 20, {258: 4, 262: 0}))
    np.testing.assert_array_equal(both(four, tmp_path), grey(small * 17))


@pytest.mark.parametrize("width", [20, 19])
def test_12_bits_are_scaled_by_their_own_range(width, tmp_path):
    values = np.linspace(0, 4095, 12 * width).astype(int).reshape(12, width)
    stored = packed(values, 12)
    for content in (tiff((stored, 12, width, {258: 12})), tiff((zlib.compress(stored), 12, width, {258: 12, 259: 8}))):
        np.testing.assert_array_equal(both(content, tmp_path), grey(np.rint(values / 4095 * 255)))


@pytest.mark.parametrize("first", ["reduced", "mask", "old reduced"])
def test_the_first_full_page_is_read(first, tmp_path):
    tags = {"reduced": {"t254": 1}, "mask": {"t254": 4}, "old reduced": {"t255": 2}}[first]
    preview = page(np.ascontiguousarray(COLOUR[::2, ::2]), **tags)
    np.testing.assert_array_equal(both(tiff(preview, page(COLOUR), page(255 - COLOUR)), tmp_path), COLOUR)
    np.testing.assert_array_equal(both(tiff(page(COLOUR), preview), tmp_path), COLOUR)


def test_a_small_page_before_a_larger_one_is_refused(tmp_path):
    """A preview without the tag that marks it."""
    small = page(np.ascontiguousarray(COLOUR[:9, :9]))
    assert "page 1 has 9 x 9 pixels, page 2 has 12 x 20" in both(tiff(small, page(COLOUR)), tmp_path)
    np.testing.assert_array_equal(both(tiff(page(COLOUR), small), tmp_path), COLOUR)


def test_pages_that_cannot_be_chosen_are_refused(tmp_path):
    assert "all pages are previews or masks" in both(tiff(page(COLOUR, t254=1)), tmp_path)
    many = tiff(*[page(GREY[:9, :9]) for _ in range(1001)])
    with pytest.raises(ImageError, match="more than 1000 pages"):
        size(many)


def test_a_later_page_of_an_unknown_layout_does_not_matter(tmp_path):
    odd = (bytes(240 * 8), 12, 20, {258: 64, 339: 3})
    np.testing.assert_array_equal(both(tiff(page(COLOUR), odd), tmp_path), COLOUR)


def planes(dtype, count=3, **tags):
    parts = [COLOUR[..., number % 3].astype(dtype) * (257 if dtype == np.uint16 else 1) for number in range(count)]
    bits = np.dtype(dtype).itemsize * 8
    own = {258: (bits,) * count, 262: 2, 277: count, 284: 2} | {int(name[1:]): value for name, value in tags.items()}
    return [part.tobytes() for part in parts], 12, 20, own


def test_separate_planes(tmp_path):
    """Tag 284 is 2."""
    np.testing.assert_array_equal(both(tiff(planes(np.uint8)), tmp_path), COLOUR)
    np.testing.assert_array_equal(both(tiff(planes(np.uint8, 4, t338=2)), tmp_path), COLOUR)
    assert "separate planes of 16, 16, 16 bits" in both(tiff(planes(np.uint16)), tmp_path)
    assert "separate planes" in both(tiff(planes(np.uint8, 4, t338=1)), tmp_path)


def test_an_opened_image_is_refused_as_its_file_is(tmp_path):
    (tmp_path / "part.tif").write_bytes(tiff(planes(np.uint16)))
    with (
        Image.open(tmp_path / "part.tif") as image,
        pytest.raises(ImageError, match="PIL image: separate planes of 16"),
    ):
        decode(image)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint32])
def test_integers_without_a_known_range_are_refused(dtype, tmp_path):
    pixels = (GREY // 2).astype(dtype)
    one = page(pixels, t339=1 if dtype == np.uint32 else 2)
    text = both(tiff(one), tmp_path)
    assert "signed or 32-bit integers from 0 to 127" in text
    assert "Save it with 8 or 16 bits, unsigned" in text


@pytest.mark.parametrize(
    ("pixels", "tags"),
    [(GREY.astype(np.float64) / 255, {"t339": 3}), (COLOUR.astype(np.float32) / 255, {"t339": (3, 3, 3)})],
    ids=["float64", "float colour"],
)
def test_a_layout_that_cannot_be_read_is_named(pixels, tags, tmp_path):
    content = tiff(page(pixels, **tags))
    with pytest.raises(ImageError, match="not an image that can be read, damaged or a TIFF of an unusual layout"):
        decode(content)


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (page(GREY, t262=()), "does not say whether its lowest value is black or white"),
        (page(GREY, t262=3, t320=tuple(range(256)) * 3), "its colour map has 8 bits"),
        (
            (bytes(12 * 20 * 2), 12, 20, {258: (8,) * 3, 262: 6, 277: 3, 530: (2, 2)}),
            "uncompressed YCbCr with fewer samples of colour",
        ),
        (page(GREY, t278=6), "truncated or corrupt .*1 strips, but its size needs 2"),
        (page(GREY, t273=100, t279=9999), "truncated or corrupt .*beyond the end"),
        (page(GREY, t273=0, t279=0), "truncated or corrupt .*strip or tile without pixels"),
    ],
    ids=["photometric", "colour map", "subsampling", "strips", "beyond", "sparse"],
)
def test_what_would_be_misread_is_refused(one, text, tmp_path):
    path = tmp_path / "part.tif"
    path.write_bytes(tiff(one))
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError, match=text):
            decode(source)


@pytest.mark.parametrize("value", [1.0, 0.5])
def test_compressed_floats_with_the_highest_byte_first_are_refused(value, tmp_path):
    """Pillow swaps the bytes that the decoder has swapped: 1.0 becomes 4.6e-41, black."""
    floats = np.full((12, 20), value, ">f4")
    tags = {258: 32, 259: 8, 339: 3}
    assert "highest byte first" in both(tiff((zlib.compress(floats.tobytes()), 12, 20, tags), order=">"), tmp_path)
    np.testing.assert_array_equal(
        both(tiff((zlib.compress(floats.astype("<f4").tobytes()), 12, 20, tags)), tmp_path),
        np.full((12, 20, 3), round(value * 255)),
    )


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd", "packbits"])
@pytest.mark.parametrize("layout", ["strips", "tiles", "planes"])
def test_files_of_an_independent_writer(compression, layout, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    path = tmp_path / "part.tif"
    how = {"compression": compression, **({"tile": (16, 16)} if layout == "tiles" else {"rowsperstrip": 5})}
    for name, pixels, own, want in (
        ("8 bit", GREY, {}, grey(GREY)),
        ("16 bit", GREY.astype(np.uint16) * 257, {}, grey(GREY)),
        ("white is zero", 255 - GREY, {"photometric": "miniswhite"}, grey(GREY)),
        ("16 bit white is zero", (255 - GREY).astype(np.uint16) * 257, {"photometric": "miniswhite"}, grey(GREY)),
        ("float", GREY.astype(np.float32) / 255, {}, grey(GREY)),
        ("colour", COLOUR, {"photometric": "rgb"}, COLOUR),
        ("16 bit colour", COLOUR.astype(np.uint16) * 257, {"photometric": "rgb"}, COLOUR),
        ("int8", GREY.view(np.int8), {}, None),
    ):
        if layout == "planes" and pixels.ndim == 3:
            pixels, own = pixels.transpose(2, 0, 1), {**own, "planarconfig": "separate"}
        tifffile.imwrite(path, pixels, **how, **own)
        got = both(path.read_bytes(), tmp_path)
        if want is None or (layout == "planes" and name == "16 bit colour"):
            assert isinstance(got, str), name
        else:
            assert not isinstance(got, str), (name, got)
            np.testing.assert_array_equal(got, want, err_msg=name)
