"""Rows hold metrics, costs and significance; Markdown, HTML, CSV and Parquet hold the rows."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pyarrow import parquet

from normweave.benchmark.plan import read_plan
from normweave.benchmark.table import (
    METRICS,
    failures,
    html,
    make_rows,
    markdown,
    write_csv,
    write_parquet,
)

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
    """A plan of two categories in one model, and results of its runs."""
    path = tmp_path / "many.yaml"
    path.write_text(MANY)

    def table(auroc: float, over: tuple[float, float, float, float] | None) -> dict:
        names = ("d_normal", "d_abnormal", "ratio", "cell_auroc")
        over_generalisation = None if over is None else dict(zip(names, over, strict=True))
        shares = dict.fromkeys(METRICS, auroc)
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


def test_data_of_many_categories_has_a_pooled_row_a_mean_row_and_a_row_each(many):
    rows = make_rows(*many)
    assert [(row["method"], row["category"]) for row in rows] == [
        (method, category)
        for method in ("Bank", "Plain", "Held")
        for category in ("(pooled)", "(mean)", "board", "tile")
    ]
    held = {row["category"]: row for row in rows if row["method"] == "Held"}
    assert held["(pooled)"]["image_auroc"] == 0.5
    assert held["board"]["image_auroc"] == pytest.approx(0.7)
    assert held["tile"]["image_auroc_sd"] == pytest.approx(0.2 / 2**0.5)
    # Each seed's mean over the categories is 0.7: no spread, although each category has one.
    assert held["(mean)"]["image_auroc"] == pytest.approx(0.7)
    assert held["(mean)"]["image_auroc_sd"] == pytest.approx(0)
    assert held["(mean)"]["d_abnormal"] == pytest.approx((0.8 + 0.5 + 0.8 + 0.6) / 4)


def test_the_change_against_the_baseline_is_paired_by_seed(many):
    rows = {(row["method"], row["category"]): row for row in make_rows(*many)}
    tile, mean = rows["Held", "tile"], rows["Held", "(mean)"]
    assert tile["ratio_change"] == pytest.approx((1 + 2) / 2)
    assert tile["ratio_change_sd"] == pytest.approx(0.5**0.5)
    assert tile["cell_auroc_change"] == pytest.approx(0.05)
    assert tile["cell_auroc_change_sd"] == pytest.approx(0)
    # Means over the categories: 3.25 and 3.5, of the baseline 2.5 and 2.
    assert mean["ratio_change"] == pytest.approx((0.75 + 1.5) / 2)
    assert rows["Plain", "tile"]["ratio_change"] is None
    assert rows["Bank", "tile"]["ratio"] is None


def test_the_change_leaves_out_seeds_that_the_baseline_lacks(many):
    plan, results = many
    results = [result for result in results if (result["method"], result["seed"]) != ("Plain", 0)]
    rows = {(row["method"], row["category"]): row for row in make_rows(plan, results)}
    assert rows["Held", "tile"]["ratio_change"] == pytest.approx(2)
    assert rows["Held", "tile"]["ratio_change_sd"] is None
    assert rows["Held", "tile"]["ratio"] == pytest.approx(4)


def test_tables_of_many_categories_are_written(many, tmp_path):
    plan, results = many
    rows = make_rows(plan, results)
    text = markdown(plan, rows, results, ["provenance"])
    sections = dict(re.findall(r"^### (.*?)\n\n(.*?)\n\n", text + "\n", flags=re.MULTILINE | re.DOTALL))
    assert list(sections) == ["(pooled)", "(mean)", "board", "tile"]
    assert sections["(pooled)"].splitlines()[0] == (
        "| method | I-AUROC | p | P-AUROC | p | AUPRO | AP (image) | FAR | unknown | train s | ms/image | MiB | "
        "M parameters |"
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
    assert "Δ: change, mean over seeds (Held against Plain)." in text

    write_csv(tmp_path / "many.csv", rows)
    with (tmp_path / "many.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["category"] for row in read] == ["(pooled)", "(mean)", "board", "tile"] * 3
    assert float(read[-1]["ratio_change"]) == pytest.approx(1.5)


def test_data_of_one_category_is_one_table(many):
    plan, results = many
    for result in results:
        del result["sides"]["seen"]["by_category"]["board"]
    rows = make_rows(plan, results)
    assert [row["method"] for row in rows] == ["Bank", "Plain", "Held"]
    assert all(not {"category", "ratio", "ratio_change"} & set(row) for row in rows)
    text = markdown(plan, rows, results, ["provenance"])
    assert "###" not in text
    assert "Δ" not in text
    assert (
        "| Bank | 50.0 ± 0.0 | – | 50.0 ± 0.0 | – | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 3 | – | – | – |"
        in text
    )


def test_folds_without_a_category_do_not_count_for_it(many):
    """Leave-one-subclass-out tests a single category in each fold."""
    plan, results = many
    first, second = results[2], results[4] | {"method": "Plain", "fold": "other"}
    del second["sides"]["seen"]["by_category"]["tile"]
    rows = {row["category"]: row["ratio"] for row in make_rows(plan, [first, second])}
    assert (rows["tile"], rows["board"], rows["(mean)"]) == (3.0, 2.25, (3.0 + 2.25) / 2)


# ── compared with the baseline ───────────────────────────────────────────────────────────────────────────────────────


def with_subclasses(results: list[dict], aurocs: dict[str, list[float]]) -> list[dict]:
    """Return the results with the image AUROC of three subclasses, one of which has the name of its category."""
    for result in results:
        subclasses = dict(zip(("tile", "board/a", "board/b"), aurocs[result["method"]], strict=True))
        result["sides"]["seen"]["by_subclass"] = {
            name: {"image_auroc": value + 0.001 * result["seed"]} for name, value in subclasses.items()
        }
    return results


def test_differences_are_paired_over_seeds_and_subclasses(many):
    plan, results = many
    results = with_subclasses(results, {"Bank": [0.5, 0.6, 0.7], "Plain": [0.6, 0.7, 0.8], "Held": [0.8, 0.6, 0.9]})
    rows = {(row["method"], row["category"]): row for row in make_rows(plan, results)}

    plain, held = rows["Plain", "(pooled)"], rows["Held", "(pooled)"]
    assert plain["image_auroc_difference"] == pytest.approx(0.1)  # to the first method of the plan
    assert plain["image_auroc_pairs"] == 6
    assert plain["image_auroc_p"] == pytest.approx(2 / 2**6)  # no other combination of signs has a larger mean
    assert held["image_auroc_difference"] == pytest.approx((0.2 - 0.1 + 0.1) / 3)  # to its own baseline
    assert rows["Held", "board"]["image_auroc_pairs"] == 4
    assert rows["Held", "tile"]["image_auroc_difference"] == pytest.approx(0.2)
    bank = rows["Bank", "(pooled)"]
    assert (bank["image_auroc_difference"], bank["image_auroc_p"], bank["image_auroc_pairs"]) == (
        None,
        None,
        0,
    )
    assert plain["pixel_auroc_p"] is None  # not in the results
    assert "Plain against Bank; Held against Plain" in markdown(plan, list(rows.values()), results, [])


def test_pairs_need_a_result_of_both_methods(many):
    plan, results = many
    results = with_subclasses(results, {"Bank": [0.5, 0.6, 0.7], "Plain": [0.6, 0.7, 0.8], "Held": [0.8, 0.6, 0.9]})
    results[3]["sides"]["seen"]["by_subclass"]["tile"]["image_auroc"] = None  # Plain, seed 1
    results = [result for result in results if (result["method"], result["seed"]) != ("Bank", 0)]
    rows = {(row["method"], row["category"]): row for row in make_rows(plan, results)}
    assert rows["Plain", "(pooled)"]["image_auroc_pairs"] == 2


def test_the_plan_can_name_the_baseline(many, tmp_path):
    _, results = many
    path = tmp_path / "other.yaml"
    path.write_text(MANY + "baseline: Plain\n")
    plan = read_plan(path)
    results = with_subclasses(results, {"Bank": [0.5, 0.6, 0.7], "Plain": [0.6, 0.7, 0.8], "Held": [0.8, 0.6, 0.9]})
    rows = {(row["method"], row["category"]): row for row in make_rows(plan, results)}
    assert rows["Bank", "(pooled)"]["image_auroc_difference"] == pytest.approx(-0.1)
    assert (
        "sign-flip test of the difference (Bank, Held against Plain), paired over seeds, folds and subclasses."
        in markdown(plan, list(rows.values()), results, [])
    )


# ── costs, failures, files ───────────────────────────────────────────────────────────────────────────────────────────


def test_costs_are_means_over_the_runs_that_have_them(many):
    plan, results = many
    results[0] |= {"inference_ms": 10.0, "peak_mib": 600.0, "parameters": 2_000_000}
    results[1] |= {"inference_ms": 20.0, "peak_mib": None}  # not available on that system
    (bank, *_) = make_rows(plan, results)
    assert (bank["inference_ms"], bank["peak_mib"], bank["parameters"]) == (15, 600, 2_000_000)
    text = markdown(plan, [bank], results, [])
    assert re.search(r"^\| Bank \|.*\| 3 \| 15 \| 600 \| 2.00 \|$", text, flags=re.MULTILINE)


def test_failed_runs_are_rows_with_a_reason(many):
    plan, results = many
    for result in results[2:4]:
        del result["sides"]
        result["error"] = "RuntimeError: no | memory\nleft"
    rows, failed = make_rows(plan, results), failures(results)
    assert [row["method"] for row in rows if row["category"] == "(mean)"] == ["Bank", "Held"]
    assert failed == [
        {
            "data": "both",
            "protocol": "seen",
            "side": None,
            "method": "Plain",
            "error": "RuntimeError: no | memory\nleft",
            "failed_runs": 2,
        }
    ]
    assert "| Plain | both | seen | all | 0, 1 | RuntimeError: no \\| memory left |" in markdown(
        plan, rows, results, []
    )
    assert "RuntimeError: no | memory" in html(plan, rows, results, [])


def test_differences_to_the_published_version_are_listed(many):
    plan, results = many
    results[0]["differs"] = "this for <that>"
    rows = make_rows(plan, results)
    assert "| Bank | this for <that> |" in markdown(plan, rows, results, [])
    assert '<td class="text">this for &lt;that&gt;</td>' in html(plan, rows, results, [])


class Tables(HTMLParser):
    """Collects the cells of every row and every URL."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.urls: list[str] = []
        self.in_cell = False

    def handle_starttag(self, tag, attrs):
        self.urls += [value for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data


def test_the_page_shows_the_cells_of_the_markdown(many):
    plan, results = many
    rows = make_rows(plan, results)
    page = Tables()
    page.feed(html(plan, rows, results, ["here & now"]))
    lines = [line for line in markdown(plan, rows, results, []).splitlines() if line.startswith("| ")]
    cells = [line.strip("| ").split(" | ") for line in lines if not line.startswith("| ---")]
    assert page.rows == cells
    assert page.urls == []
    assert "here &amp; now" in html(plan, rows, results, ["here & now"])


def test_parquet_and_csv_hold_the_same_rows(many, tmp_path):
    plan, results = many
    rows = [*make_rows(plan, results), {"data": "both", "method": "Lost", "error": "gone", "failed_runs": 1}]
    write_csv(tmp_path / "many.csv", rows)
    write_parquet(tmp_path / "many.parquet", rows, ["line one", "line two"])

    table = parquet.read_table(tmp_path / "many.parquet")
    with (tmp_path / "many.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))

    assert table.schema.metadata[b"provenance"] == b"line one\nline two"
    read = table.to_pylist()
    assert len(read) == len(lines) == len(rows)
    for row, line, wanted in zip(read, lines, rows, strict=True):
        assert {name: value for name, value in row.items() if value is not None} == {
            name: value for name, value in wanted.items() if value is not None
        }
        assert line == {name: "" if value is None else str(value) for name, value in row.items()}


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "results").glob("*.csv")), ids=lambda p: p.stem)
def test_tables_of_older_versions_have_the_same_columns(path: Path):
    """They may lack newer columns; none was renamed."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert {"data", "protocol", "side", "method", "seeds", "train_s", "test_ms", *METRICS} <= set(rows[0])
    assert json.dumps(rows)
