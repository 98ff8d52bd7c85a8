"""Images from which nothing can be learned are refused with what is wrong with them."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from normweave.config import Config, DataConfig, DFMConfig
from normweave.data import degenerate
from normweave.data.degenerate import refuse_degenerate
from normweave.errors import DataError
from normweave.fitting import divide
from normweave.types import Sample

NOISE = np.random.default_rng(0).integers(90, 160, (8, 16, 16, 3), dtype=np.uint8)
TEXTURE = NOISE[0]
BLACK = np.zeros_like(TEXTURE)


@pytest.fixture
def saved(tmp_path):
    """Save arrays as files that all have other bytes, and return their samples."""

    def save(arrays, **fields):
        samples = []
        for number, array in enumerate(arrays):
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
            text = PngImagePlugin.PngInfo()
            text.add_text("number", f"{path.name} {number}")
            Image.fromarray(array).save(path, pnginfo=text)
            samples.append(Sample(image_path=path, **{"category": "cloth"} | fields))
        return samples

    return save


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ([BLACK] * 8, r"Each of the 8 good images of category cloth has one colour only, .*0\.png is 0, 0, 0 "),
        ([BLACK + 255] * 8, r"one colour only, .* is 255, 255, 255 .* Check exposure, lens cap"),
        ([BLACK + number * 8 for number in range(8)], "one colour only"),
        ([TEXTURE] * 8, "The 8 good images of category cloth show the same picture, such as .*0.png: no value"),
        ([TEXTURE + (number == NOISE[number] // 20) for number in range(8)], "show the same picture"),
        ([TEXTURE, BLACK] * 4, "show fewer than 3 pictures: 1 with any structure, 4 of one colour"),
        (
            [TEXTURE, NOISE[1]] * 4,
            r"3 pictures: 2 with any structure, 0 of one colour\..* at least 3 different parts",
        ),
    ],
)
def test_degenerate_images_are_refused_before_training(saved, arrays, text):
    samples = saved([array.astype(np.uint8) for array in arrays])
    with pytest.raises(DataError, match=text):
        divide(samples, Config())


def test_images_that_differ_pass_and_few_of_them_are_decoded(saved, monkeypatch):
    samples = saved(NOISE)
    decoded = []
    decode = degenerate.decode
    monkeypatch.setattr(degenerate, "decode", lambda path: decoded.append(path) or decode(path))
    refuse_degenerate(samples)
    assert len(decoded) == 3


def test_some_plain_images_and_copies_among_others_pass(saved):
    refuse_degenerate(saved([BLACK, BLACK, TEXTURE, TEXTURE, *NOISE[1:3]]))
    refuse_degenerate(saved(NOISE[:2]))


def test_a_picture_of_another_size_is_another_picture(saved):
    refuse_degenerate(saved([TEXTURE, TEXTURE[:12], TEXTURE[:, :12]]))


def test_each_category_and_each_subclass_is_checked(saved):
    good = saved(NOISE, subclass="twill")
    with pytest.raises(DataError, match="images of category board has one colour only"):
        refuse_degenerate(good + saved([BLACK] * 3, category="board"))
    for array, text in ((TEXTURE, "show the same picture"), (BLACK, "has one colour only")):
        same = saved([array] * 2, subclass="plain")
        with pytest.raises(DataError, match=f"images of subclass plain of category cloth .*{text}"):
            refuse_degenerate(good + same)
        refuse_degenerate(good + same[:1])
        refuse_degenerate(good + [replace(sample, subclass="twill") for sample in same])


def test_copies_of_one_file_are_refused_as_the_same_picture_and_not_for_the_number_of_groups(saved, tmp_path):
    (one,) = saved([TEXTURE])
    samples = [one]
    for number in range(7):
        path = tmp_path / f"copy-{number}.png"
        path.write_bytes(one.image_path.read_bytes())
        samples.append(replace(one, image_path=path))
    with pytest.raises(DataError, match=r"The 8 good images of category cloth show the same picture, such as .*0\.png"):
        divide(samples, Config())


def test_two_subclasses_of_the_same_files_are_refused(saved):
    own = saved(NOISE, subclass="a")
    copies = [replace(sample, subclass="b") for sample in own]
    with pytest.raises(DataError, match=r"cloth/a and cloth/b are copies of the same 8 files, such as .*0\.png"):
        divide(own + copies, Config())
    divide(own + copies[1:], Config())
    divide(own + copies, replace(Config(), data=DataConfig(subclass_from="auto")))
    divide(own + copies, replace(Config(), head=DFMConfig()))
