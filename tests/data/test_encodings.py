"""One picture in many encodings of independent writers: decoded to the same pixels, or refused with the reason.

The writers are tifffile, imagecodecs, OpenCV and ImageMagick; none of them shares code with the reader.
"""

import io
import shutil
import subprocess

import cv2
import imagecodecs as codecs
import numpy as np
import pytest
import tifffile

from normweave.data.images import decode
from normweave.errors import ImageError
from required import absent

H, W = 32, 48
ROWS, COLUMNS = np.mgrid[0:H, 0:W]
COLOUR = np.stack([40 + 4 * COLUMNS, 230 - 5 * ROWS, 30 + 2 * COLUMNS + 3 * ROWS], axis=2).astype(np.uint8)
"""Smooth, so that lossy encodings keep it; each turn, flip, inversion and order of channels changes it by far."""
GREY = COLOUR[..., 0] // 2 + COLOUR[..., 1] // 3
WIDE = GREY.astype(np.uint16) * 257
MAGICK = shutil.which("magick") or shutil.which("convert-im6")
"""The command of ImageMagick 7, or of 6 as Debian names it."""
LOSSY = 6
"""Largest mean difference of a lossy encoding, in grey levels. A flipped, inverted or otherwise wrong picture differs
by more than 18."""


def three(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def bilevel():
    return np.where(np.median(GREY) < GREY, 255, 0).astype(np.uint8)


def tifffile_encodings():
    """Yield (name, bytes, pixels, lossy)."""

    def written(array, **options):
        file = io.BytesIO()
        tifffile.imwrite(file, array, **options)
        return file.getvalue()

    planes = np.moveaxis(COLOUR, 2, 0)
    for order in "<>":
        name = {"<": "little", ">": "big"}[order]
        yield f"grey {name}", written(GREY, byteorder=order), three(GREY), False
        yield f"grey 16 {name}", written(WIDE, byteorder=order), three(GREY), False
        yield f"grey float {name}", written((GREY / np.float32(255)).astype("f4"), byteorder=order), three(GREY), False
        yield f"grey double {name}", written(GREY / 255, byteorder=order), None, False
        yield f"grey half {name}", written((GREY / 255).astype("f2"), byteorder=order), None, False
        yield f"colour {name}", written(COLOUR, photometric="rgb", byteorder=order), COLOUR, False
        wide = written(COLOUR.astype(np.uint16) * 257, photometric="rgb", byteorder=order)
        yield f"colour 16 {name}", wide, COLOUR, False
        planar = written(planes, photometric="rgb", planarconfig="separate", byteorder=order)
        yield f"planar {name}", planar, COLOUR, False
        wide = written(planes.astype(np.uint16) * 257, photometric="rgb", planarconfig="separate", byteorder=order)
        yield f"planar 16 {name}", wide, None, False
        yield (
            f"white is zero {name}",
            written(255 - GREY, photometric="miniswhite", byteorder=order),
            three(GREY),
            False,
        )
        wide = written(65535 - WIDE, photometric="miniswhite", byteorder=order)
        yield f"white is zero 16 {name}", wide, None if order == ">" else three(GREY), False
        yield f"signed {name}", written(GREY.astype(np.int8), byteorder=order), None, False
        yield f"signed 16 {name}", written(GREY.astype(np.int16), byteorder=order), None, False
        yield f"32 bits {name}", written(GREY.astype(np.uint32), byteorder=order), None, False
        big = written(COLOUR, photometric="rgb", bigtiff=True, byteorder=order)
        yield f"bigtiff {name}", big, None if order == ">" else COLOUR, False
    for compression in ("lzw", "zlib", "adobe_deflate", "packbits", "lzma", "zstd"):
        yield f"grey {compression}", written(GREY, compression=compression), three(GREY), False
        yield f"grey 16 {compression}", written(WIDE, compression=compression), three(GREY), False
        colour = written(COLOUR, photometric="rgb", compression=compression)
        yield f"colour {compression}", colour, COLOUR, False
        if compression != "packbits":
            colour = written(COLOUR, photometric="rgb", compression=compression, predictor=True)
            yield f"colour {compression} predictor", colour, COLOUR, False
            wide = written(WIDE, compression=compression, predictor=True)
            yield f"grey 16 {compression} predictor", wide, three(GREY), False
    yield "colour jpeg", written(COLOUR, photometric="rgb", compression="jpeg"), COLOUR, True
    for compression in ("png", "jpegxl", "jpeg2000"):
        yield f"colour {compression}", written(COLOUR, photometric="rgb", compression=compression), None, False
    yield "tiles", written(COLOUR, photometric="rgb", tile=(16, 16)), COLOUR, False
    yield "tiles planar", written(planes, photometric="rgb", planarconfig="separate", tile=(16, 16)), COLOUR, False
    yield "tiles 16 lzw", written(WIDE, tile=(16, 16), compression="lzw"), three(GREY), False
    yield "strips", written(COLOUR, photometric="rgb", rowsperstrip=5), COLOUR, False
    alpha = np.dstack([COLOUR, np.full((H, W), 200, np.uint8)])
    yield "alpha", written(alpha, photometric="rgb", extrasamples=["unassalpha"]), COLOUR, False
    yield (
        "alpha 16",
        written(alpha.astype(np.uint16) * 257, photometric="rgb", extrasamples=["unassalpha"]),
        COLOUR,
        False,
    )
    yield "spectral", written(np.dstack([COLOUR, COLOUR]), photometric="minisblack", planarconfig="contig"), None, False
    palette = np.stack([np.arange(256)[::-1] * 257] * 3).astype(np.uint16)
    yield "palette", written(255 - GREY, photometric="palette", colormap=palette), three(GREY), False
    # tifffile writes the bits as they are and says that 0 is white.
    yield "bilevel", written(bilevel() > 0), 255 - three(bilevel()), False
    yield "two equal pages", written(np.stack([GREY, GREY]), photometric="minisblack"), three(GREY), False


def opencv_encodings():
    def written(ending, array, *options):
        done, content = cv2.imencode(ending, array[..., ::-1] if array.ndim == 3 else array, list(options))
        assert done
        return content.tobytes()

    alpha = np.dstack([np.full((H, W), 200, np.uint8), COLOUR])  # reversed: B, G, R, A
    for ending in (".png", ".bmp", ".tif", ".jpg"):
        yield f"colour {ending}", written(ending, COLOUR), COLOUR, ending == ".jpg"
        yield f"grey {ending}", written(ending, GREY), three(GREY), ending == ".jpg"
    for ending in (".ppm", ".jp2", ".sr", ".avif", ".gif"):
        yield f"colour {ending}", written(ending, COLOUR), None, False
    for ending in (".png", ".tif"):
        yield f"grey 16 {ending}", written(ending, WIDE), three(GREY), False
        yield f"colour 16 {ending}", written(ending, COLOUR.astype(np.uint16) * 257), COLOUR, False
        yield f"alpha {ending}", written(ending, alpha), COLOUR, False
    yield "bilevel .png", written(".png", bilevel(), cv2.IMWRITE_PNG_BILEVEL, 1), three(bilevel()), False
    yield "progressive .jpg", written(".jpg", COLOUR, cv2.IMWRITE_JPEG_PROGRESSIVE, 1), COLOUR, True
    yield "restarts .jpg", written(".jpg", COLOUR, cv2.IMWRITE_JPEG_RST_INTERVAL, 2), COLOUR, True
    yield "colour .webp", written(".webp", COLOUR, cv2.IMWRITE_WEBP_QUALITY, 101), COLOUR, False
    yield "lossy .webp", written(".webp", COLOUR, cv2.IMWRITE_WEBP_QUALITY, 90), COLOUR, True
    for value, name in ((1, "none"), (5, "lzw"), (8, "deflate"), (32773, "packbits")):
        yield f"tiff {name}", written(".tif", COLOUR, cv2.IMWRITE_TIFF_COMPRESSION, value), COLOUR, False


def imagecodecs_encodings():
    for pixels, shown, name in ((COLOUR, COLOUR, "colour"), (GREY, three(GREY), "grey")):
        yield f"{name} png", codecs.png_encode(pixels), shown, False
        yield f"{name} apng", codecs.apng_encode(pixels), shown, False
        yield f"{name} bmp", codecs.bmp_encode(pixels), shown, False
        yield f"{name} jpeg", codecs.jpeg8_encode(pixels, level=95), shown, True
        yield f"{name} jpeg2k", codecs.jpeg2k_encode(pixels), None, False
        yield f"{name} jpegxl", codecs.jpegxl_encode(pixels, lossless=True), None, False
    yield "jpeg 4:4:4", codecs.jpeg8_encode(COLOUR, level=95, subsampling="444"), COLOUR, True
    stored = codecs.jpeg8_encode(COLOUR, level=95, colorspace="RGB", outcolorspace="RGB")
    yield "jpeg stored as RGB", stored, COLOUR, True
    yield "webp", codecs.webp_encode(COLOUR, lossless=True), COLOUR, False
    yield "png 16", codecs.png_encode(COLOUR.astype(np.uint16) * 257), COLOUR, False
    yield "grey lossless jpeg", codecs.ljpeg_encode(GREY), three(GREY), False
    yield "jpegls", codecs.jpegls_encode(COLOUR), None, False
    yield "qoi", codecs.qoi_encode(COLOUR), None, False


def imagemagick_encodings():
    if MAGICK is None:
        absent("imagemagick", "ImageMagick is not installed")
    picture = b"P6 %d %d 255\n" % (W, H) + COLOUR.tobytes()
    grey = b"P5 %d %d 255\n" % (W, H) + GREY.tobytes()

    def written(content, *options):
        return magick("-", *options, stdin=content)

    for name, options in {
        "png": ("png:-",),
        "png 16": ("-depth", "16", "png48:-"),
        "png 24": ("png24:-",),
        "png 32": ("png32:-",),
        "png 64": ("png64:-",),
        "png interlaced": ("-interlace", "PNG", "png:-"),
        "bmp": ("bmp:-",),
        "bmp 2": ("bmp2:-",),
        "bmp 3": ("bmp3:-",),
        "bmp 4 alpha": ("-alpha", "set", "bmp:-"),
        "tiff": ("tiff:-",),
        "tiff 64": ("tiff64:-",),
        "tiff 16": ("-depth", "16", "tiff:-"),
        "tiff 16 big": ("-depth", "16", "-endian", "MSB", "tiff:-"),
        "tiff planar": ("-interlace", "plane", "tiff:-"),
        "tiff lzw": ("-compress", "LZW", "tiff:-"),
        "tiff zip": ("-compress", "Zip", "tiff:-"),
        "tiff rle": ("-compress", "RLE", "tiff:-"),
        "tiff bits reversed": ("-define", "tiff:fill-order=lsb", "tiff:-"),
        "tiff tiles": ("-define", "tiff:tile-geometry=16x16", "tiff:-"),
        "tiff alpha": ("-alpha", "set", "tiff:-"),
        "tiff alpha associated": ("-alpha", "set", "-define", "tiff:alpha=associated", "tiff:-"),
        "webp": ("-define", "webp:lossless=true", "webp:-"),
    }.items():
        yield name, written(picture, *options), COLOUR, False
    for name, options in {
        "jpeg": ("-quality", "95", "jpeg:-"),
        "jpeg progressive": ("-quality", "95", "-interlace", "JPEG", "jpeg:-"),
        "jpeg 4:4:4": ("-quality", "95", "-sampling-factor", "4:4:4", "jpeg:-"),
        "jpeg cmyk": ("-quality", "95", "-colorspace", "CMYK", "jpeg:-"),
        "tiff jpeg": ("-quality", "95", "-compress", "JPEG", "tiff:-"),
        "tiff cmyk": ("-colorspace", "CMYK", "tiff:-"),
        "tiff lab": ("-colorspace", "Lab", "tiff:-"),
        "tiff ycbcr": ("-colorspace", "YCbCr", "tiff:-"),
        "webp lossy": ("-quality", "95", "webp:-"),
        "png 8": ("-dither", "None", "-colors", "256", "png8:-"),
    }.items():
        yield name, written(picture, *options), COLOUR, True
    for name, options in {
        "grey png": ("png:-",),
        "grey png 16": ("-depth", "16", "png:-"),
        "grey bmp": ("bmp:-",),
        "grey tiff": ("tiff:-",),
        "grey tiff alpha": ("-alpha", "set", "tiff:-"),
        "grey webp": ("-define", "webp:lossless=true", "webp:-"),
    }.items():
        yield name, written(grey, *options), three(GREY), False
    for name, options in {
        "png": ("png8:-",),
        "bmp rle": ("-compress", "RLE", "bmp:-"),
        "tiff": ("tiff:-",),
        "tiff lzw": ("-compress", "LZW", "tiff:-"),
    }.items():
        yield f"palette {name}", written(grey, "-type", "Palette", *options), three(GREY), True
    for depth in ("8", "16"):
        # ImageMagick writes the values as they are and says that 0 is white; so it reads them.
        content = written(grey, "-depth", depth, "-define", "quantum:polarity=min-is-white", "tiff:-")
        yield f"white is zero {depth}", content, 255 - three(GREY), False
    for name, options in {
        "tiff float": ("-define", "quantum:format=floating-point", "-depth", "32", "tiff:-"),
        "tiff planar 16": ("-interlace", "plane", "-depth", "16", "tiff:-"),
        **{name: (f"{name}:-",) for name in ("ppm", "tga", "pcx", "sgi", "psd", "dib", "gif", "miff", "xpm", "fits")},
    }.items():
        yield f"refused {name}", written(picture, *options), None, False
    for name, options in {
        "bilevel png": ("png:-",),
        "bilevel tiff": ("tiff:-",),
        "bilevel group 4": ("-compress", "Group4", "tiff:-"),
        "bilevel fax": ("-compress", "Fax", "tiff:-"),
        "bilevel bmp": ("bmp3:-",),
    }.items():
        stored = b"P5 %d %d 255\n" % (W, H) + bilevel().tobytes()
        yield name, written(stored, "-type", "bilevel", *options), three(bilevel()), False
    turned = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 6: lambda a: np.rot90(a, -1), 8: np.rot90}
    for number, name in enumerate(
        ("TopRight", "BottomRight", "BottomLeft", "LeftTop", "RightTop", "RightBottom", "LeftBottom"), 2
    ):
        if number in turned:
            yield f"tiff {name}", written(picture, "-orient", name, "tiff:-"), turned[number](COLOUR), False


def magick(*arguments, stdin=b""):
    """Return the output; a warning is an error code with an output."""
    content = subprocess.run([MAGICK, *arguments], input=stdin, capture_output=True, check=False).stdout
    assert content, arguments
    return content


WRITERS = {
    "tifffile": (tifffile_encodings, 70),
    "OpenCV": (opencv_encodings, 25),
    "imagecodecs": (imagecodecs_encodings, 15),
    "ImageMagick": (imagemagick_encodings, 65),
}
"""The encodings of each writer, and their least number."""


@pytest.mark.parametrize("writer", WRITERS)
def test_the_picture_is_decoded_to_its_pixels_or_refused(writer):
    encodings, least = WRITERS[writer]
    found, count = {}, 0
    for name, content, pixels, lossy in encodings():
        count += 1
        if wrong := fault(content, pixels, lossy):
            found[name] = wrong
    assert not found
    assert count >= least


def fault(content, expected, lossy):
    """Return what is wrong with the decoded pixels, or with their refusal if `expected` is None; else None."""
    try:
        pixels = decode(content)
    except ImageError as error:
        cured = any(word in str(error) for word in ("Save it", "Convert the file", "copy it again"))
        return None if expected is None and cured else f"refused: {error}"
    if expected is None:
        return f"decoded to {pixels.min()}..{pixels.max()}"
    if pixels.shape != expected.shape:
        return f"{pixels.shape} instead of {expected.shape}"
    difference = np.abs(pixels.astype(int) - expected)
    right = difference.mean() <= LOSSY if lossy else difference.max() == 0
    return None if right else f"differs by {difference.mean():.1f} on average"


@pytest.mark.parametrize("wrong", [lambda a: a[::-1], lambda a: a[:, ::-1], lambda a: 255 - a, lambda a: a[..., ::-1]])
def test_a_wrong_picture_is_beyond_the_tolerance_of_lossy_encodings(wrong):
    assert np.abs(wrong(COLOUR).astype(int) - COLOUR).mean() > 3 * LOSSY
