import re
from datetime import UTC, datetime, timedelta

import numpy as np

from normweave.serve.pages import charts
from normweave.serve.records import Count

DAY = datetime(2026, 3, 2, tzinfo=UTC)


def bars(text, side):
    """(class, height in percent, how many) of each bar."""
    (part,) = re.findall(rf'<div class="bars {side}">(.*?)</div>', text)
    return [
        (kind, float(height.rstrip("%")), int(count))
        for kind, height, count in re.findall(
            r'<span class="(\w+)" style="height:([\d.]+%?)" title="(\d+) ', part
        )
    ]


def histogram(normals, stored, **given):
    return charts.histogram(
        normals, stored, **({"line": 2.0, "moved": None, "upper": "good", "lower": "stored"} | given)
    )


def test_every_score_is_in_a_bar_and_those_beyond_the_line_are_marked():
    generator = np.random.default_rng(0)
    normals, stored = generator.gamma(2, 0.4, 300), generator.gamma(2, 0.9, 500)
    stored[0] = 1e6  # beyond the end of the axis
    normals[0] = 2.0  # on the line is not beyond
    text = histogram(normals, stored)
    for scores, side in ((normals, "up"), (stored, "down")):
        drawn = bars(text, side)
        assert len(drawn) == charts.BINS
        assert sum(count for _, _, count in drawn) == len(scores)
        assert sum(count for kind, _, count in drawn if kind == "anomalous") == (scores > 2.0).sum()
        assert max(height for _, height, _ in drawn) == 100


def test_the_line_stands_between_the_bars_that_it_divides():
    text = histogram([0.1, 1.0, 1.9], [2.5, 7.0])
    (place,) = re.findall(r'class="mark" style="left:([\d.]+)%"', text)
    beyond = [kind for kind, _, _ in bars(text, "up")].index("anomalous")
    assert float(place) == round(100 * beyond / charts.BINS, 2)


def test_nothing_stored_one_score_only_and_a_moved_line():
    assert sum(count for *_, count in bars(histogram([2.0], [], line=2.0), "down")) == 0
    text = histogram([0.5, 1.0], [0.7], moved=3.0)
    assert "mark moved" in text
    assert "the line moved: 3" in text
    place, moved = (float(one) for one in re.findall(r'class="mark[^"]*" style="left:([\d.]+)%"', text))
    assert 0 < place < moved < 100


def count(start, **given):
    zero = {"normal": 0, "anomalous": 0, "unknown": 0, "unreadable": 0, "accepted": 0, "rejected": 0}
    return Count(start=start, category="cloth", subclass=None, **(zero | given))


def stacks(text):
    return re.findall(r'<div class="stack" title="(.*?)">(.*?)</div>', text)


def test_subclasses_are_added_up_and_spans_without_inspections_are_drawn_empty():
    counts = [
        count(DAY, normal=3),
        count(DAY, normal=1, unknown=4),
        count(DAY + timedelta(days=2), anomalous=2),
    ]
    first, second, third = stacks(charts.over_time(counts, bucket="day", shares=False))
    assert first[0].endswith("4 normal, 4 unknown")
    assert re.findall(r'class="(\w+)" style="height:([\d.]+)%', first[1]) == [
        ("unknown", "50.00"),
        ("normal", "50.00"),
    ]
    assert second == ("03 Mar 2026: none", "")
    assert re.findall(r'class="(\w+)" style="height:([\d.]+)%', third[1]) == [("anomalous", "25.00")]


def test_as_shares_every_column_is_as_tall():
    counts = [count(DAY, normal=3, unreadable=1), count(DAY + timedelta(days=1), anomalous=20)]
    for _, parts in stacks(charts.over_time(counts, bucket="day", shares=True)):
        assert sum(map(float, re.findall(r"height:([\d.]+)%", parts))) == 100


def test_no_more_columns_than_can_be_seen():
    counts = [count(DAY + timedelta(hours=hour), normal=1) for hour in range(0, 5000, 10)]
    text = charts.over_time(counts, bucket="hour", shares=False)
    assert len(stacks(text)) == charts.MOST_COLUMNS
    assert "No inspections" in charts.over_time([], bucket="hour", shares=False)
