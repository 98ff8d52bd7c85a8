"""GenICam cameras (GigE Vision, USB3 Vision and others) by harvesters and the GenTL producer of their vendor."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from genicam.genapi import GenericException as FeatureError
from genicam.gentl import GenericException as TransportError
from harvesters.core import Harvester, ImageAcquirer
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from normweave.errors import unknown
from normweave.serve.source import Frame, Frames, SourceConfig
from normweave.serve.trigger import SMALL
from normweave.validation import checked

WAIT_SECONDS = 0.5
"""Longest wait for the next frame before the source yields None."""
CHANNELS = {
    "Mono8": [0], "RGB8": [0, 1, 2], "BGR8": [2, 1, 0], "RGBa8": [0, 1, 2], "BGRa8": [2, 1, 0],
    "Mono10": [0], "Mono12": [0], "Mono16": [0],
}  # fmt: skip
"""Pixel formats that are read, with the places of grey, or of red, green and blue."""
UNUSED_BITS = {"Mono10": 6, "Mono12": 4}
"""Upper bits without a value; the values are shifted there, so that each format has the same white."""

_quiet = logging.getLogger("normweave.harvesters")
_quiet.setLevel(logging.CRITICAL)  # each failure is raised, and logged by the source
_lock = threading.Lock()
_loaded: dict[str, tuple[Harvester, int]] = {}
"""Producers that are loaded, with the number of sources that use them."""


@checked
class Config(SourceConfig):
    """A camera, and the library of its vendor that reaches it."""

    type: Literal["genicam"]
    producer: str
    """GenTL producer: the .cti file of the vendor's software."""
    serial_number: str = ""
    """Of the camera; empty: the only one that the producer finds."""
    features: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Features that are set after connecting, in this order: PixelFormat, ExposureTime, TriggerMode, …"""


def frames(config: Config, *, max_bytes: int, on_drop: Callable[[int], None]) -> Frames:
    """Yield the complete frames of the camera."""
    if not Path(config.producer).is_file():
        raise ConnectionError(
            f"There is no GenTL producer {config.producer}. Install the software of the camera's vendor, and give its "
            ".cti file as producer."
        )
    try:
        with _shared(config.producer) as harvester:
            camera = _open(harvester, config)
            try:
                for name, value in config.features.items():
                    _set(camera.remote_device.node_map, name, value)
                camera.start()
                yield None
                while True:
                    values = _next(camera)
                    yield None if values is None else _frame(values)
            finally:
                with _lock:
                    camera.destroy()
    except TransportError as error:
        raise ConnectionError(
            f"The camera of {config.producer} cannot be used: {error}. Check its cable and power, and that no other "
            "program uses it."
        ) from error


@contextlib.contextmanager
def _shared(producer: str) -> Iterator[Harvester]:
    """Load a producer once for all cameras: a process that loads it twice does not find them. Looks for cameras first.

    Raises:
        OSError: it is no producer.
    """
    with _lock:
        harvester, users = _loaded.get(producer, (None, 0))
        if harvester is None:
            harvester = Harvester(logger=_quiet)
            try:
                harvester.add_file(producer, check_validity=True)
            except OSError as error:
                raise ConnectionError(f"{producer} is no GenTL producer of this machine: {error}.") from error
            harvester.update()
        _loaded[producer] = harvester, users + 1
    try:
        yield harvester
    finally:
        with _lock:
            harvester, users = _loaded.pop(producer)
            if users > 1:
                _loaded[producer] = harvester, users - 1
            else:
                harvester.reset()


def _open(harvester: Harvester, config: Config) -> ImageAcquirer:
    """Connect to the camera.

    Raises:
        OSError: there is none, or there are several to choose from.
    """
    serials = [str(one.serial_number) for one in harvester.device_info_list]
    if config.serial_number:
        if config.serial_number not in serials:
            found = ", ".join(serials) or "none"
            raise ConnectionError(
                f"No camera has the serial_number {config.serial_number}; found: {found}. Check its power and "
                "network. Cameras are looked for while no other source of this producer is connected."
            )
        with _lock:
            return harvester.create(serials.index(config.serial_number))
    if len(serials) != 1:
        raise ConnectionError(
            f"The producer finds {len(serials)} cameras{': ' if serials else ''}{', '.join(serials)}. "
            + ("Choose one by serial_number." if serials else "Check their power and network.")
        )
    with _lock:
        return harvester.create(0)


def _set(nodes: Any, name: str, value: bool | int | float | str) -> None:
    """Set a feature of the camera.

    Raises:
        OSError: it has no such feature, or does not take the value.
    """
    if not nodes.has_node(name):
        known = sorted(one.node.name for one in nodes.nodes)
        raise ConnectionError(str(unknown("feature of the camera", name, known, "Look it up in the vendor's viewer.")))
    node = getattr(nodes, name)
    try:
        node.value = value
    except (FeatureError, TypeError, ValueError) as error:
        allowed = f" It takes {', '.join(node.symbolics)}." if hasattr(node, "symbolics") else ""
        reason = str(error).split(" : ")[0].split(" (file")[0].rstrip(".")
        raise ConnectionError(
            f"The camera does not take {value!r} as {name}: {reason}.{allowed} Correct features of the source."
        ) from error


def _next(camera: ImageAcquirer) -> NDArray[np.unsignedinteger[Any]] | None:
    """Return a copy of the next frame, (H, W) or (H, W, 3); None: there is none yet."""
    buffer = camera.try_fetch(timeout=WAIT_SECONDS)
    if buffer is None:
        return None
    with buffer:
        (image, *_) = buffer.payload.components
        return pixels(image.data, image.data_format, height=image.height, width=image.width)


def pixels(
    data: NDArray[np.unsignedinteger[Any]], format: str, *, height: int, width: int
) -> NDArray[np.unsignedinteger[Any]]:
    """Return the values of a buffer as a new array, (H, W) or (H, W, 3) RGB, of 8 or 16 bits.

    Raises:
        OSError: the pixel format is not supported.
    """
    if format not in CHANNELS:
        raise ConnectionError(
            f"The camera sends {format}, which is not read. Set PixelFormat in features to one of "
            f"{', '.join(CHANNELS)}."
        )
    channels, unused = CHANNELS[format], UNUSED_BITS.get(format, 0)
    chosen = data.reshape(height, width, -1)[..., channels]
    values: NDArray[np.unsignedinteger[Any]] = np.left_shift(chosen, unused, dtype=data.dtype)
    return values[..., 0] if len(channels) == 1 else values


def _frame(values: NDArray[np.unsignedinteger[Any]]) -> Frame:
    return Frame(
        content=lambda: _png(values),
        grey=lambda: _grey(values),
        size=(values.shape[0], values.shape[1]),
        suffix=".png",
    )


def _png(values: NDArray[np.unsignedinteger[Any]]) -> bytes:
    """Return a frame as a PNG file, without loss."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png", compress_level=1)
    return file.getvalue()


def _grey(values: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.float32]:
    """Return a frame as (SMALL, SMALL) grey values."""
    eight = values if values.dtype == np.uint8 else np.right_shift(values, 8).astype(np.uint8)
    small = Image.fromarray(eight).convert("L").resize((SMALL, SMALL), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)
