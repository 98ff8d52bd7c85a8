import base64
import io

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from normweave.report.html import data_uri, percent, render


def test_values_are_escaped_and_undefined_ones_are_errors():
    values = {"version": "1", "provenance": [], "legend": [], "parts": [], "figures": []}
    assert "<h1>a &lt; b</h1>" in render("benchmark.html", title="a < b", **values)
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        render("benchmark.html", **values)


def test_shares_are_shown_in_per_cent():
    assert [percent(share) for share in (0.0, 0.1234, 1.0)] == ["0.0", "12.3", "100.0"]


def test_pixels_become_a_jpeg_uri():
    image = np.full((30, 50, 3), (200, 100, 50), dtype=np.uint8)
    head, _, data = data_uri(image).partition(",")
    assert head == "data:image/jpeg;base64"
    again = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_allclose(again, image, atol=3)


@pytest.mark.parametrize(("name", "head"), [("a.jpg", "data:image/jpeg"), ("a.svg", "data:image/svg+xml")])
def test_files_become_uris_with_their_content(tmp_path, name, head):
    (tmp_path / name).write_bytes(b"content")
    assert data_uri(tmp_path / name) == f"{head};base64,{base64.b64encode(b'content').decode()}"
