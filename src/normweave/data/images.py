"""Decode files, bytes and arrays to RGB images, and read masks."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from normweave.data import tiff
from normweave.data.integrity import check_complete
from normweave.errors import DataError, ImageError

ImageInput = str | os.PathLike[str] | bytes | NDArray[Any] | Image.Image
"""Path, the bytes of a file, array (height, width[, 1 | 3 | 4]), or PIL image."""

MAX_PIXELS = 150_000_000
"""Larger images are refused by their header: a file of some kilobytes can decode to gigabytes."""
SMALLEST_SIDE = 8
"""Pixels."""
MAX_DEFECT_TYPES = 15
"""A mask without higher values holds the numbers of defect types."""

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
READ = "PNG, JPEG, BMP, TIFF and WebP"

_STEPS = {  # mode -> modes that it is converted to, one after the other; modes that are not here: RGB
    "L": (),
    "F": (),
    "RGB": (),
    "1": ("L",),
    "LA": ("L",),
    "La": ("LA", "L"),  # colours multiplied by alpha: undone before alpha is dropped
    "P": ("RGBA", "RGB"),  # straight to RGB, Pillow warns of transparency
    "PA": ("RGBA", "RGB"),
}

_UPRIGHT: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    # EXIF tag 0x0112 (CIPA DC-008) -> the transform that makes the pixels upright
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: np.rot90(pixels),
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width

_filters = threading.Lock()


def decode(source: ImageInput) -> NDArray[np.uint8]:
    """Return an RGB image (H, W, 3), upright according to EXIF; the first of several frames.

    Of a TIFF with several pages, the first that is no preview; if a later one is larger, the file is refused.

    8-bit values are unchanged, 12-bit values of TIFF are divided by 4095 / 255 and 16-bit values by 257, and floats in
    0..1 multiplied by 255: fixed factors, so that brightness is comparable between images. Grey is repeated, alpha
    dropped, palettes and CMYK become RGB. (Pillow keeps only the higher byte of files with 16 bits per colour; 16-bit
    grey and arrays are rounded.)
    Every byte of a PNG is checked; BMP, JPEG, TIFF and WebP have no checksums, so changed pixels cannot be seen.

    Raises:
        ImageError: missing, empty, truncated, corrupt, not an image, too small, too large, or invalid values.
    """
    if isinstance(source, np.ndarray):
        _array_size(source, "array")
        return _rgb(_eight_bits(source, "array"))
    with _opened(source, whole=True) as (image, name):
        pixels = _pixels(image, name)
        if np.issubdtype(pixels.dtype, np.integer) and pixels.dtype not in (np.uint8, np.uint16, ">u2"):
            raise ImageError(
                f"{name}: signed or 32-bit integers from {pixels.min()} to {pixels.max()}; the full range is not "
                "known. Save it with 8 or 16 bits, unsigned."
            )
        return _rgb(_eight_bits(pixels, name))


def size(source: ImageInput) -> tuple[int, int]:
    """Return the (height, width) that `decode` returns, from the header if the format allows it.

    Raises:
        ImageError: as `decode`, except for errors that only decoding finds.
    """
    if isinstance(source, np.ndarray):
        return _array_size(source, "array")
    with _opened(source) as (image, _):
        width, height = image.size
        return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def content_hash(source: ImageInput) -> str:
    """Return the SHA-256 (hex) of a file's bytes, or of the shape, dtype and bytes of an array or decoded PIL image.

    Raises:
        ImageError: the file is missing or empty, or cannot be read.
    """
    if isinstance(source, Image.Image):
        source = decode(source)
    if isinstance(source, np.ndarray):
        digest = hashlib.sha256(f"{source.shape} {source.dtype.str} ".encode())
        digest.update(np.ascontiguousarray(source).tobytes())
        return digest.hexdigest()
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    path = _file(source)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def reading_version(path: str | os.PathLike[str]) -> str:
    """Return the version of the way in which a file's pixels are read, for the keys of what is computed from them.

    It is empty for formats whose pixels have always been the same.
    """
    return " tiff 2" if tiff.is_tiff(_start(Path(path))) else ""


def as_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return pixels (3, H, W) as a PIL image."""
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def as_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Return an RGB image of PIL as (3, H, W)."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def read_mask(path: str | os.PathLike[str], *, height: int, width: int) -> NDArray[np.bool_]:
    """Return the defect pixels (H, W) from an image, or from a text file of boxes.

    Image: a pixel is defective if its brightest channel is above 127 (of 255). If no value is above 15, every pixel
    above 0 is defective: such masks number the types of defect (VisA) or mark defects with 1. Masks with higher values,
    but none above 127, are refused, because they would be empty.
    Text (`.txt`): one box per line, `x1 y1 x2 y2` and anything after, in pixels; rows y1..y2-1, columns x1..x2-1.

    Raises:
        DataError: another size than its image, or invalid values or boxes.
        ImageError: missing or unreadable (also a DataError).
    """
    file = _file(path)
    if file.suffix.lower() == ".txt":
        return _boxes(file, height=height, width=width)
    with _opened(file, smallest_side=1, whole=True) as (image, name):
        pixels = _pixels(image, name)
    if pixels.shape[:2] != (height, width):
        raise DataError(
            f"{file}: the mask has {pixels.shape[0]} x {pixels.shape[1]} pixels, its image {height} x {width} "
            "(height x width). A mask must be as large as its image: export it again at that size."
        )
    values = pixels if pixels.ndim == 2 else pixels[..., :3].max(axis=2)
    highest = values.max()
    if np.issubdtype(values.dtype, np.unsignedinteger) and highest <= MAX_DEFECT_TYPES:
        return np.asarray(values > 0)
    mask = _eight_bits(values, name) > 127
    if highest > 0 and not mask.any():
        raise DataError(
            f"{file}: the mask has values up to {highest}, none of them above half of the range. Defect pixels are "
            "those above 127 of 255, or above 0 where no value is above 15. Save the mask as black and white."
        )
    return mask


def _boxes(path: Path, *, height: int, width: int) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), dtype=np.bool_)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            left, top, right, bottom = (int(value) for value in line.replace(",", " ").split()[:4])
        except ValueError:
            raise DataError(
                f"{path}: line {number} is {line.strip()!r}. Allowed: four integers x1 y1 x2 y2 in pixels, and "
                "anything after them. Correct the line."
            ) from None
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise DataError(
                f"{path}: line {number}, box {left} {top} {right} {bottom} (x1 y1 x2 y2) is empty or exceeds "
                f"its image of {height} x {width} (height x width). Allowed: 0 <= x1 < x2 <= {width} and "
                f"0 <= y1 < y2 <= {height}."
            )
        mask[top:bottom, left:right] = True
    return mask


@contextmanager
def _opened(
    source: ImageInput, *, smallest_side: int = SMALLEST_SIDE, whole: bool = False
) -> Iterator[tuple[Image.Image, str]]:
    """Yield the image, with its header read and its size checked, and its name; errors become ImageError.

    `whole`: read and check the whole file, not only its header.
    """
    if isinstance(source, Image.Image):
        _check_size(source.height, source.width, "PIL image", smallest_side)
        with _explained("PIL image"):
            yield source, "PIL image"
        return
    if isinstance(source, bytes):
        name = "bytes"
        if not source:
            raise ImageError("bytes: empty, 0 bytes. Give the complete content of an image file.")
    elif isinstance(source, (str, os.PathLike)):
        source = _file(source)
        name = str(source)
    else:
        raise ImageError(
            f"An image cannot be read from {type(source).__name__}. Allowed: a path, the bytes of a file, a numpy "
            "array (height, width, 3), a PIL image."
        )
    with _explained(name):
        if whole and isinstance(source, Path):
            source = source.read_bytes()
        if whole and isinstance(source, bytes):
            check_complete(source)
        with _quiet():
            try:
                image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
            except UnidentifiedImageError as error:
                if tiff.is_tiff(_start(source)):
                    raise ImageError(f"{name}: {tiff.UNKNOWN}") from error
                raise
        with image:
            if image.format == "TIFF":
                with _quiet():
                    tiff.select_page(image, name)
            _check_size(image.height, image.width, name, smallest_side)
            if image.format == "TIFF":
                length = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
                tiff.check_layout(image, name, length)
            yield image, name


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn Pillow's errors on the image `name` into ImageError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # Pillow raises many types of errors on corrupt files
        if isinstance(error, UnidentifiedImageError):
            reason = f"not an image that can be read. Allowed: {READ}. Convert the file."
        elif isinstance(error, Image.DecompressionBombError):
            reason = _too_large(str(error))
        elif isinstance(error, MemoryError):
            reason = "not enough memory to decode it. Shrink it or cut it into pieces."
        else:
            reason = f"cannot be decoded, the file is truncated or corrupt ({error}). Save or copy it again."
        raise ImageError(f"{name}: {reason}") from error


def _too_large(got: str) -> str:
    allowed = f"Allowed: up to {MAX_PIXELS:,} pixels. Shrink it or cut it into pieces."
    return f"too large, refused before decoding: {got}. {allowed}"


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    try:
        if path.is_dir():
            raise ImageError(f"{path}: is a folder, not an image. Give the images in it.")
        length = path.stat().st_size
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file. Check the path; current folder: {Path.cwd()}.") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if length == 0:
        raise ImageError(f"{path}: empty, 0 bytes. Copy or save the image again.")
    return path


def _start(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source[:4]
    with source.open("rb") as file:
        return file.read(4)


def _unreadable(path: Path, error: Exception) -> ImageError:
    return ImageError(f"{path}: cannot be read ({error}). Check the file and its permissions.")


def _check_size(height: int, width: int, name: str, smallest_side: int = SMALLEST_SIDE) -> None:
    if min(height, width) < smallest_side:
        raise ImageError(
            f"{name}: too small, {height} x {width} pixels (height x width). Allowed: {SMALLEST_SIDE} pixels or more "
            "per side. Give the original image, not its preview."
        )
    if height * width > MAX_PIXELS:
        raise ImageError(f"{name}: {_too_large(f'{height} x {width} pixels (height x width)')}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Pillow's warnings about large images (refused here) and unusual metadata (ignored).

    Warning filters are global, so one thread at a time changes them; decoding is outside.
    """
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # Pillow makes TIFFs upright itself, and returns the size of the upright image
    if image.format == "PNG":
        image.load()  # EXIF may follow the pixels; getexif would load them too, but inside `_quiet`
    with _quiet():
        try:
            return int(image.getexif().get(0x0112, 1))
        except Exception:  # corrupt EXIF does not affect the pixels
            return 1


def _pixels(image: Image.Image, name: str) -> NDArray[Any]:
    """Return the stored values, upright: (H, W) integers or float32, or (H, W, 3) uint8."""
    turn = _UPRIGHT.get(_orientation(image))
    _load(image)
    if image.format == "TIFF" and image.mode == "I":  # 16 bits signed, or 32
        pixels = np.asarray(image)
    elif image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ImageError(
                f"{name}: integers from {pixels.min()} to {pixels.max()}. Allowed: 0..65535 (16 bits). Save it with 8 "
                "or 16 bits."
            )
        pixels = pixels.astype(np.uint16)
    else:
        converted = image
        for mode in _STEPS.get(image.mode, ("RGB",)):
            converted = converted.convert(mode)
        pixels = np.asarray(converted)
    pixels = tiff.corrected(pixels, image)
    return pixels if turn is None else turn(pixels)


def _load(image: Image.Image) -> None:
    """Decode the pixels; a TIFF from its file, because Pillow turns it wrongly if it maps the file into memory."""
    path = getattr(image, "filename", "")
    if image.format == "TIFF" and path:
        image.filename = ""  # type: ignore[attr-defined]
        try:
            image.load()
        finally:
            image.filename = path  # type: ignore[attr-defined]
    else:
        image.load()


def _array_size(array: NDArray[Any], name: str) -> tuple[int, int]:
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        cure = "Give one image at a time."
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            cure = "Move the channels to the end: array.transpose(1, 2, 0)."
        raise ImageError(
            f"{name}: shape {array.shape}. Allowed: (height, width), (height, width, 1), (height, width, 3) or "
            f"(height, width, 4). {cure}"
        )
    height, width = array.shape[:2]
    _check_size(height, width, name)
    return height, width


def _eight_bits(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Return the array in 0..255, scaled by a factor that depends on its dtype only."""
    if array.dtype == np.uint8:
        return array
    if np.issubdtype(array.dtype, np.unsignedinteger) and array.dtype.itemsize == 2:  # either byte order
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(
            f"{name}: values of type {array.dtype}. Allowed: uint8, uint16, or float in 0..1. Convert it, for example "
            "with array.astype('uint8')."
        )
    if not np.isfinite(array).all():
        raise ImageError(f"{name}: NaN or infinite values. Allowed: floats in 0..1. Replace them.")
    if array.min() < 0 or array.max() > 1:
        raise ImageError(
            f"{name}: floats from {array.min():g} to {array.max():g}. Allowed: floats in 0..1. Divide it by the "
            "camera's range, which is the same for all images."
        )
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


def _rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a copy with three channels, (H, W, 3)."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    return np.array(pixels[:, :, :3], order="C")
