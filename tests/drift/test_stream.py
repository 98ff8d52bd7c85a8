"""Images of a line from results of predict."""

import json
from datetime import UTC, datetime

import pytest

from normweave.drift.stream import from_results, image_of, window_of
from normweave.errors import ConfigError, DataError
from normweave.types import DefectBox

OWN = "a" * 64
STATISTICS = dict.fromkeys(
    ("brightness", "contrast", "warmth", "tint", "sharpness", "map_level", "peak_x", "peak_y"), 0.5
)


def row(number, **changes):
    base = {"image_path": f"camera-{number % 2}/{number}.png", "verdict": "normal", "pred_score": 1.0, "error": None}
    return base | {"bundle_hash": OWN, "category": "cloth", "subclass": "a", "unseen": False} | STATISTICS | changes


def test_blank_lines_are_left_out(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(f"\n{json.dumps(row(0))}\n \n{json.dumps(row(1))}\n\n")
    assert [image.name for image in from_results(file, bundle_hash=OWN)] == ["camera-0/0.png", "camera-1/1.png"]


def written(path, rows):
    file = path / "results.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return file


def test_windows_are_ranges_of_images_where_there_is_no_time(tmp_path):
    rows = [row(number) for number in range(150)]
    rows[3] = {"image_path": "torn.png", "verdict": None, "error": "torn"}
    images = list(from_results(written(tmp_path, rows), bundle_hash=OWN))
    assert len(images) == 149
    assert [images[0].window, images[-1].window] == ["images 1 to 100", "images 101 to 200"]
    assert (images[0].name, images[0].product) == ("camera-0/0.png", ("cloth", "a"))


def test_boxes_lie_in_fields_of_the_image(tmp_path):
    """Of 8 x 8, by the middle of each box, row by row."""
    boxes = [{"x": 0, "y": 0, "width": 10, "height": 8}, {"x": 70, "y": 30, "width": 20, "height": 20}] * 2
    rows = [row(0, boxes=boxes, width=80, height=40), row(1)]
    file = written(tmp_path, rows)
    assert [image.boxes for image in from_results(file, bundle_hash=OWN)] == [(0, 63), ()]
    outcome = {"boxes": (DefectBox(70, 0, 10, 5, 1.0),), "width": 80, "height": 40} | rows[1]
    assert image_of(outcome, name="", at="", window="").boxes == (7,)
    for wrong in ([{"x": 1}], [7], [{"x": "a", "y": 0, "width": 1, "height": 1}]):
        with pytest.raises(DataError, match="Line 1"):
            list(from_results(written(tmp_path, [row(0, boxes=wrong, width=80, height=40)]), bundle_hash=OWN))
    with pytest.raises(DataError, match="Line 1"):
        list(from_results(written(tmp_path, [row(0, boxes=boxes, width=0, height=40)]), bundle_hash=OWN))


def test_the_camera_is_the_folder_and_hours_need_the_time(tmp_path):
    file = written(tmp_path, [row(0), row(1)])
    assert [image.window for image in from_results(file, bundle_hash=OWN, by="camera")] == ["camera-0", "camera-1"]
    with pytest.raises(ConfigError, match=r"--by hour needs the time of each image, which line 1 .* lacks"):
        list(from_results(file, bundle_hash=OWN, by="hour"))
    wrong = written(tmp_path, [row(0, received_at="yesterday")])
    with pytest.raises(DataError, match=r"received_at must be a time .*, got 'yesterday'"):
        list(from_results(wrong, bundle_hash=OWN, by="hour"))
    timed = written(tmp_path, [row(0, received_at="2026-03-05T12:34:56+00:00")])
    (image,) = from_results(timed, bundle_hash=OWN, by="hour")
    assert image.window.endswith(":00")
    assert image.at == "2026-03-05T12:34:56+00:00"
    for early in ("0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59-23:00", "", 17):
        with pytest.raises(DataError, match=r"Line 1 of .*: received_at must be a time"):
            list(from_results(written(tmp_path, [row(0, received_at=early)]), bundle_hash=OWN, by="shift"))


def test_images_come_in_the_order_of_their_time(tmp_path):
    """The REST interface lists the newest first; tested in that order, a change would begin where it has ended."""
    times = [f"2026-03-05T{number // 60:02}:{number % 60:02}:00+00:00" for number in range(150)]
    rows = [row(number, received_at=at) for number, at in enumerate(times)]
    images = list(from_results(written(tmp_path, rows[::-1]), bundle_hash=OWN))
    assert [image.at for image in images] == times
    assert [images[99].window, images[100].window] == ["images 1 to 100", "images 101 to 200"]
    by_hour = list(from_results(written(tmp_path, rows[::-1]), bundle_hash=OWN, by="hour"))
    assert [image.name for image in by_hour] == [image.name for image in images]
    del rows[7]["received_at"]
    images = list(from_results(written(tmp_path, rows[::-1]), bundle_hash=OWN))
    assert images[0].at == times[-1]


@pytest.mark.parametrize(("hour", "shift"), [(5, "04 night"), (6, "05 early"), (14, "05 late"), (22, "05 night")])
def test_shifts_begin_at_6_14_and_22(hour, shift):
    at = datetime(2026, 3, 5, hour).astimezone()
    assert window_of("shift", at, "") == f"2026-03-{shift}"
    assert window_of("camera", datetime.now(UTC), "") == "no name"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json\n", "Line 1 of .* is not JSON"),
        ("[1]\n", "Line 1 of .* is not a result"),
        (json.dumps(row(0, bundle_hash="b" * 64)) + "\n", "is of another bundle"),
        (json.dumps(row(0, brightness=None)) + "\n", "were written by an earlier normweave"),
        (json.dumps(row(0, brightness="x")) + "\n", "Line 1 of .* has a value that is no number"),
        (json.dumps(row(0, subclass=["a"])) + "\n", "Line 1 of .*: subclass must be a text"),
        ("\udcff\udcfe", "is not text in UTF-8"),
    ],
)
def test_what_is_no_result_of_this_bundle_is_refused(tmp_path, text, message):
    file = tmp_path / "results.jsonl"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message):
        list(from_results(file, bundle_hash=OWN))
    with pytest.raises(DataError, match="Cannot read"):
        list(from_results(tmp_path / "none.jsonl", bundle_hash=OWN))
