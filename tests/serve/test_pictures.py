"""Image files as frames."""

import io

import numpy as np
import pytest
from PIL import Image

from normweave.errors import ImageError
from normweave.serve.pictures import frame, grey
from normweave.serve.trigger import SMALL


def test_a_file_is_kept_and_shrunk_only_when_asked():
    file = io.BytesIO()
    Image.new("RGB", (100, 50), (90, 90, 90)).save(file, "png")
    one = frame(file.getvalue(), part="17", view="front")
    assert (one.content(), one.part, one.view) == (file.getvalue(), "17", "front")
    np.testing.assert_array_equal(one.grey(), np.full((SMALL, SMALL), 90, np.float32))


def test_what_is_no_image_has_no_grey_values():
    assert frame(b"torn").content() == b"torn"
    with pytest.raises(ImageError):
        grey(b"torn")
