"""The table of parts marks corrections by late views and decisions of reviewers."""

from dataclasses import replace

from inspections import NOON, accept, inspection
from normweave.serve.pages.parts import marked, table, views
from normweave.serve.part_store import Marks
from normweave.serve.records import PartRecord
from normweave.types import PartReason

FIRST = PartRecord(id=3, at=NOON, part_id="<b>17", line="", verdict="normal", reasons=(), images=1, expected=1)
REASONS = (PartReason("anomalous", "back", 7),)
CORRECTION = replace(FIRST, id=5, verdict="anomalous", reasons=REASONS, images=2, corrects=3)


def test_a_corrected_verdict_and_its_correction_are_marked():
    marks = {3: Marks(last_correction=5)}
    assert marked(FIRST, marks[3]) == ["corrected later"]
    assert marked(CORRECTION, marks[3]) == ["correction by a late view"]
    assert marked(FIRST, Marks()) == []
    html = table([CORRECTION, FIRST], marks)
    assert html.count("corrected later") == html.count("correction by a late view") == 1
    assert "&lt;b&gt;17" in html


def test_decisions_of_reviewers_are_marked():
    assert marked(FIRST, Marks(decisions=("accept", "reject"))) == [
        "a view was accepted as good",
        "a view was rejected as defective",
    ]


def test_the_views_of_a_part_have_their_history_and_decisions():
    images = [inspection(id=6, view="front", review=accept()), inspection(id=7, view="back")]
    html = views([FIRST, CORRECTION], images)
    assert html.index("corrected later") < html.index("correction by a late view: back: defective")
    assert html.count("accepted as good") == 1
    assert html.count("<small>late</small>") == 1
