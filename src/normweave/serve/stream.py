"""Frames of a video stream or file by PyAV, which is FFmpeg."""

from __future__ import annotations

import io
from collections.abc import Mapping

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from PIL import Image

from normweave.serve.source import Frame, Frames
from normweave.serve.trigger import SMALL

OPEN_SECONDS, READ_SECONDS = 10.0, 5.0
"""Longest wait for a connection, and for the next bytes of a stream."""


def decoded(
    where: str, options: Mapping[str, str], *, live: bool, format: str | None = None, shown: str | None = None
) -> Frames:
    """Yield the frames of a stream.

    Args:
        where: address or path.
        options: of FFmpeg.
        live: whether frames have the time of their arrival.
        format: of FFmpeg; None: it is recognised.
        shown: address without secrets, for messages.

    Raises:
        OSError: it cannot be read; the message has no secrets.
    """
    try:
        container = av.open(where, format=format, options=dict(options), timeout=(OPEN_SECONDS, READ_SECONDS))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise _failure(shown or where, error) from None  # the first error has the address with the password
    try:
        yield from _frames(container, live=live)
    except av.error.FFmpegError as error:
        raise _failure(shown or where, error) from None
    finally:
        container.close()


def _frames(container: InputContainer, *, live: bool) -> Frames:
    if not container.streams.video:
        raise ConnectionError("It has no video. Give the address of a video stream.")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    yield None
    for number, frame in enumerate(container.decode(stream)):
        at = None if live else float(frame.time) if frame.time is not None else float(number)
        yield Frame(
            content=lambda frame=frame: png(frame),  # type: ignore[misc]  # bound now
            grey=lambda frame=frame: grey(frame),  # type: ignore[misc]
            size=(frame.height, frame.width),
            at=at,
            suffix=".png",
        )


def png(frame: VideoFrame) -> bytes:
    """Return a frame as a PNG file, without loss."""
    file = io.BytesIO()
    Image.fromarray(frame.to_ndarray(format="rgb24")).save(file, "png", compress_level=1)
    return file.getvalue()


def grey(frame: VideoFrame) -> NDArray[np.float32]:
    """Return a frame as (SMALL, SMALL) grey values."""
    small = frame.reformat(width=SMALL, height=SMALL, format="gray", interpolation="AREA")
    return small.to_ndarray().astype(np.float32)


def _failure(shown: str, error: Exception) -> OSError:
    reason = getattr(error, "strerror", None) or type(error).__name__
    return ConnectionError(f"{shown} cannot be read: {reason}. Check that it sends video, and its name and password.")
