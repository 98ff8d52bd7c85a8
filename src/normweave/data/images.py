"""Decode files, bytes and arrays to RGB images, and read masks."""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from normweave.data import masks, tiff
from normweave.data.integrity import check_complete, text_follows
from normweave.errors import DataError, ImageError

T = TypeVar("T")
ImageInput = str | os.PathLike[str] | bytes | NDArray[Any] | Image.Image
"""Path, `StoredImage`, the bytes of a file, array (height, width[, 1 | 3 | 4]), or PIL image."""

MAX_PIXELS = 150_000_000
"""Larger images are refused by their header: a file of some kilobytes can decode to gigabytes."""
MAX_SIDE = 65_535
"""Pixels, as in JPEG. A longer side is refused by the header: a thin image of few pixels would have many tiles."""
SMALLEST_SIDE = 8
"""Pixels."""

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
READ = "PNG, JPEG, BMP, TIFF and WebP"

# mode -> modes that it is converted to, one after the other; modes that are not here: RGB
_STEPS: Mapping[str, tuple[str, ...]] = {
    "L": (),
    "F": (),
    "RGB": (),
    "1": ("L",),
    "LA": ("L",),
    "La": ("LA", "L"),  # colours multiplied by alpha: undone before alpha is dropped
    "P": ("RGBA", "RGB"),  # straight to RGB, Pillow warns of transparency
    "PA": ("RGBA", "RGB"),
}
_MASK_STEPS: Mapping[str, tuple[str, ...]] = {
    # palettes and alpha stay: they mark the defects
    **_STEPS,
    "LA": (),
    "La": ("LA",),
    "RGBA": (),
    "RGBa": ("RGBA",),
    "P": (),
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
_WITH_ORIENTATION = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # keys of `Image.info`

_filters = threading.Lock()


class StoredImage(os.PathLike[str]):
    """An image that is no file of this machine. Its path names it in results and messages."""

    path: str

    @abstractmethod
    def read(self) -> bytes:
        """Return the content of the file.

        Raises:
            ImageError: it does not exist, or may not be read.
            DataError: the store does not answer, so that other images cannot be read either.
        """

    def __fspath__(self) -> str:
        """Return the path."""
        return self.path


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


def highest_of_16_bits(path: str | os.PathLike[str]) -> int | None:
    """Return the highest value of a file with 16 bits a sample, 0..65535, or None for other files; colours rounded up.

    Raises:
        ImageError: the file cannot be read.
    """
    with _opened(path) as (image, name):
        if _stored_bits(image) != 16:
            return None
        pixels = _pixels(image, name)
        highest = int(pixels.max())
        return highest * 256 + 255 if pixels.dtype == np.uint8 and highest else highest  # Pillow keeps the higher byte


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
    above 0 is defective: such masks number the types of defect (VisA) or mark defects with 1. In a palette every index
    above 0 is defective, whatever its colour. If all colours are the same, the alpha channel is the mask.
    Masks of which a part would be lost are refused: values none of which is above 127, a region of lower values beside
    one above 127, a palette whose index 0 may not be the background, alpha and colours that differ.
    Text (`.txt`): one box per line, `x1 y1 x2 y2` and anything after, in pixels; rows y1..y2-1, columns x1..x2-1.

    Raises:
        DataError: another size than its image, or invalid or ambiguous values or boxes.
        ImageError: missing or unreadable (also a DataError).
    """
    file = _file(path)
    if file.suffix.lower() == ".txt":
        try:
            return masks.from_boxes(file, height=height, width=width)
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(file, error) from error
    with _opened(file, smallest_side=1, whole=True) as (image, name):
        bits, mode = _stored_bits(image), image.mode
        if bits == 1 and tiff.is_white_zero(image):
            raise DataError(
                f"{name}: a mask with 1 bit of which 0 is white (tag 262): by some programs 1 marks the defect, by "
                "others it is black, the background. Save the mask with 8 bits, 0 and 255, or as PNG."
            )
        if mode == "PA":
            raise DataError(f"{name}: a palette with an alpha channel. Save the mask as black and white.")
        pixels = _pixels(image, name, _MASK_STEPS)
        if pixels.shape[:2] != (height, width):
            raise DataError(
                f"{file}: the mask has {pixels.shape[0]} x {pixels.shape[1]} pixels, its image {height} x {width} "
                "(height x width). A mask must be as large as its image: export it again at that size."
            )
        if mode == "P":
            return masks.from_indices(pixels, _colours(image), name)
        how: dict[str, Any] = {"bits": bits, "is_lossy": _is_lossy(image)}
        mask = masks.with_alpha if pixels.ndim == 3 and pixels.shape[2] != 3 else masks.from_values
        marked = mask(pixels, name, **how)
        if marked.all() and tiff.is_white_zero(image):
            raise DataError(f"{name}: 0 is white, so every pixel is marked (tag 262). Save the mask with 0 as black.")
        return marked


def _stored_bits(image: Image.Image) -> int:
    """Return the bits of a sample in the file; Pillow stretches 2 and 4 bits to 8, and shortens colours of 16."""
    if image.format == "TIFF":
        return tiff.bits(image)
    mode = image.tile[0][3] if image.format == "PNG" and image.tile else None  # type: ignore[attr-defined]
    digits = re.search(r";(\d+)", mode) if isinstance(mode, str) else None
    return 8 if digits is None else int(digits[1])


def _is_lossy(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO", "WEBP") or image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")


def _colours(image: Image.Image) -> NDArray[np.int64]:
    """Return the palette as RGBA, (256, 4); entries that it lacks are black."""
    colours = np.zeros((256, 4), dtype=np.int64)
    colours[:, 3] = 255
    palette = np.array(image.getpalette("RGB") or (), dtype=np.int64).reshape(-1, 3)[:256]
    colours[: len(palette), :3] = palette
    transparency = image.info.get("transparency")
    if isinstance(transparency, bytes):
        colours[: len(transparency), 3] = list(transparency[:256])
    elif isinstance(transparency, int):
        colours[transparency, 3] = 0
    return colours


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
            if source.format == "TIFF" and hasattr(source, "tag_v2"):
                tiff.check_layout(source, "PIL image", None)
            yield source, "PIL image"
        return
    name = "bytes"
    if isinstance(source, StoredImage):
        name, source = source.path, source.read()
    if isinstance(source, bytes):
        if not source:
            raise ImageError(f"{name}: empty, 0 bytes. Give the complete content of an image file.")
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
    allowed = f"Allowed: up to {MAX_PIXELS:,} pixels, and {MAX_SIDE:,} on a side. Shrink it or cut it into pieces."
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
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
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
        file = image.fp  # type: ignore[attr-defined]
        if file is None or text_follows(file):  # None: decoded before
            image.load()  # EXIF may be in it; getexif would load the pixels too, but inside `_quiet`
        elif not image.info.keys() & _WITH_ORIENTATION:
            return 1  # getexif would decode the pixels to look for it
    with _quiet():
        try:
            return int(image.getexif().get(0x0112, 1))
        except Exception:  # corrupt EXIF does not affect the pixels
            return 1


def _pixels(image: Image.Image, name: str, steps: Mapping[str, tuple[str, ...]] = _STEPS) -> NDArray[Any]:
    """Return the stored values, upright: (H, W) integers or float32, or (H, W, channels) uint8."""
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
        for mode in steps.get(image.mode, ("RGB",)):
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


def read_ahead(pool: ThreadPoolExecutor, work: Callable[[Any], T], items: Iterable[Any], count: int) -> Iterator[T]:
    """Yield the results of `work` in order, computed at most `count` items ahead."""
    running: deque[Future[T]] = deque()
    for item in items:
        running.append(pool.submit(work, item))
        if len(running) > count:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
