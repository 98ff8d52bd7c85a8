"""A GenICam camera: the simulated one of the package genicam, a real GenTL producer with three devices."""

import io
from contextlib import closing
from pathlib import Path

import genicam
import numpy as np
import pytest
from PIL import Image

from feeders import until
from inspections import ALL
from normweave.serve.source import check, frames
from normweave.serve.sources.genicam import Config, pixels

PRODUCER = str(Path(genicam.__file__).with_name("viky.cti"))


def source(**given):
    settings = {"producer": PRODUCER, "serial_number": "1", "retry_seconds": 0.05}
    return Config(type="genicam", name="top", **(settings | given))


def first(config):
    """Return the first frame of a source."""
    with closing(frames(config, max_bytes=2**25)) as found:
        return next(one for one in found if one is not None)


def test_frames_are_inspected_and_the_camera_is_free_again(run, service):
    config = source(features={"PixelFormat": "Mono8", "AcquisitionFrameRate": 20.0})
    runner = run(config)
    until(lambda: runner.counts["inspected"] >= 2)
    assert runner.state.status == "running"
    one = service.store.inspections(ALL, limit=1)[0]
    assert (one.source, one.outcome.height, one.outcome.width) == ("genicam", 400, 400)
    with pytest.raises(OSError, match="no other program uses it"):
        first(config)
    assert check(source(serial_number="2")).startswith("first image of 400 x 400 pixels")
    count = runner.counts["inspected"]
    until(lambda: runner.counts["inspected"] > count)  # another camera of the producer came and went
    runner.stop()
    assert check(config).startswith("first image of 400 x 400 pixels")


def test_grey_and_colour_are_read_as_they_are():
    for format, mode in (("Mono8", "L"), ("RGBa8", "RGB")):
        frame = first(source(features={"PixelFormat": format}))
        image = Image.open(io.BytesIO(frame.content()))
        assert (image.mode, image.size) == (mode, (400, 400))
        assert np.asarray(image).std() > 1
        assert frame.grey().shape == (32, 32)


def test_each_pixel_format_has_its_channels_and_the_same_white():
    colours = np.array([[1, 2, 3, 9]], np.uint8)
    assert pixels(colours[:, :3].ravel(), "RGB8", height=1, width=1).tolist() == [[[1, 2, 3]]]
    assert pixels(colours[:, :3].ravel(), "BGR8", height=1, width=1).tolist() == [[[3, 2, 1]]]
    assert pixels(colours.ravel(), "BGRa8", height=1, width=1).tolist() == [[[3, 2, 1]]]
    for format, white in (("Mono10", 1023), ("Mono12", 4095), ("Mono16", 65535)):
        assert pixels(np.array([0, white], np.uint16), format, height=1, width=2)[0, 1] >= 65472
    with pytest.raises(OSError, match=r"sends BayerRG8, which is not read\. Set PixelFormat in features"):
        pixels(colours, "BayerRG8", height=1, width=4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"producer": "missing.cti"}, "no GenTL producer missing.cti. Install the software"),
        ({"producer": "/etc/hostname"}, "is no GenTL producer of this machine"),
        ({"serial_number": "9"}, "serial_number 9; found: 0, 1, 2"),
        ({"serial_number": ""}, "finds 3 cameras: 0, 1, 2. Choose one by serial_number"),
        (
            {"features": {"PixelFormatt": "Mono8"}},
            "Unknown feature of the camera 'PixelFormatt'. Did you mean 'PixelFormat'",
        ),
        ({"features": {"PixelFormat": "Mono7"}}, "does not take 'Mono7' as PixelFormat.*It takes RGBa8, Mono8"),
        ({"features": {"Width": "wide"}}, "does not take 'wide' as Width"),
    ],
)
def test_what_is_wrong_is_named_with_the_cure(given, words):
    with pytest.raises(OSError, match=words):
        first(source(**given))
