"""The page of drift: findings as text, and small charts."""

import re

import numpy as np

from drifting import LIGHT_CHANGE, feed, line
from normweave.drift.causes import findings
from normweave.serve.pages.drift import few, findings_html, history_link, points, table


def test_an_alarm_names_cause_products_and_what_to_do_with_pictures():
    monitor, rng = line()
    feed(monitor, rng, 300)
    feed(monitor, rng, 60, change=LIGHT_CHANGE)
    html = findings_html(findings(monitor), monitor)
    assert "Alarm: lighting or camera" in html
    assert re.search(r"[\d,]+ : 1 <small>\(alarm from 4,500 : 1\)</small>", html)
    assert "normweave calibrate" in html
    assert html.count("<img") == 12
    assert "/history?days=&amp;product=cloth%0Adenim" in html
    drawn = table(monitor)
    assert drawn.count("<svg") == 3 * 8
    assert "<b>alarm</b>" in drawn


def test_without_a_change_there_is_a_sentence():
    monitor, rng = line()
    assert "No change in 0 images." in findings_html([], monitor)
    assert "No inspections with this bundle yet." in table(monitor)
    feed(monitor, rng, 20)
    assert "No change in 20 images." in findings_html([], monitor)
    refused = findings_html([], None, refusal="No statistics.")
    assert "Drift is not followed." in refused
    assert "No inspections" in table(None)


def test_subclasses_with_few_independent_calibration_images_are_named():
    monitor, _ = line(images=40, groups=[number % 18 for number in range(40)])
    assert [n for _, n in few(monitor)] == [18, 18, 18]
    assert "Small changes cannot be noticed from so few independent calibration images: " in table(monitor)
    enough, _ = line(images=40, groups=[number % 19 for number in range(40)])
    assert few(enough) == []
    assert "Small changes" not in table(enough)


def test_names_are_escaped():
    monitor, rng = line()
    feed(monitor, rng, 300)
    feed(monitor, rng, 60, change=LIGHT_CHANGE)
    (found,) = findings(monitor)
    hostile = found.__class__(**vars(found) | {"examples": ('"><script>',), "products": (("<b>", None),)})
    html = findings_html([hostile], monitor)
    assert "<script>" not in html
    assert not re.search("<b>(?!</b>)", html)


def test_a_link_leads_to_the_inspections_of_the_subclass():
    assert history_link(("cloth", None)) == "/history?days=&product=cloth"


def test_a_small_chart_is_clipped():
    assert points(np.array([0.0])) == "42.0,15.0"
    assert points(np.array([-99.0, 0.0, 99.0])) == "3.0,27.0 42.0,15.0 81.0,3.0"
