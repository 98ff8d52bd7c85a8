import re

import numpy as np

from normweave.outcome.operating_point import Calibration
from normweave.serve.pages.model import limits, training, weights

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


def test_the_weights_of_each_category_are_shown_with_their_source():
    methods = [
        {"name": "memory", "synthetic_auroc": 0.912, "weight": 0.25},
        {"name": "layout", "synthetic_auroc": 0.5, "weight": 0.75},
    ]
    categories = [
        {"category": "<cloth>", "held_out_images": 24, "synthetic_defects": 128, "experts": methods},
        {"category": "bottle", "held_out_images": 5, "synthetic_defects": 0, "experts": methods},
    ]
    text = weights(categories)
    assert "<th>memory</th><th>layout</th>" in text
    assert cells(text) == [
        ["&lt;cloth&gt;", "24", "128", "0.25 (91.2)", "0.75 (50.0)"],
        ["bottle", "–", "0", "0.25", "0.75"],
    ]


def test_the_training_data_is_escaped_and_products_without_subclasses_are_named():
    text = training(RECORD, "1234")
    assert "cloth/&lt;b&gt;" in text
    assert ">bottle</span>" in text
    assert "<dd>64 × 48 pixels</dd>" in text
