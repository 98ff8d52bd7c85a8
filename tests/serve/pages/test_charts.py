import re
from datetime import UTC, datetime, timedelta

import numpy as np

from normweave.serve.pages import charts
from normweave.serve.records import Count

DAY = datetime(2026, 3, 2, tzinfo=UTC)
MARKS = r'class="mark[^"]*" style="left:([\d.]+)%"'


def bars(text, direction):
    """(class, height in percent, number of scores) of each bar."""
    (part,) = re.findall(rf'<div class="bars {direction}">(.*?)</div>', text)
    return [
        (colour, float(height.rstrip("%")), int(count))
        for colour, height, count in re.findall(
            r'<span class="(\w+)" style="height:([\d.]+%?)" title="(\d+) ', part
        )
    ]


def histogram(normals, stored, **given):
    return charts.histogram(
        normals, stored, **({"limit": 2.0, "moved": None, "upper": "good", "lower": "stored"} | given)
    )


def test_every_score_is_in_a_bar_and_bars_above_the_limit_are_marked():
    generator = np.random.default_rng(0)
    normals, stored = generator.gamma(2, 0.4, 300), generator.gamma(2, 0.9, 500)
    stored[0] = 1e6  # beyond the end of the axis
    normals[0] = 2.0  # equal to the limit: not above
    text = histogram(normals, stored)
    for scores, direction in ((normals, "up"), (stored, "down")):
        drawn = bars(text, direction)
        assert len(drawn) == charts.BINS
        assert sum(count for _, _, count in drawn) == len(scores)
        assert sum(count for colour, _, count in drawn if colour == "anomalous") == (scores > 2.0).sum()
        assert max(height for _, height, _ in drawn) == 100
    above = f"{(normals > 2.0).sum()} of 300 good, {(stored > 2.0).sum()} of 500 stored"
    assert f'aria-label="Above the limit: {above}"' in text


def test_the_limit_is_between_two_bars():
    text = histogram([0.1, 1.0, 1.9], [2.5, 7.0])
    (position,) = re.findall(MARKS, text)
    above = [colour for colour, _, _ in bars(text, "up")].index("anomalous")
    assert float(position) == round(100 * above / charts.BINS, 2)


def test_a_histogram_without_stored_scores_and_one_with_a_new_limit():
    assert sum(count for *_, count in bars(histogram([2.0], [], limit=2.0), "down")) == 0
    text = histogram([0.5, 1.0], [0.7], moved=3.0)
    assert "mark moved" in text
    assert "new limit: 3" in text
    position, moved = map(float, re.findall(MARKS, text))
    assert 0 < position < moved < 100


def test_names_are_escaped():
    assert "<b>" not in histogram([1.0], [3.0], upper="<b>", lower='"<b>')


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
