"""A table is made once: finished runs are not repeated, failures are rows with their reason."""

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from normweave.benchmark.plan import read_plan
from normweave.benchmark.run import MEASURES, _by_seed, _markdown, _rows, _samples, _write_csv, run
from normweave.data.textures import SEEN, make_textures
from normweave.errors import DataError

PLAN = """
title: Small
data:
  - name: cloth
    textures: {train_images: 8, test_images: 2, defect_images: 2}
    protocols: [given]
    set: [data.subclass_from=column, prepare.height=128, prepare.width=128]
methods:
  - {name: DFM, model: dfm}
  - {name: Cannot be, model: dfm, set: [outcome.false_alarm_rate=0.001]}
seeds: [0]
"""


@pytest.mark.slow
def test_a_plan_becomes_a_table_and_is_not_run_twice(tmp_path: Path):
    plan = tmp_path / "small.yaml"
    plan.write_text(PLAN)
    output = tmp_path / "results"
    rows = run(plan, output=output, cache=tmp_path / "cache")
    assert {(row["method"], row["side"]) for row in rows} == {("DFM", "seen"), ("DFM", "unseen")}
    for row in rows:
        assert 0 <= row["image_auroc"] <= 1
        assert 0 <= row["false_alarm_rate"] <= 1
    text = (output / "small.md").read_text()
    assert "## Failed runs" in text
    assert "needed" in text
    files = sorted((output / "small.runs").iterdir())
    assert len(files) == 2
    before = [file.stat().st_mtime_ns for file in files]

    assert run(plan, output=output, cache=tmp_path / "cache") == rows
    assert [file.stat().st_mtime_ns for file in files] == before
    files[0].unlink()
    again = run(plan, output=output, cache=tmp_path / "cache")
    assert [row["image_auroc"] for row in again] == [row["image_auroc"] for row in rows]
    assert all(json.loads(file.read_text())["data"] == "cloth" for file in files)


# ── many categories ──────────────────────────────────────────────────────────────────────────────────────────────────

MANY = """
title: Many
data:
  - name: both
    parts: [{path: tile}, {path: board}]
methods:
  - {name: Bank, model: patchcore}
  - {name: Plain, model: dfm}
  - {name: Held, model: dfm, baseline: Plain}
seeds: [0, 1]
"""


@pytest.fixture
def many(tmp_path: Path):
    """A plan of two categories in one model, and what its runs might have left."""
    path = tmp_path / "many.yaml"
    path.write_text(MANY)

    def table(auroc: float, over: tuple[float, float, float, float] | None) -> dict:
        names = ("d_normal", "d_abnormal", "ratio", "cell_auroc")
        over_generalisation = None if over is None else dict(zip(names, over, strict=True))
        shares = dict.fromkeys(MEASURES, auroc)
        return shares | {"n_normal": 4, "n_anomalous": 3, "over_generalisation": over_generalisation}

    def result(method: str, seed: int, tile: dict, board: dict) -> dict:
        side = table(0.5, None) | {"by_category": {"tile": tile, "board": board}}
        row = {"method": method, "data": "both", "protocol": "seen", "fold": "all", "seed": seed}
        return row | {"sides": {"seen": side}, "train_s": 3.0, "test_ms": 2.0, "data_fingerprint": "f"}

    nothing = table(0.6, None)
    return read_plan(path), [
        result("Bank", 0, nothing, nothing),
        result("Bank", 1, nothing, nothing),
        result("Plain", 0, table(0.7, (0.1, 0.3, 3.0, 0.70)), table(0.9, (0.2, 0.4, 2.0, 0.8))),
        result("Plain", 1, table(0.7, (0.1, 0.2, 2.0, 0.70)), table(0.9, (0.2, 0.4, 2.0, 0.8))),
        result("Held", 0, table(0.8, (0.2, 0.8, 4.0, 0.75)), table(0.6, (0.2, 0.5, 2.5, 0.8))),
        result("Held", 1, table(0.6, (0.2, 0.8, 4.0, 0.75)), table(0.8, (0.2, 0.6, 3.0, 0.7))),
    ]


def test_data_of_many_categories_has_pooled_mean_and_a_row_each(many):
    rows = _rows(*many)
    assert [(row["method"], row["category"]) for row in rows] == [
        (method, category)
        for method in ("Bank", "Plain", "Held")
        for category in ("(pooled)", "(mean)", "board", "tile")
    ]
    held = {row["category"]: row for row in rows if row["method"] == "Held"}
    assert held["(pooled)"]["image_auroc"] == 0.5
    assert held["board"]["image_auroc"] == pytest.approx(0.7)
    assert held["tile"]["image_auroc_sd"] == pytest.approx(0.2 / 2**0.5)
    # Each seed's mean over the categories is 0.7: no spread, though each category has one.
    assert held["(mean)"]["image_auroc"] == pytest.approx(0.7)
    assert held["(mean)"]["image_auroc_sd"] == pytest.approx(0)
    assert held["(mean)"]["d_abnormal"] == pytest.approx((0.8 + 0.5 + 0.8 + 0.6) / 4)


def test_change_is_taken_seed_by_seed_against_the_baseline(many):
    rows = {(row["method"], row["category"]): row for row in _rows(*many)}
    tile, mean = rows["Held", "tile"], rows["Held", "(mean)"]
    assert tile["ratio_change"] == pytest.approx((1 + 2) / 2)
    assert tile["ratio_change_sd"] == pytest.approx(0.5**0.5)
    assert tile["cell_auroc_change"] == pytest.approx(0.05)
    assert tile["cell_auroc_change_sd"] == pytest.approx(0)
    # Means over the categories: 3.25 and 3.5 here, 2.5 and 2 there.
    assert mean["ratio_change"] == pytest.approx((0.75 + 1.5) / 2)
    assert rows["Plain", "tile"]["ratio_change"] is None
    assert rows["Bank", "tile"]["ratio"] is None


def test_change_leaves_out_seeds_that_the_baseline_lacks(many):
    plan, results = many
    results = [result for result in results if (result["method"], result["seed"]) != ("Plain", 0)]
    rows = {(row["method"], row["category"]): row for row in _rows(plan, results)}
    assert rows["Held", "tile"]["ratio_change"] == pytest.approx(2)
    assert rows["Held", "tile"]["ratio_change_sd"] is None
    assert rows["Held", "tile"]["ratio"] == pytest.approx(4)


def test_tables_of_many_categories_are_written(many, tmp_path):
    plan, results = many
    rows = _rows(plan, results)
    text = _markdown(plan, rows, results, ["provenance"])
    sections = dict(re.findall(r"^### (.*?)\n\n(.*?)\n\n", text, flags=re.MULTILINE | re.DOTALL))
    assert list(sections) == ["(pooled)", "(mean)", "board", "tile"]
    assert sections["(pooled)"].splitlines()[0] == (
        "| method | I-AUROC | P-AUROC | AUPRO | AP (image) | FAR | unknown | train s | test ms/image |"
    )
    assert sections["tile"].splitlines() == [
        "| method | I-AUROC | P-AUROC | AUPRO | FAR | d normal | d abnormal | ratio | cell AUROC | Δ ratio | "
        "Δ cell AUROC |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| Bank {'| 60.0 ± 0.0 ' * 4}| – | – | – | – | – | – |",
        f"| Plain {'| 70.0 ± 0.0 ' * 4}| 0.100 ± 0.000 | 0.250 ± 0.071 | 2.50 ± 0.71 | 70.0 ± 0.0 | – | – |",
        f"| Held {'| 70.0 ± 14.1 ' * 4}| 0.200 ± 0.000 | 0.800 ± 0.000 | 4.00 ± 0.00 | 75.0 ± 0.0 | "
        "+1.50 ± 0.71 | +5.0 ± 0.0 |",
    ]
    assert "Δ: change, seed by seed, of Held against Plain." in text

    _write_csv(tmp_path / "many.csv", rows)
    with (tmp_path / "many.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["category"] for row in read] == ["(pooled)", "(mean)", "board", "tile"] * 3
    assert float(read[-1]["ratio_change"]) == pytest.approx(1.5)


def test_data_of_one_category_is_one_table_as_ever(many):
    plan, results = many
    for result in results:
        del result["sides"]["seen"]["by_category"]["board"]
    rows = _rows(plan, results)
    assert [row["method"] for row in rows] == ["Bank", "Plain", "Held"]
    assert all(not {"category", "ratio", "ratio_change"} & set(row) for row in rows)
    text = _markdown(plan, rows, results, ["provenance"])
    assert "###" not in text
    assert "Δ" not in text
    assert (
        "| Bank | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 3 | 2 |"
        in text
    )


def test_folds_without_a_category_do_not_count_for_it(many):
    """Leave-one-subclass-out tests one category a fold."""
    _, results = many
    first, second = results[2], results[4] | {"method": "Plain", "fold": "other"}
    del second["sides"]["seen"]["by_category"]["tile"]
    assert _by_seed([first, second], "seen", "tile", "ratio") == {0: 3.0}
    assert _by_seed([first, second], "seen", "board", "ratio") == {0: 2.25}
    assert _by_seed([first, second], "seen", "(mean)", "ratio") == {0: (3.0 + 2.25) / 2}


def test_parts_are_read_each_in_its_layout_with_its_settings(tmp_path):
    for name in ("tile/good/exp1", "tile/good/exp2", "tile/scratch/exp2"):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        MANY.replace(
            "parts: [{path: tile}, {path: board}]",
            """
    set: [data.subclass_from=column]
    parts:
      - path: tile
        layout: folders
        set: [data.subclass_from=filename-regex, 'data.subclass_regex=^(exp[0-9])']
      - textures: {train_images: 1, test_images: 0, defect_images: 1, seed: 3}""",
        )
    )
    samples = _samples(read_plan(plan).data[0], tmp_path / "data", tmp_path / "results")

    kinds = {sample.kind for sample in samples}
    assert {"tile/exp1", "tile/exp2"} <= kinds
    assert {f"cloth/{textile.name}" for textile in SEEN} <= kinds
    assert {sample.group.split("/")[0] for sample in samples if sample.group} == {"cloth"}
    made = [sample for sample in samples if sample.category == "cloth"]
    wanted = make_textures(
        tmp_path / "wanted", seed=3, train_images=1, test_images=0, defect_images=1
    ).parent / made[0].image_path.relative_to(tmp_path / "results" / "data" / "both" / "2")
    assert made[0].image_path.read_bytes() == wanted.read_bytes()


def test_parts_of_one_category_say_where_it_stands_twice(tmp_path):
    for name in ("a/tile/good/1.png", "b/tile/good/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    plan = tmp_path / "plan.yaml"
    plan.write_text(MANY.replace("{path: tile}, {path: board}", "{path: a}, {path: b}"))
    with pytest.raises(DataError, match="Category 'tile' is in a and in b"):
        _samples(read_plan(plan).data[0], tmp_path, tmp_path / "results")


@pytest.mark.slow
def test_one_model_of_two_categories_from_a_plan(tmp_path):
    """Through training and test: what `measure` gives is what the tables need."""
    table = make_textures(
        tmp_path / "rugs", train_images=8, test_images=2, defect_images=2, seen=SEEN[:2], unseen=()
    )
    table.write_text(table.read_text().replace(",cloth,", ",rug,"))
    plan = tmp_path / "small.yaml"
    plan.write_text(
        PLAN.replace(
            "textures: {train_images: 8, test_images: 2, defect_images: 2}",
            "parts: [{path: rugs}, {textures: {train_images: 8, test_images: 2, defect_images: 2}}]",
        ).replace("protocols: [given]", "protocols: [seen]")
    )
    rows = run(plan, output=tmp_path / "results", root=tmp_path, cache=tmp_path / "cache")
    assert [row["category"] for row in rows] == ["(pooled)", "(mean)", "cloth", "rug"]
    pooled, mean, cloth, rug = (row["image_auroc"] for row in rows)
    assert mean == pytest.approx((cloth + rug) / 2)
    assert 0 <= pooled <= 1
    text = (tmp_path / "results" / "small.md").read_text()
    assert "### rug" in text
    assert {row["ratio"] for row in rows} == {None}
