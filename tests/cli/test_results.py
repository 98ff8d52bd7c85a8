"""Tables contain the rows that were written. An interrupted run can be resumed."""

import csv
import json
from dataclasses import replace

import pytest

from normweave.cli.results import ResultWriter
from normweave.errors import DataError
from normweave.outcome.table import ROWS_A_GROUP
from normweave.types import DefectBox, Outcome

OUTCOME = Outcome(
    image_path="a, b.png",
    verdict="anomalous",
    pred_score=1.5,
    p_value=0.02,
    threshold=1.25,
    experts=(("twill", 0.75), ("plain", 0.25)),
    boxes=(DefectBox(1, 2, 3, 4, 1.5, "good/1.png", 5, 6, 3, 4), DefectBox(1, 2, 3, 4, 1.25)),
    height=8,
    width=9,
    bundle_hash="b" * 64,
)


def opened(path, *, resume=False, bundle_hash="b" * 64):
    return ResultWriter(path, resume=resume, bundle_hashes=(bundle_hash,))


def written(path, outcomes):
    with opened(path) as writer:
        for number, outcome in enumerate(outcomes, 1):
            writer.write(outcome.as_dict())
            assert not path.exists()  # a table gets its name when it is complete
            assert len(writer.path.read_bytes().splitlines()) == number  # each row is written at once
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_jsonl_comes_back(tmp_path):
    written(tmp_path / "out" / "r.jsonl", [OUTCOME, Outcome(image_path="é", error="x")])
    lines = (tmp_path / "out" / "r.jsonl").read_text("utf-8").splitlines()
    assert json.loads(lines[0]) == OUTCOME.as_dict()
    assert json.loads(lines[1])["image_path"] == "é"


def test_csv_comes_back(tmp_path):
    written(tmp_path / "r.csv", [OUTCOME, Outcome(image_path=None, error="x")])
    with (tmp_path / "r.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["image_path"] == "a, b.png"
    assert float(first["pred_score"]) == 1.5
    assert json.loads(first["boxes"]) == OUTCOME.as_dict()["boxes"]
    assert first.keys() == OUTCOME.as_dict().keys()
    assert second["pred_score"] == ""


@pytest.mark.parametrize("count", [0, 1, ROWS_A_GROUP, 2 * ROWS_A_GROUP + 1])
def test_parquet_comes_back_in_groups(tmp_path, count):
    from pyarrow import parquet

    with opened(tmp_path / "r.parquet") as writer:
        for number in range(count):
            last = number == count - 1
            writer.write((OUTCOME if last else Outcome(image_path=f"{number}.png", error="x")).as_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["r.parquet"]
    back = parquet.ParquetFile(tmp_path / "r.parquet")
    assert back.metadata.num_rows == count
    assert all(back.metadata.row_group(n).num_rows <= ROWS_A_GROUP for n in range(back.metadata.num_row_groups))
    if count:
        assert back.read().to_pylist()[-1] == OUTCOME.as_dict()
    assert back.schema_arrow.names == list(OUTCOME.as_dict())


def test_a_failed_run_keeps_the_old_table_and_its_rows(tmp_path):
    (tmp_path / "r.jsonl").write_text("old")
    rows = [OUTCOME.as_dict(), Outcome(image_path="x", pred_score=float("nan")).as_dict()]
    with pytest.raises(ValueError, match="JSON"), opened(tmp_path / "r.jsonl") as writer:
        any(map(writer.write, rows))
    assert (tmp_path / "r.jsonl").read_text() == "old"
    assert json.loads((tmp_path / "r.jsonl.partial").read_text()) == OUTCOME.as_dict()


def test_a_run_that_fails_before_its_first_row_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), opened(tmp_path / "r.csv"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


# ── resuming ─────────────────────────────────────────────────────────────────────────────────────────────────────────


PATHS = [f"{number}.png" for number in range(5)]


@pytest.fixture
def interrupted(tmp_path):
    """Three rows and part of a fourth."""
    path = tmp_path / "r.jsonl"
    rows = [
        Outcome(image_path="0.png", verdict="normal", bundle_hash="b" * 64),
        Outcome(image_path="1.png", error="cut short"),
        Outcome(image_path="2.png", verdict="unknown", bundle_hash="b" * 64),
    ]
    text = "".join(json.dumps(row.as_dict()) + "\n" for row in rows)
    path.with_name("r.jsonl.partial").write_text(text + text[:50])
    return path


def test_resuming_after_the_last_complete_row(interrupted):
    with opened(interrupted, resume=True) as writer:
        assert (writer.done, writer.not_normal, writer.unreadable) == (3, 1, 1)
        paths = iter(PATHS)
        assert writer.skip(paths, keep=2) == ["1.png", "2.png"]
        for path in paths:
            writer.write(Outcome(image_path=path).as_dict())
    rows = [json.loads(text) for text in interrupted.read_text().splitlines()]
    assert [row["image_path"] for row in rows] == PATHS


def test_a_file_name_that_is_not_utf_8(tmp_path):
    """Python represents such a name with surrogates."""
    name = b"\xff.png".decode(errors="surrogateescape")
    writer = opened(tmp_path / "r.jsonl")
    writer.write(Outcome(image_path=name).as_dict())
    writer.__exit__(KeyboardInterrupt, None, None)
    with opened(tmp_path / "r.jsonl", resume=True) as writer:
        assert writer.skip(iter([name]), keep=1) == [name]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_table_with_a_file_name_that_is_not_utf_8_is_utf_8(tmp_path, ending):
    from pyarrow import parquet

    table = tmp_path / f"r{ending}"
    name = b"\xff.png".decode(errors="surrogateescape")
    box = DefectBox(1, 2, 3, 4, 1.5, name, 5, 6, 3, 4)
    with opened(table) as writer:
        for path in ("K\u00f6per.png", name):
            writer.write(replace(OUTCOME, image_path=path, boxes=(box,)).as_dict())
    if ending == ".parquet":
        rows = parquet.read_table(table).to_pylist()
    elif ending == ".csv":
        rows = list(csv.DictReader(table.read_text("utf-8").splitlines()))
    else:
        rows = [json.loads(text) for text in table.read_text("utf-8").splitlines()]
        assert rows[1]["boxes"][0]["reference"] == name
    assert [row["image_path"] for row in rows] == ["K\u00f6per.png", name if ending == ".jsonl" else r"\udcff.png"]


def test_resuming_without_an_interrupted_run(tmp_path):
    with opened(tmp_path / "r.csv", resume=True) as writer:
        assert writer.done == 0
        assert writer.skip(iter(PATHS), keep=0) == []


def test_rows_of_an_interrupted_run_are_not_overwritten(interrupted):
    with pytest.raises(DataError, match=r"r\.jsonl\.partial contains results of an interrupted run\. Resume it"):
        opened(interrupted)


@pytest.mark.parametrize(
    ("paths", "what"),
    [
        (
            ["0.png", "new.png", "1.png", "2.png"],
            r"Row 2 of .* is 1\.png, but image 2 of this run is new\.png",
        ),
        (["0.png"], r"Row 2 of .* is 1\.png, but image 2 of this run is None"),
    ],
)
def test_other_images_are_refused(interrupted, paths, what):
    with pytest.raises(DataError, match=what), opened(interrupted, resume=True) as writer:
        writer.skip(iter(paths), keep=0)
    assert interrupted.with_name("r.jsonl.partial").exists()


def test_another_bundle_is_refused(interrupted):
    with pytest.raises(DataError, match="was written with another bundle"):
        opened(interrupted, resume=True, bundle_hash="c" * 64)


def test_a_complete_table_cannot_be_resumed(tmp_path):
    written(tmp_path / "r.csv", [OUTCOME])
    with pytest.raises(DataError, match="is complete: no interrupted run"):
        opened(tmp_path / "r.csv", resume=True)


@pytest.mark.parametrize("text", ["nonsense", "[]", "{}", "7"])
def test_lines_that_are_not_results(tmp_path, text):
    (tmp_path / "r.csv.partial").write_text(text + "\n")
    with pytest.raises(DataError, match=r"Line 1 of .*r\.csv\.partial is not a result"):
        opened(tmp_path / "r.csv", resume=True)
