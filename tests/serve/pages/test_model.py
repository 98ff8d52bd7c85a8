import re

import numpy as np

from normweave.outcome.operating_point import Calibration
from normweave.serve.pages.model import limits, training

RECORD = {
    "categories": {"cloth": ["red", "<b>"], "bottle": []},
    "model": "adapted-moe",
    "config": {"features": {"kind": "timm", "backbone": "resnet18"}},
    "fit_images": 40,
    "calibration_images": 20,
    "preparation": {"width": 64, "height": 48},
    "seed": 0,
    "software": {"numpy": "2.0"},
    "data_fingerprint": "abc",
}


def calibration(**given):
    scores = np.arange(60.0)
    return Calibration(
        scores=scores,
        distances=scores,
        subclasses=np.r_[np.zeros(50, np.int64), np.ones(10, np.int64)],
        subclass_names=("cloth/red", "cloth/<b>"),
        false_alarm_rate=0.05,
        unknown_rate=0.05,
        **given,
    )


def cells(text):
    return [
        [re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in re.findall("<tr>(.*?)</tr>", text, re.DOTALL)
    ][1:]


def test_every_product_has_a_row_with_its_limit():
    unseen = Calibration(scores=np.arange(30.0), false_alarm_rate=0.05, unknown_rate=0.05)
    rows = cells(limits(calibration(unseen=unseen)))
    assert [row[0] for row in rows] == [
        "all products in training",
        "cloth/red",
        "cloth/&lt;b&gt;",
        "products not in training",
    ]
    assert [row[3] for row in rows] == ["60 shared", "50", "60 shared", "30 shared"]
    assert rows[-1][4] == "–"


def test_the_training_data_is_escaped_and_products_without_subclasses_are_named():
    text = training(RECORD, "1234")
    assert "cloth/&lt;b&gt;" in text
    assert ">bottle</span>" in text
    assert "<dd>64 × 48 pixels</dd>" in text
