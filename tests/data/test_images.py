"""Every format and every refusal, with pixels known from other sources."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from normweave.data.images import content_hash, decode, read_mask, size
from normweave.errors import DataError, ImageError


@pytest.fixture
def pixels():
    """(12, 20, 3): every pixel another colour, no symmetry, so that any turn or swap shows."""
    rows, columns = np.mgrid[0:12, 0:20]
    return np.stack([rows * 20, columns * 12, rows + columns], axis=2).astype(np.uint8)


def saved(image, ending, **how):
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()), **how)
    return buffer.getvalue()


def png(height, width, *, bits=8, colour=2, rows=b"", extra=b""):
    """A PNG by hand (ISO 15948), for what Pillow does not write."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + extra
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp"])
def test_lossless_formats_come_back_exactly(pixels, ending, tmp_path):
    how = {"lossless": True} if ending == "webp" else {}
    path = tmp_path / f"part.{ending}"
    path.write_bytes(saved(Image.fromarray(pixels), ending, **how))
    np.testing.assert_array_equal(decode(path), pixels)
    np.testing.assert_array_equal(decode(str(path)), pixels)
    np.testing.assert_array_equal(decode(path.read_bytes()), pixels)
    assert size(path) == (12, 20)


def test_jpeg_comes_back_nearly():
    smooth = np.broadcast_to(np.linspace(40, 200, 64).astype(np.uint8)[:, None, None], (64, 48, 3))
    got = decode(saved(Image.fromarray(smooth), "jpg", quality=95))
    assert got.shape == (64, 48, 3)
    assert np.abs(got.astype(int) - smooth).max() <= 3


def test_grey_is_repeated(pixels):
    grey = pixels[..., 0]
    np.testing.assert_array_equal(decode(saved(Image.fromarray(grey), "png")), np.stack([grey] * 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_not_blended(pixels, mode):
    want = pixels if mode == "RGBA" else np.stack([pixels[..., 0]] * 3, axis=2)
    image = Image.fromarray(want).convert(mode)
    image.putalpha(7)
    np.testing.assert_array_equal(decode(saved(image, "png")), want)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_that_was_multiplied_in_is_divided_out(mode):
    grey = Image.new("L", (9, 9), 100).convert(mode)
    grey.putalpha(128)
    assert np.abs(decode(grey.convert(mode[:-1] + "a")).astype(int) - 100).max() <= 1


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(240))])
def test_palette_gives_its_colours_and_no_warning(transparency):
    indices = np.arange(240, dtype=np.uint8).reshape(12, 20)
    colours = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2], axis=1).astype(np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    how = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(decode(saved(image, "png", **how)), colours[indices])


def test_cmyk_becomes_rgb():
    ink = np.zeros((10, 10, 4), np.uint8)
    ink[:5, :, 0] = 255  # cyan: no red
    ink[5:, :, 3] = 255  # key: black
    got = decode(saved(Image.fromarray(ink, "CMYK"), "tif"))
    assert got[0, 0].tolist() == [0, 255, 255]
    assert got[9, 0].tolist() == [0, 0, 0]


def test_one_bit():
    bits = np.eye(16, dtype=bool)
    np.testing.assert_array_equal(decode(saved(Image.fromarray(bits), "png"))[..., 1], bits * 255)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_grey_is_divided_by_257_whatever_the_image_holds(ending):
    dark = np.arange(0, 16 * 100, 100, dtype=np.uint16).reshape(1, 16).repeat(16, axis=0)
    got = decode(saved(Image.fromarray(dark), ending))[..., 0]
    np.testing.assert_array_equal(got, np.rint(dark / 257))
    assert got.max() == 6  # a dark image stays dark
    assert decode(saved(Image.fromarray(np.full((9, 9), 65535, np.uint16)), ending)).min() == 255


def test_16_bit_colour_png():
    colours = np.array([[[0, 65535, 257 * 100]]], np.uint16).repeat(9, axis=0).repeat(9, axis=1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    got = decode(png(9, 9, bits=16, rows=rows))
    assert got[4, 4].tolist() == [0, 255, 100]


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_makes_the_image_upright(ending, orientation):
    """An upright image with its brightest corner top left, stored as each camera orientation would (CIPA DC-008)."""
    upright = np.zeros((32, 48), np.uint8)
    upright[:8, :8], upright[:8, -8:] = 255, 128
    # The tag is the position of the stored first row and column: the inverse of the transform to upright.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = saved(Image.fromarray(np.ascontiguousarray(stored)).convert("RGB"), ending, exif=exif)
    got = decode(source)[..., 0].astype(int)
    assert got.shape == upright.shape == size(source)
    assert np.abs(got - upright)[[2, 2, -3, -3], [2, -3, 2, -3]].max() < 20


def test_exif_after_the_pixels_is_used(pixels):
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    source = png(12, 20, rows=b"".join(b"\0" + row.tobytes() for row in pixels), extra=chunk)
    assert size(source) == (20, 12) == decode(source).shape[:2]


def test_the_size_of_a_png_is_read_without_its_pixels(pixels, monkeypatch, tmp_path):
    path = tmp_path / "part.png"
    Image.fromarray(pixels).save(path)

    def decoded(*_):
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    assert size(path) == size(path.read_bytes()) == pixels.shape[:2]


def test_corrupt_exif_is_ignored():
    source = saved(Image.new("RGB", (20, 12), (9, 8, 7)), "png", exif=b"Exif\0\0no TIFF header")
    assert decode(source)[0, 0].tolist() == [9, 8, 7]


@pytest.mark.parametrize("ending", ["tif", "webp", "png"])
def test_of_several_pages_the_first(ending):
    pages = [Image.new("RGB", (16, 16), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    how = {"lossless": True} if ending == "webp" else {}
    assert decode(saved(pages[0], ending, save_all=True, append_images=pages[1:], **how))[0, 0].tolist() == [
        200,
        0,
        0,
    ]


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "float32", "float64", "float16"])
def test_arrays(channels, dtype):
    random = np.random.default_rng(0)
    eight = random.integers(0, 256, (9, 11) if channels is None else (9, 11, channels), dtype=np.uint8)
    factor = {"u": 257, "f": 1 / 255}[np.dtype(dtype).kind] if dtype != "uint8" else 1
    got = decode((eight * np.float64(factor)).astype(dtype))
    want = eight[..., None] if channels is None else eight[..., :3]
    np.testing.assert_array_equal(got, np.broadcast_to(want, (9, 11, 3)))
    assert got.dtype == np.uint8


def test_the_result_is_a_copy(pixels):
    got = decode(pixels)
    before = got.copy()
    pixels[:] = 0
    np.testing.assert_array_equal(got, before)


def test_pil_image(pixels):
    np.testing.assert_array_equal(decode(Image.fromarray(pixels)), pixels)
    assert size(Image.fromarray(pixels)) == (12, 20)


def test_float_tiff_in_0_to_1():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    np.testing.assert_array_equal(decode(saved(Image.fromarray(ramp), "tif"))[..., 0].ravel(), np.arange(256))


NAN = np.full((9, 9), np.nan, np.float32)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (b"", "bytes: empty, 0 bytes"),
        (b"no image at all", "not an image that can be read. Allowed: PNG, JPEG, BMP, TIFF and WebP"),
        (saved(Image.new("L", (9, 9)), "gif"), "not an image that can be read"),
        (
            saved(Image.new("L", (1, 1)), "png"),
            r"too small, 1 x 1 pixels .* Allowed: 8 pixels or more per side",
        ),
        (saved(Image.new("L", (7, 900)), "png"), "too small, 900 x 7 pixels"),
        (
            png(20000, 20000),
            "too large, refused before decoding: .*400000000 pixels.* Allowed: up to 150,000,000",
        ),
        (png(13000, 12000), r"too large, refused before decoding: 13000 x 12000 pixels \(height x width\)"),
        (png(8, 6_000_000), r"too large, refused before decoding: 8 x 6000000 .*, and 65,535 on a side"),
        (png(65_536, 9), "too large, refused before decoding: 65536 x 9 pixels"),
        (png(100, 100, rows=b"\0" * 50), "truncated or corrupt"),
        (np.zeros((9, 9), np.int64), "values of type int64. Allowed: uint8, uint16, or float in 0..1"),
        (np.zeros((9, 9), bool), "values of type bool"),
        (np.zeros((3, 9, 9), np.uint8), r"shape \(3, 9, 9\).*transpose\(1, 2, 0\)"),
        (np.zeros((2, 9, 9, 3), np.uint8), r"shape \(2, 9, 9, 3\).*one image at a time"),
        (np.zeros((9, 9, 2), np.uint8), r"shape \(9, 9, 2\)\. Allowed: \(height, width\)"),
        (np.zeros((0, 9, 3), np.uint8), "too small, 0 x 9"),
        (NAN, "array: NaN or infinite values. Allowed: floats in 0..1"),
        (saved(Image.fromarray(NAN), "tif"), "bytes: NaN or infinite values"),
        (np.full((9, 9), np.inf), "NaN or infinite"),
        (np.full((9, 9), 200.0), "floats from 200 to 200. Allowed: floats in 0..1"),
        (
            saved(Image.fromarray(np.full((9, 9), 70000, np.int32)), "tif"),
            r"integers from 70000 to 70000.*16 bits",
        ),
        (42, "cannot be read from int. Allowed: a path"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_invalid_inputs_are_refused(source, text):
    with pytest.raises(ImageError, match=text):
        decode(source)


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(ending, share, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise), ending)
    path = tmp_path / f"part.{ending}"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match=r"part\.\w+: (cannot be decoded|not an image)"):
        decode(path)


def test_paths_that_are_not_images(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image\n")
    with pytest.raises(ImageError, match=r"gone\.png: no such file. Check the path"):
        decode(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="is a folder, not an image"):
        decode(tmp_path)
    with pytest.raises(ImageError, match=r"empty\.png: empty, 0 bytes"):
        decode(tmp_path / "empty.png")
    with pytest.raises(ImageError, match=r"text\.png: not an image"):
        decode(tmp_path / "text.png")
    with pytest.raises(ImageError, match="cannot be read"):
        decode("nul\0inside.png")


def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch):
    def explode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", explode)
    with pytest.raises(ImageError, match="too large, refused before decoding"):
        decode(png(20000, 20000))
    with pytest.raises(ImageError, match="too large, refused before decoding"):
        size(saved(Image.new("1", (13000, 12000)), "tif"))


def test_size_of_a_jpeg_is_read_without_its_pixels():
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96), dtype=np.uint8)), "jpg")
    assert size(whole[:700]) == (64, 96)


def test_warnings_are_suppressed_and_the_callers_filters_stay():
    """100 million pixels make Pillow warn; warnings are errors here, from as many threads as there are."""
    source = png(10000, 10000, bits=1, colour=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(lambda _: _reason(source), range(12))) == {"truncated"}
        assert warnings.filters == before


def _reason(source):
    try:
        decode(source)
    except ImageError as error:
        return "truncated" if "truncated or corrupt" in str(error) and "bomb" not in str(error) else str(error)
    return "decoded"


def test_content_hash(tmp_path, pixels):
    """Published value: sha256 of "abc" (FIPS 180-2, B.1)."""
    (tmp_path / "abc.png").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert content_hash(tmp_path / "abc.png") == content_hash(b"abc") == known
    assert content_hash(pixels) == content_hash(Image.fromarray(pixels)) == content_hash(pixels[:, ::-1][:, ::-1])
    assert content_hash(pixels) != content_hash(pixels.reshape(20, 12, 3))
    assert content_hash(pixels) != content_hash(pixels.view(np.int8))
    with pytest.raises(ImageError, match="no such file"):
        content_hash(tmp_path / "gone.png")


@pytest.fixture
def masked(tmp_path):
    """Write an array or image as a mask file and return its path."""

    def write(mask, ending="png"):
        path = tmp_path / f"mask.{ending}"
        (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(path)
        return path

    return write


TRUTH = np.zeros((12, 20), bool)
TRUTH[2:5, 3:9] = True


def painted(colour):
    image = Image.new("P", (20, 12))
    image.putpalette([0, 0, 0, *colour])
    image.paste(1, (3, 2, 9, 5))
    return image


@pytest.mark.parametrize(
    "mask",
    [
        TRUTH * np.uint8(255),
        TRUTH * np.uint8(128),
        TRUTH * np.uint8(1),
        TRUTH * np.where(np.arange(20) % 2, 3, 9).astype(np.uint8),
        TRUTH,
        TRUTH * np.uint16(65535),
        TRUTH * np.uint16(1),
        TRUTH[..., None] * np.array([255, 0, 0], np.uint8),
        np.dstack([TRUTH * np.uint8(255)] * 3 + [np.full((12, 20), 255, np.uint8)]),
        painted((128, 0, 0)),
    ],
    ids=[
        "0-255",
        "0-128",
        "0-1",
        "defect types",
        "1-bit",
        "16-bit",
        "16-bit 0-1",
        "red",
        "RGBA",
        "palette",
    ],
)
def test_all_mask_formats(mask, masked):
    np.testing.assert_array_equal(read_mask(masked(mask), height=12, width=20), TRUTH)


def test_an_empty_mask_is_empty(masked):
    assert not read_mask(masked(np.zeros((12, 20), np.uint8)), height=12, width=20).any()


def test_invalid_masks_are_refused(masked, tmp_path):
    with pytest.raises(DataError, match=r"the mask has 12 x 20 pixels, its image 20 x 12 \(height x width\)"):
        read_mask(masked(TRUTH), height=20, width=12)
    with pytest.raises(DataError, match="values up to 100, none of them above half of the range"):
        read_mask(masked(TRUTH * np.uint8(100)), height=12, width=20)
    with pytest.raises(DataError, match=r"values up to 16.*or above 0 where no value is above 15"):
        read_mask(masked(TRUTH * np.uint8(16)), height=12, width=20)
    with pytest.raises(ImageError, match="no such file"):
        read_mask(tmp_path / "gone.png", height=12, width=20)


def test_boxes_are_filled(tmp_path):
    path = tmp_path / "boxes.txt"
    path.write_text("3 2 9 5 1\n\n0,10,20,12,6\n")
    want = TRUTH.copy()
    want[10:] = True
    np.testing.assert_array_equal(read_mask(path, height=12, width=20), want)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("3 2 9 5\n1 2 3\n", "line 2 is '1 2 3'. Allowed: four integers x1 y1 x2 y2"),
        ("a b c d", "line 1 is 'a b c d'"),
        ("3 2 3 5 1", "box 3 2 3 5 .* is empty or exceeds its image of 12 x 20"),
        ("3 2 21 5 1", "box 3 2 21 5 .* 0 <= x1 < x2 <= 20 and 0 <= y1 < y2 <= 12"),
    ],
)
def test_invalid_boxes_are_refused(text, reason, tmp_path):
    path = tmp_path / "boxes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        read_mask(path, height=12, width=20)


def test_boxes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "boxes.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ImageError, match="cannot be read"):
        read_mask(path, height=12, width=20)
