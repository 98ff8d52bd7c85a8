from dataclasses import replace
from datetime import UTC, datetime

import pytest

from normweave.serve.pages import verdict
from normweave.serve.records import Inspection, Review, StoredImage
from normweave.types import Outcome, Tile

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
    experts=((HOSTILE, 0.75), ("silent", 0.001)),
    height=64,
    width=48,
)
PICTURE = StoredImage(
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
    image=PICTURE,
    review=Review(at=datetime(2026, 3, 2, tzinfo=UTC), decision="reject", reviewer=HOSTILE, comment=HOSTILE),
)
UNREADABLE = replace(INSPECTION, outcome=Outcome(image_path=None, error=HOSTILE), image=None)


def test_nothing_that_came_from_outside_is_markup():
    for one in (INSPECTION, UNREADABLE):
        for text in (verdict.banner(one), verdict.details(one), verdict.row(one, shown=True)):
            assert "<img src=x" not in text
    assert "&lt;img src=x" in verdict.details(INSPECTION)
    assert "&lt;img src=x" in verdict.banner(UNREADABLE)


def test_every_verdict_has_a_word_and_a_shape_of_its_own():
    tags = [verdict.tag(kind) for kind in verdict.KINDS]
    shapes = {tag.split("<svg", 1)[1].split(">", 1)[1].split("</svg>")[0] for tag in tags}
    words = {tag.rsplit("</svg>", 1)[1] for tag in tags}
    assert len(shapes) == len(words) == 4


@pytest.mark.parametrize(
    ("p_value", "told"),
    [
        (1.0, "About 10 in 10 good parts look at least this odd."),
        (0.348, "About 3 in 10 good parts look at least this odd."),
        (0.087, "At most 1 in 11 good parts looks this odd."),
        (1 / 40, "At most 1 in 40 good parts looks this odd."),
        (1 / 49, "At most 1 in 49 good parts looks this odd."),  # 1 / (1 / 49) is a little less than 49
    ],
)
def test_a_p_value_as_a_share_of_good_parts(p_value, told):
    assert verdict.oddness(p_value) == told


@pytest.mark.parametrize(
    ("said", "p_value", "close"),
    [("normal", 0.1, True), ("normal", 0.11, False), ("anomalous", 0.04, False)],
)
def test_borderline_is_normal_up_to_twice_the_rate(said, p_value, close):
    outcome = replace(OUTCOME, verdict=said, p_value=p_value)
    assert verdict.is_borderline(outcome) == close
    assert ("Close to the line" in verdict.banner(replace(INSPECTION, outcome=outcome))) == close


@pytest.mark.parametrize(
    ("score", "threshold", "width"),
    [
        (2.0, 2.0, "60.0%"),  # on the line
        (1.0, 2.0, "30.0%"),
        (9.0, 2.0, "100.0%"),
        (-4.0, -2.0, "1.0%"),  # scores may be negative: the bar begins at the lower of the two
        (0.0, 0.0, "60.0%"),
        (1.0, 0.0, "100.0%"),
    ],
)
def test_the_bar_of_a_score_ends_before_or_behind_the_line(score, threshold, width):
    outcome = replace(OUTCOME, pred_score=score, threshold=threshold)
    text = verdict.details(replace(INSPECTION, outcome=outcome))
    assert f'style="width:{width}"' in text
    assert ('class="fill above"' in text) == (score > threshold)


def test_experts_that_were_hardly_heard_are_not_listed():
    text = verdict.details(INSPECTION)
    assert "75\u00a0%" in text
    assert "silent" not in text


@pytest.mark.parametrize(
    ("category", "subclass", "told"),
    [
        ("cloth", "red", "cloth/red"),
        ("cloth", None, "cloth"),
        (None, None, "–"),
        ("cloth", "cloth/red", "cloth/red"),
    ],
)
def test_category_and_subclass_in_one_word(category, subclass, told):
    assert verdict.joined(category, subclass) == told


def test_an_unseen_kind_is_named():
    assert "not seen in training" in verdict.banner(
        replace(INSPECTION, outcome=replace(OUTCOME, unseen=True))
    )
    assert "not seen in training" not in verdict.banner(INSPECTION)
