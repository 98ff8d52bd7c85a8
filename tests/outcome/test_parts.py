"""One verdict from the views of a part."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normweave.errors import ConfigError
from normweave.outcome.parts import (
    RANKS,
    PartRule,
    PartView,
    compile_pattern,
    is_worse,
    judge,
    parse_views,
    part_of,
)
from normweave.types import PartReason

VERDICTS = ("normal", "unknown", "anomalous", None)
images = st.lists(
    st.builds(PartView, st.sampled_from("abcd"), st.sampled_from(VERDICTS), st.integers(1, 9)), max_size=8
)
expected = st.one_of(st.none(), st.integers(1, 5), st.just(("a", "b")))


def view(name, verdict="normal", inspection=None):
    return PartView(name, verdict, inspection)


def test_one_anomalous_view_makes_the_part_anomalous_and_every_reason_is_listed_worst_first():
    result = judge([view("a"), view("b", None, 2), view("c", "unknown", 3), view("d", "anomalous", 4)], 5)
    assert result.verdict == "anomalous"
    assert [(one.reason, one.view, one.inspection) for one in result.reasons] == [
        ("anomalous", "d", 4),
        ("unknown", "c", 3),
        ("unreadable", "b", 2),
        ("missing", None, None),
    ]


@pytest.mark.parametrize(
    ("views", "expected", "verdict"),
    [
        ([view("a"), view("b")], 2, "normal"),
        ([view("a"), view("b")], ("a", "b"), "normal"),
        ([view("a"), view("b")], None, "normal"),
        ([view("a")], 2, "incomplete"),
        ([view("a"), view("c")], ("a", "b"), "incomplete"),
        ([view("a"), view("b", None)], 2, "incomplete"),
        ([view("a"), view("b", "unknown")], 3, "unknown"),
        ([view("a"), view("a")], 2, "incomplete"),
        ([view("a"), view("a", "anomalous")], 1, "anomalous"),
        ([], None, "incomplete"),
    ],
)
def test_verdicts(views, expected, verdict):
    assert judge(views, expected).verdict == verdict


def literal(views, expected):
    """The rule as the documentation has it."""
    verdicts = [one.verdict for one in views]
    names = {one.view for one in views}
    if "anomalous" in verdicts:
        return "anomalous"
    if "unknown" in verdicts:
        return "unknown"
    missing = len(names) < expected if isinstance(expected, int) else not names.issuperset(expected or ())
    return "incomplete" if None in verdicts or missing or not views else "normal"


@given(images, expected, st.randoms(use_true_random=False))
def test_the_verdict_does_not_depend_on_the_order_and_follows_the_rule(views, expected, draw):
    mixed = random.Random(draw.random()).sample(views, len(views))
    assert judge(mixed, expected).verdict == judge(views, expected).verdict == literal(views, expected)
    assert judge(mixed, expected) == judge(views, expected)


@given(images, expected, images)
def test_late_images_make_it_worse_exactly_if_they_are_worse_themselves(views, expected, late):
    before = judge(views, expected).verdict
    for number, one in enumerate(late, start=1):
        after = judge([*views, *late[:number]], expected).verdict
        assert is_worse(one, before) == (RANKS[after] > RANKS[before])
        before = max(before, after, key=RANKS.__getitem__)


def test_a_missing_view_is_named():
    assert judge([view("front")], ("front", "back")).reasons == (PartReason("missing", "back", None),)


def test_the_pattern_names_part_and_view():
    assert PartRule(part="^(.+)_(.+)[.]").identify("17_front.png") == ("17", "front")
    assert PartRule(part="^([^/]+)/").identify("17/front.png") == ("17", "front")
    assert PartRule(part="^([^/]+)/").identify("front.png") == (None, None)
    assert PartRule().identify("front.png", part="17") == ("17", "front")
    assert PartRule(part="^(.+)_").identify("18_front.png", part="17", view="back") == ("17", "back")
    assert PartRule().identify("", part="17") == ("17", None)
    assert PartRule().identify("front.png", view=" ") == (None, None)


def test_a_view_without_a_part_is_refused():
    """Else another bundle than that of the view would judge the image."""
    with pytest.raises(ConfigError, match=r"The image 'front.png' has the view 'back', but no part\. Give the id"):
        PartRule(part="^(.+)/").identify("front.png", view="back")


@pytest.mark.parametrize(
    "wrong", [{"views": 0}, {"views": ("a", "a")}, {"views": ("",)}, {"views": ()}, {"seconds": 0.0}]
)
def test_rules_that_no_part_could_meet_are_refused(wrong):
    with pytest.raises(ConfigError, match="got"):
        PartRule(**wrong)


def test_patterns_and_views_of_options():
    assert (parse_views(None), parse_views("4"), parse_views("front, back")) == (None, 4, ("front", "back"))
    assert compile_pattern(None) is None
    with pytest.raises(ConfigError, match="no regular expression"):
        compile_pattern("(")
    with pytest.raises(ConfigError, match="no group in brackets"):
        PartRule(part="a")
    assert part_of("17_camera2.png", re.compile("^(.+)_camera")) == "17"
    assert part_of("17.png", None) is None


def test_ids_are_the_same_however_they_came_and_different_ones_stay_different():
    """By the interface, a list, a pattern or a folder: without white space around, and with visible characters only."""
    rule = PartRule(part="^(.+)/")
    for sent in (" 17", "17\t", "17"):
        assert rule.identify("other/a.png", part=sent, view=" front\n") == ("17", "front")
        assert rule.identify(f"{sent}/front.png") == ("17", "front")
    ids = {sent: rule.identify(f"{sent}/a.png")[0] for sent in ("1\x077", "1\x087", "1\udcff7", "17")}
    assert ids == {"1\x077": r"1\x077", "1\x087": r"1\x087", "1\udcff7": r"1\udcff7", "17": "17"}
    assert rule.identify("a.png", part=" \n") == (None, None)


def test_more_views_than_a_part_may_have_are_refused():
    for views in (101, tuple(map(str, range(101)))):
        with pytest.raises(ConfigError, match="views must be at most 100, which is the most images of a part, got 101"):
            PartRule(views=views)
    assert PartRule(views=100).views == 100
