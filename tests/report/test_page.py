import re
from html.parser import HTMLParser

import numpy as np
import pytest

from normweave.errors import ImageError
from normweave.report.page import COLUMNS, EXAMPLES, Comparison, Suspect, write_page

VOID = {"meta", "br", "img"}


class Checked(HTMLParser):
    """Checks that every tag is closed in order; keeps tags, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.attributes, self.words, self.tags = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))  # \s also matches non-breaking spaces


def table(**given):
    empty = {key: 0.875 for key, _ in COLUMNS}
    return empty | {"n_normal": 12, "n_anomalous": 8, "false_alarm_interval": [0.01, 0.2], "reasons": {}} | given


def row(number, *, label="normal", verdict="normal", score=0.5, subclass="red", **given):
    return {
        "image_path": f"cloth/{subclass}/{number:03d}.png",
        "category": "cloth",
        "subclass": subclass,
        "seen": subclass != "green",
        "label": label,
        "defect": None if label == "normal" else "hole",
        "verdict": verdict,
        "pred_score": score,
        "p_value": 0.25,
        "threshold": 1.0,
        "routed_category": "cloth",
        "routed_subclass": "red",
        "error": None,
    } | given


PREDICTIONS = [
    *[row(i) for i in range(30)],
    *[row(i, label="anomalous", verdict="anomalous", score=i) for i in range(30, 60)],
    *[row(i, label="anomalous", verdict="normal", score=0.9 - i / 1000) for i in range(60, 70)],
    *[row(i, verdict="anomalous", score=1 + i / 1000) for i in range(70, 80)],
    *[row(i, verdict="unknown", score=7.0, subclass="green") for i in range(80, 90)],
    row(90, error="The file is empty.", verdict=None, pred_score=None, threshold=None, routed_subclass=None),
]
METRICS = {
    "pooled": table(image_auroc=0.9876),
    "mean": table(),
    "seen": table(),
    "unseen": table(),
    "by_category": {"cloth": table()},
    "by_subclass": {"cloth/red": table(), "cloth/green": table(image_auroc=0.6543)},
    "by_defect": {"hole": table()},
}
PROVENANCE = {
    "normweave": "0.1.0",
    "model": "adapted_moe",
    "trained_on": ["cloth/red", "cloth/blue"],
    "fit_images": 70,
    "calibration_images": 35,
    "promise": "At most 5 % false alarms on average, computed from 35 groups.",
    "false_alarm_rate": 0.05,
    "software": {"python": "3.11", "numpy": "2.0"},
}


def images(number):
    random = np.random.default_rng(number)

    def pixels():
        return random.integers(0, 255, (40, 60, 3)).astype(np.uint8)

    comparison = Comparison(pixels(), pixels(), f"good/{number}.png")
    return {caption: pixels() for caption in ("image", "heat map")}, [comparison] * (number % 3)


def page(
    tmp_path,
    *,
    metrics=METRICS,
    predictions=PREDICTIONS,
    render_images=images,
    provenance=PROVENANCE,
    title="Cloth",
    **given,
):
    path = tmp_path / "report.html"
    write_page(
        path,
        title=title,
        metrics=metrics,
        predictions=predictions,
        render_images=render_images,
        provenance=provenance,
        **given,
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]  # no temporary file is left
    return path.read_text(encoding="utf-8")


def test_the_page_loads_nothing(tmp_path):
    text = page(tmp_path)
    checked = Checked(text)
    assert "script" not in checked.tags
    assert "link" not in checked.tags
    for name, value in checked.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith("data:image/")
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_a_file_name_that_is_not_utf_8_is_shown_with_escapes(tmp_path):
    name = b"\xff.png".decode(errors="surrogateescape")
    assert r"\udcff.png" in page(tmp_path, predictions=[row | {"image_path": name} for row in PREDICTIONS])


def test_the_weights_of_the_experts_are_shown_for_each_category(tmp_path):
    experts = [
        {"name": "memory", "synthetic_auroc": 0.912, "weight": 0.25},
        {"name": "gaussian", "synthetic_auroc": 0.5, "weight": 0.75},
    ]
    fusion = [
        {"category": "<cloth>", "held_out_images": 24, "synthetic_defects": 128, "experts": experts},
        {"category": "bottle", "held_out_images": 5, "synthetic_defects": 0, "experts": experts},
    ]
    assert "Weights of the experts" not in page(tmp_path)
    text = Checked(page(tmp_path, provenance=PROVENANCE | {"fusion": fusion})).text
    assert "held-out good images synthetic defects memory gaussian" in " ".join(text.split())
    assert "<cloth> 24 128 0.25 (91.2) 0.75 (50.0)" in " ".join(text.split())
    assert "bottle – 0 0.25 0.75" in " ".join(text.split())
    assert "synthetic_auroc" not in text  # in the provenance


def test_the_input_sizes_that_were_compared_are_shown(tmp_path):
    first = {
        "height": 256,
        "width": 256,
        "tile_beyond": 4.0,
        "cost": 1.0,
        "auroc": 0.9,
        "image_ms": 9.5,
        "chosen": False,
    }
    chosen = first | {"height": 384, "width": 384, "cost": 2.25, "auroc": 0.954, "chosen": True}
    budget = chosen | {"name": "best", "candidates": [first, chosen]}
    text = " ".join(Checked(page(tmp_path, provenance=PROVENANCE | {"budget": budget})).text.split())
    assert "256 x 256, tiles beyond 4 90.0 1.00 9.5 –" in text
    assert "384 x 384, tiles beyond 4 95.4 2.25 9.5 chosen" in text
    assert "budget best: input 384 x 384, tiles beyond 4" in text
    alone = PROVENANCE | {"budget": budget | {"name": "balanced", "candidates": []}}
    assert "Input size and tiles" not in page(tmp_path, provenance=alone)
    fast = PROVENANCE | {"budget": alone["budget"] | {"name": "fast", "settings": ["features.grid_stride=16"]}}
    assert "tiles beyond 4.0, features.grid_stride=16" in page(tmp_path, provenance=fast)
    assert "budget" not in page(tmp_path, provenance=PROVENANCE | {"budget": None})  # an older bundle


def test_the_images_of_a_cross_validation_are_counted_once(tmp_path):
    crossed = PROVENANCE | {"fit_images": 70, "calibration_images": 70, "cross_validated": True}
    text = Checked(page(tmp_path, provenance=crossed)).text
    assert "70 images to fit the model and, by cross-validation, to set the thresholds. At" in text
    assert text.count("70 images") == 1


def test_the_summary_counts_rejected_images_and_compares_false_alarms_with_the_target(tmp_path):
    text = Checked(page(tmp_path)).text
    assert "Of 40 defective images, 30 were rejected" in text
    assert "Of 50 good images, 20 were rejected" in text
    assert "98.8 %" in text
    assert "target: at most 5 %; 95 % confidence interval: 1.0 to 20.0 %" in text
    assert "Good images of 2 subclasses. 70 images to fit the model. 35 images to set the thresholds. At" in text
    assert "At most 5 % false alarms on average, computed from 35 groups." in text
    assert "python 3.11 · numpy 2.0" in text


def test_boxes_are_shown_beside_good_images(tmp_path):
    number = 31  # an anomalous image with one box
    checked = Checked(page(tmp_path, predictions=[PREDICTIONS[number]], render_images=lambda _: images(number)))
    assert "seen expected" in checked.text
    titles = [value for name, value in checked.attributes if name == "alt"]
    assert titles[-2:] == ["031.png: region 1", "the most similar region of the good image good/31.png"]
    assert "good/" not in page(tmp_path, predictions=[PREDICTIONS[30]], render_images=lambda _: images(30))


def test_seen_and_unseen_subclasses_have_their_own_totals(tmp_path):
    text = Checked(page(tmp_path)).text
    assert re.search(
        r"cloth/red seen .* cloth/green unseen .*65\.4.* all seen .* all unseen .* all images together", text
    )


def test_the_gallery_renders_the_most_extreme_images_of_each_part(tmp_path):
    rendered = []
    text = Checked(page(tmp_path, render_images=lambda i: rendered.append(i) or images(i))).text
    assert len(rendered) == 4 * EXAMPLES <= 24
    assert rendered[:6] == [59, 58, 57, 56, 55, 54]  # highest detections
    assert rendered[6:12] == [69, 68, 67, 66, 65, 64]  # lowest misses
    assert rendered[12:18] == [79, 78, 77, 76, 75, 74]  # highest false alarms
    assert set(rendered[18:]) <= set(range(80, 90))
    assert "059.png" in text
    assert "cloth/green · good · routed to cloth/red" in text


def test_the_gallery_shows_every_defect_type_before_any_twice(tmp_path):
    rendered = []
    predictions = [
        row(i, label="anomalous", verdict="anomalous", score=100 - i, defect="hole" if i < 20 else "stain")
        for i in range(22)
    ]
    page(tmp_path, predictions=predictions, render_images=lambda i: rendered.append(i) or images(i))
    assert rendered == [0, 20, 1, 21, 2, 3]


def test_routing_is_in_per_cent_of_each_subclass(tmp_path):
    predictions = [row(i, routed_subclass="red" if i < 3 else "blue") for i in range(4)]
    predictions += [row(i, subclass="blue", routed_subclass="blue") for i in range(2)]
    text = Checked(page(tmp_path, predictions=predictions)).text
    assert re.search(r"cloth/blue cloth/red images cloth/blue 100 – 2 cloth/red 25 75 4", text)


def test_scores_with_different_thresholds_are_drawn_relative_to_them(tmp_path):
    predictions = [row(0, score=5.0, threshold=4.0, verdict="anomalous"), row(1, score=5.0, threshold=6.0)]
    text = page(tmp_path, predictions=predictions)
    assert "anomaly score minus the threshold of the image's subclass" in Checked(text).text
    assert "good, accepted: 1" in text
    assert "good, false alarms: 1" in text
    assert "minus the threshold" not in page(tmp_path, predictions=predictions[:1])


def test_missing_numbers_are_dashes_with_a_reason(tmp_path):
    bare = table(
        aupro=None,
        pixel_auroc=None,
        reasons={"aupro": "no anomalous pixel", "pixel_auroc": "no anomalous pixel"},
    )
    metrics = METRICS | {
        "pooled": bare,
        "by_subclass": {"cloth/red": bare, "cloth/blue": table(image_ap=None)},
    }
    text = Checked(page(tmp_path, metrics=metrics)).text
    assert "Pixel AUROC – no anomalous pixel" in text
    assert "– cloth/red, all images together: no pixel AUROC, AUPRO, because: no anomalous pixel" in text
    assert "– cloth/blue: no image AP, because: not measured" in text
    assert not re.search(r"\bnan\b", text.lower())
    assert "None" not in text.replace("None.", "")


def test_unreadable_images_are_listed(tmp_path):
    text = Checked(page(tmp_path)).text
    assert "1 image could not be read and is not part of any number" in text
    assert "cloth/red/090.png : The file is empty." in text
    refused = [row(i, error="empty", verdict=None, pred_score=None, threshold=None) for i in range(60)]
    text = Checked(page(tmp_path, predictions=PREDICTIONS + refused)).text
    assert "61 images could not be read and are" in text
    assert "11 more are listed in predictions.csv" in text


def test_an_error_while_rendering_an_image_is_shown_in_its_figure(tmp_path):
    def fail(number):
        raise ImageError(f"Image {number} was removed.")

    assert "Image 59 was removed." in Checked(page(tmp_path, render_images=fail)).text


def test_without_test_images_the_page_describes_the_training(tmp_path):
    empty = {key: None for key, _ in COLUMNS} | {
        "n_normal": 0,
        "n_anomalous": 0,
        "false_alarm_interval": [None, None],
    }
    text = Checked(page(tmp_path, metrics={"pooled": empty}, predictions=[])).text
    assert "No test images" in text
    assert "Good images of 2 subclasses" in text
    assert "Heat map" not in text


def test_a_head_without_routing_has_no_routing_table(tmp_path):
    predictions = [row(i, routed_category=None, routed_subclass=None, p_value=None) for i in range(3)]
    text = Checked(page(tmp_path, predictions=predictions)).text
    assert "Routing" not in text
    assert "routed to" not in text


@pytest.mark.parametrize("field", ["image_path", "category", "subclass", "defect", "routed_subclass", "error"])
def test_names_are_escaped(tmp_path, field):
    evil = '"><script>alert(1)</script>&'
    predictions = [row(i, label="anomalous", verdict="anomalous", score=2.0) | {field: evil} for i in range(2)]
    metrics = METRICS | {
        name: {evil: table(), "other": table()} for name in ("by_category", "by_subclass", "by_defect")
    }
    provenance = PROVENANCE | {"data": evil, "trained_on": [evil], evil: {evil: evil}}
    checked = Checked(page(tmp_path, predictions=predictions, metrics=metrics, provenance=provenance, title=evil))
    assert "script" not in checked.tags
    assert evil in checked.text


def decoding(ratio, **given):
    return {"d_normal": 0.125, "d_abnormal": 0.125 * ratio, "ratio": ratio, "cell_auroc": 0.75} | given


def several(*, change=None):
    """Metrics of two categories by a detector that decodes."""
    more = {} if change is None else {"change": change}
    both = table(over_generalisation=decoding(3.0), category_accuracy=0.9)
    categories = {
        "board": table(over_generalisation=decoding(2.0, **more), category_accuracy=0.8),
        "cloth": table(over_generalisation=None, category_accuracy=None),
    }
    return METRICS | {"pooled": both, "mean": both, "by_category": categories}


def test_categories_have_a_row_each_a_mean_and_a_pooled_row(tmp_path):
    text = Checked(page(tmp_path, metrics=several())).text
    assert re.search(
        r"Categories One row .* 90\.0 % of the images were routed to their own category\. .* category accuracy board "
        r".* 80\.0 cloth .* – "
        r"mean of categories .* 90\.0 all images together .* 90\.0",
        text,
    )
    alone = Checked(page(tmp_path)).text
    assert "Categories" not in alone
    assert "category accuracy" not in alone


def test_over_generalisation_has_its_own_table(tmp_path):
    text = Checked(page(tmp_path, metrics=several())).text
    assert re.search(
        r"d normal d abnormal ratio cell AUROC board 0\.125 0\.250 2\.00 75\.0 cloth – – – – "
        r"mean of categories 0\.125 0\.375 3\.00 75\.0 all images together",
        text,
    )
    assert "reconstructs defective patches as well as good ones" in text
    assert "change" not in text.lower()
    assert "Over-generalisation" not in Checked(page(tmp_path)).text


def test_over_generalisation_of_one_category_is_one_row(tmp_path):
    metrics = several()
    del metrics["by_category"]["cloth"]
    text = Checked(page(tmp_path, metrics=metrics)).text
    assert re.search(r"ratio cell AUROC board 0\.125 0\.250 2\.00 75\.0 Defects", text)


def test_changes_against_another_detector_are_signed(tmp_path):
    provenance = PROVENANCE | {"against": {"model": "cnc", "bundle_hash": "0123456789abcdef"}}
    metrics = several(change={"ratio": 0.5, "cell_auroc": -0.0625})
    text = Checked(page(tmp_path, metrics=metrics, provenance=provenance)).text
    assert "Change: difference to cnc, bundle 0123456789ab." in text
    assert re.search(
        r"change of ratio change of cell AUROC board 0\.125 0\.250 2\.00 75\.0 \+0\.50 -6\.2 cloth – – – – – –",
        text,
    )


def test_suspects_of_the_training_set_are_shown_with_their_pictures(tmp_path):
    assert "Suspects" not in Checked(page(tmp_path)).text
    picture = np.zeros((4, 6, 3), dtype=np.uint8)
    suspects = [Suspect("good/<7>.png", 12.5, {"image": picture}, ""), Suspect("good/8.png", 9.0, {}, "It is gone.")]
    text = page(tmp_path, suspects=suspects)
    assert 'alt="&lt;7&gt;.png: image"' in text
    for words in (
        "which was fitted to this image too: a defect may be missing in it",
        "Suspects in the training set",
        "<7>.png",
        "score 12.5",
        "8.png",
        "It is gone.",
    ):
        assert words in Checked(text).text
