import re

import pytest

from normweave.outcome.measured import JudgedImage, measure
from normweave.serve.pages.measured import measured
from normweave.serve.rates import OperatingPointRates, ReviewRates


def judged(shown, label, count, *, defect=""):
    reported = shown != "normal"
    return [JudgedImage(shown, reported, label, "cloth/<red>", defect if label == "anomalous" else "")] * count


def rates(images, *, proposed=0.1):
    found = measure(images)
    points = tuple(OperatingPointRates(rate, 1.25, found.detection, found.false_alarms) for rate in (0.05, 0.1))
    return ReviewRates(
        bundle_hash="a" * 64,
        inspections=len(images),
        measured=found,
        operating_points=points,
        present=0.05,
        proposed=proposed,
        detection=0.95,
    )


REVIEWED = [
    *judged("anomalous", "anomalous", 40, defect="<hole>"),
    *judged("normal", "normal", 58),
    *judged("normal", "anomalous", 2, defect="<hole>"),
    *judged("normal", None, 1000),
]


def plain(text):
    return re.sub(r"\s+", " ", re.sub("<.*?>", " ", text))


def test_rates_are_shown_with_their_intervals_and_numbers():
    found = rates(REVIEWED)
    text = plain(measured(found))
    detection = found.measured.detection
    assert detection.estimate == pytest.approx(40 / (40 + 1060 * 2 / 60))
    assert "1,100 images were inspected" in text
    assert "60 of 1,060 good , 40 of 40 defective are reviewed" in text
    assert (
        f"Defective parts that are found {100 * detection.estimate:.1f}&nbsp;% "
        f"({100 * detection.low:.1f} to {100 * detection.high:.1f}&nbsp;%) 42 reviewed defective parts"
    ) in text
    assert "Found, by defect &lt;hole&gt;" in text
    assert "Found, by product cloth/&lt;red&gt;" in text


def test_what_is_not_measured_gives_its_reason():
    text = plain(measured(rates([*judged("anomalous", "anomalous", 3), *judged("normal", None, 7)], proposed=None)))
    assert "Defective parts that are found not measured" in text
    assert "None of the 7 images that are normal is reviewed" in text
    assert "of these rates" not in text


@pytest.mark.parametrize(
    ("proposed", "sentence"),
    [
        (None, "At none of these rates are 95\u00a0% of the defective parts found."),
        (0.05, "The present rate is the lowest at which 95\u00a0% of the defective parts are found."),
        (0.1, "10\u00a0% is the lowest rate at which 95\u00a0% of the defective parts are found."),
    ],
)
def test_the_proposed_rate_is_marked_and_explained(proposed, sentence):
    text = measured(rates(REVIEWED, proposed=proposed))
    assert sentence in text
    rows = [plain(row) for row in re.findall("<tr>.*?</tr>", text, re.DOTALL)]
    assert [row.split()[0] for row in rows if "proposed" in row] == (
        [] if proposed is None else [f"{100 * proposed:g}"]
    )
    assert [row.split()[0] for row in rows if "present" in row] == ["5"]
