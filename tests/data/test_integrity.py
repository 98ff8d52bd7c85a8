"""Damaged files are refused: the checksums of a PNG, the end of a PNG and a JPEG."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from normweave.data.images import decode
from normweave.data.integrity import text_follows
from normweave.errors import ImageError

SMOOTH = np.broadcast_to(np.linspace(40, 200, 64).astype(np.uint8)[:, None, None], (64, 48, 3))


def saved(ending, pixels=SMOOTH, **how):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, ending, **how)
    return buffer.getvalue()


def refusal(content, tmp_path):
    """The reason by path and from bytes, without the name; None if the image is read."""
    path = tmp_path / "part.image"
    path.write_bytes(content)
    reasons = []
    for source in (path, content):
        try:
            decode(source)
            reasons.append(None)
        except ImageError as error:
            reasons.append(str(error).removeprefix(f"{path}: ").removeprefix("bytes: "))
    assert reasons[0] == reasons[1]
    return reasons[0]


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98, 0.995])
@pytest.mark.parametrize("ending", ["PNG", "JPEG"])
def test_files_whose_end_is_zeros_are_refused(ending, share, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(ending, noise)
    length = int(len(whole) * share)
    assert "the file is truncated or corrupt" in refusal(whole[:length] + bytes(len(whole) - length), tmp_path)


@pytest.mark.parametrize("ending", ["PNG", "JPEG"])
@pytest.mark.parametrize("missing", [1, 2, 8, 12, 13])
def test_files_without_their_last_bytes_are_refused(ending, missing, tmp_path):
    assert refusal(saved(ending)[:-missing], tmp_path) is not None


@pytest.mark.parametrize("chunk", [b"IHDR", b"tEXt", b"IDAT", b"IEND"])
def test_a_changed_byte_in_any_chunk_of_a_png_is_found(chunk, tmp_path):
    content = bytearray(saved("PNG"))
    text = b"tEXt" + b"Comment\0line 3"
    content[33:33] = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    assert refusal(bytes(content), tmp_path) is None
    content[content.index(chunk) + (4 if chunk == b"IEND" else 6)] ^= 1
    assert f"the checksum of the chunk {chunk.decode()!r} is wrong" in refusal(bytes(content), tmp_path)


def test_a_png_without_its_last_chunk_is_refused(tmp_path):
    assert "ends before its last chunk, IEND" in refusal(saved("PNG")[:-12], tmp_path)


def test_a_chunk_longer_than_the_file_is_refused(tmp_path):
    content = saved("PNG")[:-12] + struct.pack(">I", 2**31) + b"tEXt"
    assert "ends before its last chunk, IEND" in refusal(content, tmp_path)


@pytest.mark.parametrize("ending", ["PNG", "JPEG"])
def test_bytes_after_the_end_are_ignored(ending, tmp_path):
    """Cameras append previews and maker notes."""
    assert refusal(saved(ending) + b"\0\0more", tmp_path) is None


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"comment": b"\xff\xd9"}])
def test_a_whole_jpeg_is_read_and_a_jpeg_without_end_marker_is_refused(how, tmp_path):
    content = saved("JPEG", **how)
    assert refusal(content, tmp_path) is None
    assert "it has no end marker, EOI" in refusal(content[:-2], tmp_path)
    assert "it has no end marker, EOI" in refusal(content[:-2] + bytes(2), tmp_path)


def test_the_end_marker_of_an_embedded_preview_is_not_the_end(tmp_path):
    exif = Image.Exif()
    exif[0x927C] = saved("JPEG")  # MakerNote with a whole JPEG
    content = saved("JPEG", exif=exif)
    assert refusal(content, tmp_path) is None
    assert "it has no end marker, EOI" in refusal(content[:-2], tmp_path)


def test_bytes_between_the_segments_and_fill_bytes_are_skipped(tmp_path):
    content = saved("JPEG")
    assert refusal(content[:2] + b"\xff\xff" + content[2:], tmp_path) is None


@pytest.mark.parametrize(("name", "found"), [(b"tEXt", True), (b"eXIf", True), (b"tIME", False)])
def test_text_behind_the_pixels_is_noticed(name, found):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    before = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) + chunk(b"tEXt", b"a\0b")
    file = io.BytesIO(before + chunk(b"IDAT", b"pixels") + chunk(name, b"a\0b") + chunk(b"IEND", b""))
    file.seek(5)
    assert text_follows(file) == found
    assert file.tell() == 5
