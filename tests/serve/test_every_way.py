"""One picture has the same score by every way: encodings, path, bytes, array, REST, batches, both libraries."""

import base64

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from normweave.detector import Detector

RELATIVE = 1e-5


@pytest.fixture(scope="module")
def pixels(photos):
    return np.asarray(Image.open(photos[0]).convert("RGB"))


@pytest.fixture(scope="module")
def files(pixels, tmp_path_factory):
    """Lossless encodings of the picture."""
    folder = tmp_path_factory.mktemp("encodings")
    wide, planes = pixels.astype(np.uint16) * 257, np.moveaxis(pixels, 2, 0)
    reversed_ = np.ascontiguousarray(pixels[..., ::-1])
    content = {
        "a.png": cv2.imencode(".png", reversed_)[1].tobytes(),
        "b.png": imagecodecs.png_encode(wide),
        "c.bmp": cv2.imencode(".bmp", reversed_)[1].tobytes(),
        "d.webp": imagecodecs.webp_encode(pixels, lossless=True),
    }
    for name, encoded in content.items():
        (folder / name).write_bytes(encoded)
    for name, array, options in (
        ("e.tif", pixels, {}),
        ("f.tif", pixels, {"byteorder": ">"}),
        ("g.tif", wide, {}),
        ("h.tif", wide, {"byteorder": ">"}),
        ("i.tif", planes, {"planarconfig": "separate"}),
        ("j.tif", pixels, {"compression": "lzw", "predictor": True}),
        ("k.tif", pixels, {"compression": "zstd"}),
        ("l.tif", pixels, {"tile": (16, 16)}),
        ("m.tif", pixels, {"rowsperstrip": 7}),
        ("n.tif", planes, {"planarconfig": "separate", "tile": (16, 16)}),
        ("o.tif", np.dstack([pixels, pixels[..., :1]]), {"extrasamples": ["unassalpha"]}),
    ):
        tifffile.imwrite(folder / name, array, photometric="rgb", **options)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def expected(loaded, photos):
    return loaded.score(photos[0])


def same(scores, expected):
    np.testing.assert_allclose(scores, expected.pred_score, rtol=RELATIVE)


def test_every_encoding_by_path_and_from_bytes(loaded, files, expected):
    for path in files:
        for source in (path, str(path), path.read_bytes(), Image.open(path) if path.name[0] not in "bgh" else path):
            same(loaded.score(source).pred_score, expected)


def test_arrays(loaded, pixels, expected):
    for array in (pixels, np.asfortranarray(pixels), pixels.astype(np.uint16) * 257, (pixels / 255).astype(np.float32)):
        same(loaded.score(array).pred_score, expected)


@pytest.mark.parametrize("batch_images", [1, 5, 16])
def test_batches(loaded, files, photos, batch_images, expected):
    images = [*photos[1:4], *files, *photos[4:20]]
    outcomes = list(loaded.stream(images, batch_images=batch_images))
    same([outcome.pred_score for outcome in outcomes[3 : 3 + len(files)]], expected)


def test_rest(client, files, expected):
    def scores(answer):
        assert answer.status_code == 200, answer.text
        return [one["pred_score"] for one in answer.json()["inspections"]]

    same(scores(client.post("/v1/inspect", files=[("images", (p.name, p.read_bytes())) for p in files])), expected)
    encoded = [{"name": path.name, "data": base64.b64encode(path.read_bytes()).decode()} for path in files]
    same(scores(client.post("/v1/inspect", json={"images": encoded})), expected)


def test_openvino(bundle, files, expected):
    same([one.pred_score for one in Detector.load(bundle, threads=1, device="openvino").score(files)], expected)


def test_two_threads(bundle, files, expected):
    same([one.pred_score for one in Detector.load(bundle, threads=2, device="cpu").score(files)], expected)
