"""Find damage in image files that decoders do not report: wrong checksums, and ends that are missing."""

from __future__ import annotations

import re
import struct
import zlib
from typing import IO

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # neither stuffing, fill bytes nor restart markers
_END = 0xD9
_WITHOUT_LENGTH = (0x01, 0xD8)
CHECKED = (_PNG, _JPEG)
"""First bytes of the files that `check_complete` checks."""


def check_complete(content: bytes) -> None:
    """Check all checksums and the last chunk of a PNG (ISO 15948, 5.3), and the end marker of a JPEG (T.81, B.1.1).

    Bytes after the end are ignored. BMP, TIFF and WebP are not checked: they have neither checksums nor an end marker.

    Raises:
        ValueError: the file is damaged or incomplete.
    """
    if content.startswith(_PNG):
        _check_png(content)
    elif content.startswith(_JPEG):
        _check_jpeg(content)


def text_follows(file: IO[bytes]) -> bool:
    """Return whether an open PNG has EXIF or text behind its pixels, from the headers of its chunks alone.

    The position in the file stays the same.
    """
    place = file.tell()
    file.seek(len(_PNG))
    pixels = found = False
    while not found and len(header := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        pixels |= name == b"IDAT"
        found = pixels and name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
        file.seek(length + 4, 1)
    file.seek(place)
    return found


def _check_png(content: bytes) -> None:
    view = memoryview(content)
    start = len(_PNG)
    while start + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, start)
        end = start + 8 + length
        if end + 4 > len(content):
            break
        if zlib.crc32(view[start + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            raise ValueError(f"the checksum of the chunk {name.decode('latin-1')!a} is wrong")
        if name == b"IEND":
            return
        start = end + 4
    raise ValueError("it ends before its last chunk, IEND")


def _check_jpeg(content: bytes) -> None:
    start = len(_JPEG)
    while (marker := _MARKER.search(content, start)) is not None:
        start = marker.end()
        code = content[start - 1]
        if code == _END:
            return
        if code not in _WITHOUT_LENGTH:  # skip the segment: previews in it have end markers of their own
            start += int.from_bytes(content[start : start + 2], "big")
    raise ValueError("it has no end marker, EOI")
