"""Masks as labelling tools write them: the right pixels, or a refusal with the cure."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from normweave.data.images import read_mask
from normweave.errors import DataError

HEIGHT, WIDTH = 60, 80
ONE = np.zeros((HEIGHT, WIDTH), bool)
ONE[10:20, 10:30] = True
CLASSES = ONE.astype(np.uint8)
CLASSES[40:50, 50:60] = 2
BOTH = CLASSES > 0


@pytest.fixture
def mask(tmp_path):
    """Read an image, an array or the bytes of a file as a mask; a refusal is returned as its text."""

    def read(source, ending="png", **how):
        path = tmp_path / f"mask.{ending}"
        if isinstance(source, bytes):
            path.write_bytes(source)
        else:
            image = source if isinstance(source, Image.Image) else Image.fromarray(np.ascontiguousarray(source))
            image.save(path, **how)
        try:
            return read_mask(path, height=HEIGHT, width=WIDTH)
        except DataError as error:
            return str(error)

    return read


def indexed(indices, *colours):
    image = Image.new("P", (WIDTH, HEIGHT))
    image.putdata(np.asarray(indices, np.uint8).ravel().tolist())
    image.putpalette([value for colour in colours for value in colour])
    return image


def voc():
    """The palette of PASCAL VOC: the bits of the index are spread over the channels."""
    numbers = np.arange(256)
    colours = np.zeros((256, 3), int)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel)) & 1) << (7 - bit)
    return colours.tolist()


def two(first, second, dtype=np.uint8):
    return np.array([0, first, second], dtype)[CLASSES]


BLACK, WHITE = (0, 0, 0), (255, 255, 255)


@pytest.mark.parametrize("indices", [(1, 2), (1, 8), (8, 8), (1, 255), (9, 10), (64, 192)])
@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_indices_of_a_palette_count_and_not_its_colours(indices, ending, mask):
    np.testing.assert_array_equal(mask(indexed(two(*indices), *voc()), ending), BOTH)


def test_dark_colours_of_a_palette_are_classes(mask):
    np.testing.assert_array_equal(mask(indexed(CLASSES, BLACK, (60, 60, 60), (90, 90, 90))), BOTH)
    np.testing.assert_array_equal(mask(indexed(CLASSES, BLACK, (60, 0, 0), WHITE)), BOTH)
    np.testing.assert_array_equal(mask(indexed(CLASSES, BLACK, BLACK, WHITE)), BOTH)


def test_a_palette_of_greys_in_order_is_a_grey_image(mask):
    ramp = [(value,) * 3 for value in range(256)]
    np.testing.assert_array_equal(mask(indexed(two(255, 200), *ramp)), BOTH)
    soft = np.where(CLASSES == 2, 255, 0)
    soft[39, 50:60] = 100  # a soft edge
    np.testing.assert_array_equal(mask(indexed(soft, *ramp)), CLASSES == 2)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (indexed(CLASSES, WHITE, BLACK, BLACK), "index 0 is brighter than index 1"),
        (indexed(CLASSES + 1, BLACK, (9, 9, 9), WHITE, WHITE), "no pixel has index 0"),
        (indexed(np.arange(HEIGHT * WIDTH) % 32, *[(8 * value,) * 3 for value in range(32)]), "32 greys"),
    ],
)
def test_palettes_whose_background_is_not_known_are_refused(image, text, mask):
    got = mask(image)
    assert text in got
    assert "Save the mask as black and white" in got


def test_a_palette_whose_colours_differ_in_transparency_only(mask):
    clear = indexed(CLASSES, WHITE, WHITE, WHITE)
    np.testing.assert_array_equal(mask(clear, transparency=bytes([0, 255, 255])), BOTH)
    assert "index 0 is less transparent than index 1" in mask(clear, transparency=bytes([255, 0, 0]))


def test_a_palette_with_an_alpha_channel_is_refused(mask):
    assert "a palette with an alpha channel" in mask(indexed(two(1, 8), *voc()).convert("PA"), "tif")


@pytest.mark.parametrize("colour", [0, 90, 255])
def test_masks_in_the_alpha_channel(colour, mask):
    flat = np.full((HEIGHT, WIDTH), colour, np.uint8)
    alpha = ONE * np.uint8(255)
    np.testing.assert_array_equal(mask(np.dstack([flat] * 3 + [alpha])), ONE)
    np.testing.assert_array_equal(mask(Image.merge("LA", [Image.fromarray(flat), Image.fromarray(alpha)])), ONE)
    np.testing.assert_array_equal(mask(np.dstack([flat] * 3 + [alpha]), "tif"), ONE)


def test_alpha_and_colour_that_agree(mask):
    white = ONE * np.uint8(255)
    np.testing.assert_array_equal(mask(np.dstack([white] * 4)), ONE)
    soft = white.copy()
    soft[20, 10:30] = 60  # a soft edge in alpha
    colour = np.where(soft > 0, 255, 0).astype(np.uint8)
    np.testing.assert_array_equal(mask(np.dstack([colour] * 3 + [soft])), ONE)


def test_alpha_and_colour_that_differ_are_refused(mask):
    other = (CLASSES == 2) * np.uint8(255)
    text = mask(np.dstack([ONE * np.uint8(255)] * 3 + [other]))
    assert "its colours and its alpha channel mark other pixels" in text
    cut_out = ONE * np.linspace(0, 600, WIDTH).clip(0, 255).astype(np.uint8)  # a photo, transparent around the defect
    assert isinstance(mask(np.dstack([cut_out] * 3 + [ONE * np.uint8(255)])), str)


def grey_png(values, bits):
    spread = (values[..., None].astype(int) >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(spread.reshape(HEIGHT, -1).astype(np.uint8), axis=1)

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("bits", "values"), [(1, (1, 1)), (2, (1, 1)), (2, (1, 2)), (2, (3, 1)), (4, (1, 15)), (4, (7, 7))]
)
def test_grey_classes_of_few_bits(bits, values, mask):
    np.testing.assert_array_equal(mask(grey_png(two(*values), bits)), BOTH)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("value", [1, 9, 255])
def test_masks_of_larger_types_hold_the_same_values(dtype, value, mask):
    np.testing.assert_array_equal(mask((ONE * value).astype(dtype), "tif"), ONE)


def test_white_is_zero(mask):
    tifffile = pytest.importorskip("tifffile")
    whites = 255 - ONE * np.uint8(255), 65535 - ONE * np.uint16(65535)
    for stored in (*whites, 255 - CLASSES, 65535 - two(3, 4, np.uint16)):
        content = io.BytesIO()
        tifffile.imwrite(content, stored, photometric="miniswhite")
        np.testing.assert_array_equal(mask(content.getvalue(), "tif"), ONE if stored.min() == 0 else BOTH)
    content = io.BytesIO()
    tifffile.imwrite(content, CLASSES, photometric="miniswhite")
    assert "0 is white, so every pixel is marked" in mask(content.getvalue(), "tif")


def test_bits_of_which_0_is_white_are_refused(mask):
    """By the tag, marked pixels are black; but tifffile writes boolean arrays so, with 1 for True."""
    tifffile = pytest.importorskip("tifffile")
    content = io.BytesIO()
    tifffile.imwrite(content, ONE)
    assert "1 bit of which 0 is white" in mask(content.getvalue(), "tif")


@pytest.mark.parametrize(
    "values", [(1, 255), (3, 200), (255, 100), (255, 64), (127, 128)], ids=lambda values: "-".join(map(str, values))
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_dim_regions_beside_bright_ones_are_refused(values, dtype, mask):
    factor = 257 if dtype == np.uint16 and min(values) > 15 else 1
    high = 257 if dtype == np.uint16 and min(values) <= 15 else factor
    first, second = (value * (high if value > 15 else 1) for value in values)
    got = mask(two(first, second, dtype))
    assert "beside brighter ones" in got
    assert "Save the mask as black and white" in got


def test_a_class_inside_a_thin_border_of_255_is_refused(mask):
    """PASCAL VOC as grey values: each object has a border that does not count."""
    values = ONE * np.uint8(255)
    values[12:18, 12:28] = 1
    assert "value 1 beside brighter ones" in mask(values)


def test_dim_colours_beside_bright_ones_are_refused(mask):
    assert "beside brighter ones" in mask(np.array(voc(), np.uint8)[two(1, 8)])


def test_soft_edges_are_not_dim_regions(mask):
    large = Image.fromarray(BOTH.repeat(4, axis=0).repeat(4, axis=1) * np.uint8(255))
    for method in (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS):
        np.testing.assert_array_equal(mask(large.resize((WIDTH, HEIGHT), method)), BOTH)
    small = Image.fromarray(BOTH[::5, ::5] * np.uint8(255)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    assert mask(small).sum() > 100


@pytest.mark.parametrize("quality", [50, 90])
def test_jpeg_masks(quality, mask):
    assert (mask(BOTH * np.uint8(255), "jpg", quality=quality) ^ BOTH).mean() < 0.01
    assert "beside brighter ones" in mask(two(255, 100), "jpg", quality=quality)


def test_16_bit_colours_are_refused(mask):
    """Pillow keeps their higher byte: a 1 is lost."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.dstack([CLASSES] * 3))

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert "16 bits per colour" in mask(content)


@pytest.mark.parametrize("values", [-ONE.astype(np.int32), ONE.astype(np.int32) * 70000])
def test_values_out_of_range_are_refused(values, mask):
    assert "Allowed: 0..65535" in mask(values, "tif")


@pytest.mark.parametrize(
    "content",
    [
        b"10 10 30 20 1\n",
        b"\xef\xbb\xbf10 10 30 20 1\r\n",
        "10 10 30 20 1\r\n".encode("utf-16"),
        "\ufeff10 10 30 20 1\r\n".encode("utf-16-be"),
        b"10;10;30;20;1\r\n",
        b"10.0 10.0 30.0 20.0 1\n",
        b"10 10 30 20 Kratzer\xe4\n",
    ],
    ids=["plain", "BOM", "UTF-16", "UTF-16 BE", "semicolons", "floats", "Latin-1"],
)
def test_boxes_as_editors_write_them(content, mask):
    np.testing.assert_array_equal(mask(content, "txt"), ONE)


def test_boxes_as_shares_of_the_image_are_refused(mask):
    assert "Allowed: four integers x1 y1 x2 y2 in pixels" in mask(b"0 0.25 0.25 0.25 0.16\n", "txt")
