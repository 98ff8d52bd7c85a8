import re
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from normweave.references import GoodImage, References
from normweave.serve.pages import verdict
from normweave.serve.pages.verdict import Result
from normweave.serve.records import Inspection, Review, StoredImage
from normweave.types import DefectBox, Outcome, Tile

HOSTILE = "<img src=x onerror=alert(1)>"
OUTCOME = Outcome(
    image_path=HOSTILE,
    verdict="anomalous",
    pred_score=3.0,
    p_value=0.02,
    threshold=2.0,
    false_alarm_rate=0.05,
    category=HOSTILE,
    subclass=HOSTILE,
    experts=((HOSTILE, 0.75), ("light", 0.001)),
    height=64,
    width=48,
)
IMAGE = StoredImage(
    image_hash="0" * 64,
    image_type="image/png",
    image_bytes=1,
    grids_hash="1" * 64,
    grids_bytes=1,
    tiles=(Tile(0, 0, 64, 48),),
    smoothing=4.0,
    map_threshold=2.0,
)
INSPECTION = Inspection(
    id=7,
    received_at=datetime(2026, 3, 1, 12, tzinfo=UTC),
    name=HOSTILE,
    source="api",
    actor=HOSTILE,
    outcome=OUTCOME,
    image=IMAGE,
    review=Review(at=datetime(2026, 3, 2, tzinfo=UTC), decision="reject", reviewer=HOSTILE, comment=HOSTILE),
)
UNREADABLE = replace(INSPECTION, outcome=Outcome(image_path=None, error=HOSTILE), image=None)


def html_of(inspection):
    """All HTML that is made of an inspection."""
    return verdict.banner(inspection), verdict.details(inspection), verdict.row(inspection, shown=True)


def test_values_from_outside_are_escaped():
    for inspection in (INSPECTION, UNREADABLE):
        for text in html_of(inspection):
            assert "<img src=x" not in text
    assert verdict.details(INSPECTION).count("&lt;img src=x") == 6  # name, product, weight, actor, review
    assert "&lt;img src=x" in verdict.banner(UNREADABLE)


def test_the_reason_why_an_image_cannot_be_read_is_a_sentence():
    cut = replace(INSPECTION, outcome=Outcome(image_path=None, error="cut: it ends early."), image=None)
    assert "so it was not inspected. Cut: it ends early." in verdict.banner(cut)


def test_an_inspection_names_the_model_that_judged_it():
    outcome = replace(OUTCOME, model="memory_bank", bundle_hash="c" * 64)
    text = verdict.details(replace(INSPECTION, outcome=outcome))
    assert f'<dd>memory_bank <small title="{"c" * 64}">{"c" * 12}</small></dd>' in text
    assert "<dt>Model</dt>" not in verdict.details(INSPECTION)  # of an earlier version


def test_an_inspection_without_a_name_says_so():
    nameless = replace(INSPECTION, name="")
    assert '<h2 class="name">no name</h2>' in verdict.details(nameless)
    assert '<span class="file">no name</span>' in verdict.row(nameless, shown=False)


def test_every_result_has_its_own_word_and_shape():
    outcomes = [replace(OUTCOME, verdict=one) for one in ("normal", "anomalous", "unknown", None)]
    rows = [verdict.row(replace(INSPECTION, outcome=outcome), shown=False) for outcome in outcomes]
    shapes = {row.split('class="icon', 1)[1].split(">", 1)[1].split("</svg>")[0] for row in rows}
    assert len(shapes) == len(rows) == len(Result)
    words = ["Good", "Defective", "Unknown product", "Not readable"]
    assert [result.word for result in Result] == words
    for row, word in zip(rows, words, strict=True):
        assert f"</svg>{word}</span>" in row


@pytest.mark.parametrize("verdict_", ["normal", "anomalous", "unknown", None])
def test_an_operator_reads_no_internal_terms(verdict_):
    outcome = replace(OUTCOME, verdict=verdict_, unseen=True, adapted=True, experts=(("red", 1.0),), category="cloth")
    for text in html_of(replace(INSPECTION, outcome=outcome, name="a.png")):
        visible = text.replace("&lt;", "").lower()
        for term in ("expert", "adapted", "kind", "threshold"):
            assert term not in visible


@pytest.mark.parametrize(
    ("p_value", "sentence"),
    [
        (1.0, "About 10 in 10 good parts score at least this high."),
        (0.348, "About 3 in 10 good parts score at least this high."),
        (0.087, "At most 1 in 11 good parts scores this high."),
        (1 / 40, "At most 1 in 40 good parts scores this high."),
        (1 / 49, "At most 1 in 49 good parts scores this high."),  # 1 / (1 / 49) is a little less than 49
    ],
)
def test_a_p_value_is_a_share_of_good_parts(p_value, sentence):
    assert verdict.rarity(p_value) == sentence


@pytest.mark.parametrize(
    ("result", "p_value", "close"),
    [("normal", 0.1, True), ("normal", 0.11, False), ("anomalous", 0.04, False)],
)
def test_a_good_part_is_borderline_up_to_twice_the_rate(result, p_value, close):
    outcome = replace(OUTCOME, verdict=result, p_value=p_value)
    assert verdict.is_borderline(outcome) == close
    assert ("Close to the limit" in verdict.banner(replace(INSPECTION, outcome=outcome))) == close


@pytest.mark.parametrize(
    ("score", "threshold", "width"),
    [
        (2.0, 2.0, "60.0%"),  # equal to the limit
        (1.0, 2.0, "30.0%"),
        (9.0, 2.0, "100.0%"),
        (-4.0, -2.0, "1.0%"),  # scores may be negative: the bar begins at the lower of the two
        (0.0, 0.0, "60.0%"),
        (1.0, 0.0, "100.0%"),
    ],
)
def test_the_bar_of_a_score_crosses_the_limit_if_the_score_is_above(score, threshold, width):
    outcome = replace(OUTCOME, pred_score=score, threshold=threshold)
    text = verdict.details(replace(INSPECTION, outcome=outcome))
    assert f'style="width:{width}"' in text
    assert ('class="fill above"' in text) == (score > threshold)


def test_boxes_are_shown_beside_good_parts():
    boxes = tuple(DefectBox(0, 0, 4, 4, 3.0, name, 0, 0, 4, 4) for name in ("gone.png", HOSTILE, *["b.png"] * 9))
    found = replace(INSPECTION, outcome=replace(OUTCOME, boxes=boxes))
    images = [GoodImage("gone.png", (9, 9), (9, 9), None)]
    images += [GoodImage(name, (9, 9), (9, 9), b"JPEG") for name in (HOSTILE, "b.png")]
    references = References(tuple(images), np.zeros((1, 3), np.int64))
    text = verdict.details(found, references)
    shown = re.findall(r'src="([^"]+)"', text)
    assert shown == [
        f"/v1/inspections/7/boxes/{number}/{side}" for number in range(1, 4) for side in ("seen", "expected")
    ]
    assert "<img src=x" not in text
    for other in (verdict.details(found), verdict.details(replace(found, image=None), references)):
        assert "boxes" not in other


def test_products_with_almost_no_weight_are_not_listed():
    text = verdict.details(INSPECTION)
    assert "75\u00a0%" in text
    assert "light" not in text


@pytest.mark.parametrize(
    ("category", "subclass", "name"),
    [
        ("cloth", "red", "cloth/red"),
        ("cloth", None, "cloth"),
        (None, None, "–"),
        ("cloth", "cloth/red", "cloth/red"),
    ],
)
def test_category_and_subclass_are_one_name(category, subclass, name):
    assert verdict.product(category, subclass) == name


def test_a_product_that_was_not_in_training_is_reported():
    unseen = replace(INSPECTION, outcome=replace(OUTCOME, unseen=True))
    assert "not in training" in verdict.banner(unseen)
    assert "not in training" not in verdict.banner(INSPECTION)


def test_an_inspection_without_a_result_has_only_its_origin():
    bare = replace(INSPECTION, outcome=Outcome(image_path=None), image=None, review=None)
    text = verdict.details(bare)
    for absent in ("Score", "Good parts", "Image", "In training"):
        assert f"<dt>{absent}</dt>" not in text
    assert "sent by another program" in text
    assert "not reviewed yet" in text
