import re
from datetime import UTC, datetime, timedelta

import numpy as np

from normweave.serve.pages import charts
from normweave.serve.records import Count

DAY = datetime(2026, 3, 2, tzinfo=UTC)


def label(text, name):
    """The number behind a label of the histogram."""
    (number,) = re.findall(rf">{name}: (\d+)<", text)
    return int(number)


def test_every_score_is_counted_on_its_side_of_the_limit():
    generator = np.random.default_rng(0)
    normals, stored = generator.gamma(2, 0.4, 300), generator.gamma(2, 0.9, 500)
    stored[0] = 1e6
    normals[0] = 2.0  # equal to the limit: not above
    text = charts.histogram(normals, stored, limit=2.0, moved=None)
    for name, scores in (("good parts", normals), ("inspections", stored)):
        assert label(text, f"{name}, above") == (scores > 2.0).sum()
        assert label(text, f"{name}, below") == (scores <= 2.0).sum()
    assert "limit: 2<" in text
    assert "new limit" not in text


def test_outliers_do_not_stretch_the_axis():
    text = charts.histogram([0.0, 1.0, 2.0], [1e6], limit=2.0, moved=None)
    assert "higher scores are in the last bar" in text
    ends = [float(end) for end in re.findall(r"with scores from .*? to ([-\d.e+]+)", text)]
    assert max(ends) < 1.1 * charts.REACH * 2.0
    assert "last bar" not in charts.histogram([0.0, 1.0, 2.0], [4.0], limit=2.0, moved=None)


def test_a_histogram_without_stored_scores_and_one_with_a_new_limit():
    assert label(charts.histogram([2.0], [], limit=2.0, moved=None), "inspections, above") == 0
    text = charts.histogram([0.5, 1.0], [0.7], limit=2.0, moved=3.0)
    assert "point proposed" in text
    assert "new limit: 3<" in text


def count(start, **given):
    zero = {"normal": 0, "anomalous": 0, "unknown": 0, "unreadable": 0, "accepted": 0, "rejected": 0}
    return Count(start=start, category="cloth", subclass=None, **(zero | given))


def stacks(text):
    return re.findall(r'<div class="stack" title="(.*?)">(.*?)</div>', text)


def test_subclasses_are_summed_and_days_without_inspections_are_empty():
    counts = [
        count(DAY, normal=3),
        count(DAY, normal=1, unknown=4),
        count(DAY + timedelta(days=2), anomalous=2),
    ]
    first, second, third = stacks(charts.over_time(counts, bucket="day", shares=False))
    assert first[0].endswith("4 good, 4 unknown product")
    assert re.findall(r'class="(\w+)" style="height:([\d.]+)%', first[1]) == [
        ("unknown", "50.00"),
        ("normal", "50.00"),
    ]
    assert second == ("03 Mar 2026: none", "")
    assert re.findall(r'class="(\w+)" style="height:([\d.]+)%', third[1]) == [("anomalous", "25.00")]


def test_as_shares_all_columns_are_equally_tall():
    counts = [count(DAY, normal=3, unreadable=1), count(DAY + timedelta(days=1), anomalous=20)]
    for _, parts in stacks(charts.over_time(counts, bucket="day", shares=True)):
        assert sum(map(float, re.findall(r"height:([\d.]+)%", parts))) == 100


def test_the_number_of_columns_is_bounded():
    counts = [count(DAY + timedelta(hours=hour), normal=1) for hour in range(0, 5000, 10)]
    text = charts.over_time(counts, bucket="hour", shares=False)
    assert len(stacks(text)) == charts.MOST_COLUMNS
    assert "No inspections" in charts.over_time([], bucket="hour", shares=False)
