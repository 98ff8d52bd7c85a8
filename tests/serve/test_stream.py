"""Frames of a video by PyAV."""

import io

import numpy as np
import pytest
from PIL import Image

from feeders import write_video
from normweave.serve.stream import decoded
from normweave.serve.trigger import SMALL


def test_frames_have_their_time_their_size_and_their_pixels(tmp_path):
    made = [np.full((48, 80, 3), 40 * n, np.uint8) for n in range(5)]
    write_video(tmp_path / "film.mkv", made, rate=10)
    connected, *found = decoded(str(tmp_path / "film.mkv"), {}, live=False)
    assert connected is None
    assert [one.size for one in found] == [(48, 80)] * 5
    np.testing.assert_allclose([one.at for one in found], np.arange(5) / 10, atol=1e-3)
    for one, pixels in zip(found, made, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(one.content()))), pixels)
        assert one.grey().shape == (SMALL, SMALL)
        np.testing.assert_allclose(one.grey(), pixels[0, 0, 0], atol=3)
    assert next(frame for frame in decoded(str(tmp_path / "film.mkv"), {}, live=True) if frame).at is None


def test_messages_have_the_address_that_is_shown():
    with pytest.raises(OSError, match="the camera cannot be read: ") as caught:
        list(decoded("rtsp://ada:secret@127.0.0.1:9/line", {}, live=True, shown="the camera"))
    assert "secret" not in str(caught.value)
