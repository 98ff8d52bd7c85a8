"""Rows as lines of JSON; the tables themselves are tested through the writer of `cli.results`."""

import json

import pytest

from normweave.outcome.table import json_line, readable


def test_a_line_is_utf_8_unless_a_name_is_not():
    assert json_line({"image_path": "é", "boxes": []}) == '{"image_path": "é", "boxes": []}\n'.encode()
    name = b"\xff.png".decode(errors="surrogateescape")
    assert json_line({"image_path": name}) == b'{"image_path": "\\udcff.png"}\n'
    assert json.loads(json_line({"image_path": name}))["image_path"] == name


def test_a_value_that_json_has_not_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        json_line({"pred_score": float("nan")})


def test_names_that_are_not_utf_8_are_readable_everywhere():
    name = b"\xff".decode(errors="surrogateescape")
    assert readable([{"reference": name, "x": 1}, "é"]) == [{"reference": r"\udcff", "x": 1}, "é"]
