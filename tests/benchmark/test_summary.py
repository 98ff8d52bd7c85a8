"""Methods are compared over the sets on which all of them have a value; each set counts once."""

from pathlib import Path

import pytest

from normweave.benchmark.plan import Plan, read_plan
from normweave.benchmark.summary import SUMMARISED, summarise
from normweave.benchmark.table import html, make_rows, markdown
from normweave.report.metrics import binomial_interval

PLAN = """
title: Several sets
data:
  - {name: tiles, path: tiles, protocols: [seen, leave-one-subclass-out]}
  - {name: cloth, path: cloth, protocols: [given]}
methods:
  - {name: A, model: patchcore}
  - {name: B, model: dfm}
  - {name: Image, model: mean-shift, seeds: [0]}
seeds: [0, 1]
"""
FAR = "false_alarm_rate"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return read_plan(path)


def side(auroc: float, *, rate: float = 0.0, images: int = 10, groups: tuple[str, ...] = ("g",), maps: bool = True):
    numbers = dict.fromkeys(("image_auroc", "image_ap", "image_f1max"), auroc)
    numbers |= dict.fromkeys(("pixel_auroc", "aupro", "pixel_ap"), auroc if maps else None)
    counts = {"n_normal": images, "n_anomalous": 5, "good_groups": list(groups), "over_generalisation": None}
    return numbers | {FAR: rate, "unknown_rate": 0.0} | counts | {"by_category": {}, "by_subclass": {}}


def result(method: str, where: tuple[str, str, str], seed: int, **sides):
    data, protocol, fold = where
    row = {"method": method, "data": data, "protocol": protocol, "fold": fold, "seed": seed}
    return row | {"sides": sides, "promised": 0.05, "train_s": 1.0, "test_ms": 1.0}


def failed(method: str, where: tuple[str, str, str], seed: int):
    data, protocol, fold = where
    return {"method": method, "data": data, "protocol": protocol, "fold": fold, "seed": seed, "error": "no memory"}


SEEN, ONE, TWO = (
    ("tiles", "seen", "all"),
    ("tiles", "leave-one-subclass-out", "one"),
    ("tiles", "leave-one-subclass-out", "two"),
)
CLOTH = ("cloth", "given", "all")


@pytest.fixture
def results():
    """A is best on tiles and B on cloth; the folds of tiles have one image more or less, cloth has two sides."""
    made = []
    for seed in (0, 1):
        shift = 0.01 * seed
        made += [
            result("A", SEEN, seed, seen=side(0.9 + shift)),
            result("A", ONE, seed, unseen=side(0.8)),
            result("A", TWO, seed, unseen=side(0.6)),
            result("A", CLOTH, seed, seen=side(0.9), unseen=side(0.5)),
            result("B", SEEN, seed, seen=side(0.9)),
            result("B", ONE, seed, unseen=side(0.6)),
            result("B", TWO, seed, unseen=side(0.6)),
            result("B", CLOTH, seed, seen=side(0.95), unseen=side(0.8)),
        ]
    for where, name in ((SEEN, "seen"), (ONE, "unseen"), (TWO, "unseen")):
        made.append(result("Image", where, 0, **{name: side(0.7, maps=False)}))
    return [*made, result("Image", CLOTH, 0, seen=side(0.7, maps=False), unseen=side(0.7, maps=False))]


def rows_of(plan: Plan, results):
    summary = summarise(plan, results)
    assert summary is not None
    return {row["method"]: row for row in summary.rows}


def test_each_set_counts_once_after_the_mean_over_folds_and_seeds(plan, results):
    rows = rows_of(plan, results)
    # tiles seen 0.905, tiles unseen (0.8 + 0.6) / 2, cloth seen and unseen
    assert rows["A"]["image_auroc"] == pytest.approx((0.905 + 0.7 + 0.9 + 0.5) / 4)
    assert rows["B"]["image_auroc"] == pytest.approx((0.9 + 0.6 + 0.95 + 0.8) / 4)
    assert {row["image_auroc_sets"] for row in rows.values()} == {4}


def test_the_distance_is_to_the_best_method_of_each_set(plan, results):
    rows = rows_of(plan, results)
    assert rows["A"]["image_auroc_worst"] == pytest.approx(0.3)
    assert rows["A"]["image_auroc_worst_set"] == "cloth: given, unseen"
    assert rows["A"]["image_auroc_near"] == 2  # on tiles
    assert rows["B"]["image_auroc_near"] == 3  # half a point below A on tiles, seen
    assert rows["Image"]["image_auroc_worst"] == pytest.approx(0.25)
    assert rows["Image"]["image_auroc_near"] == 1  # on tiles, unseen


def test_a_method_without_maps_is_not_compared_in_pixel_metrics(plan, results):
    rows = rows_of(plan, results)
    assert (rows["Image"]["aupro"], rows["Image"]["aupro_lacking"]) == (None, 4)
    assert rows["A"]["aupro_sets"] == 4  # it leaves out no set for the others
    assert rows["A"]["aupro"] == pytest.approx(rows["A"]["image_auroc"])


def test_a_failed_run_leaves_its_set_out_for_all(plan, results):
    """Otherwise the mean of A would rise without the fold or the set on which it is worst."""
    broken = [
        failed("A", TWO, 0) if (each["method"], each["fold"], each["seed"]) == ("A", "two", 0) else each
        for each in results
    ]
    rows = rows_of(plan, broken)
    assert rows["A"]["image_auroc"] == pytest.approx((0.905 + 0.9 + 0.5) / 3)
    assert rows["B"]["image_auroc"] == pytest.approx((0.9 + 0.95 + 0.8) / 3)
    assert (rows["A"]["image_auroc_lacking"], rows["B"]["image_auroc_lacking"]) == (1, 0)
    summary = summarise(plan, broken)
    assert summary is not None
    assert summary.left_out["image_auroc"] == {"tiles: leave-one-subclass-out, unseen": ["A"]}
    text = markdown(plan, make_rows(plan, broken), broken, [])
    assert "Left out: tiles: leave-one-subclass-out, unseen (no value of A)." in text
    assert "### Image AUROC (3 sets)" in text


def test_a_fold_that_fails_for_every_method_counts_for_none(plan, results):
    broken = [failed(each["method"], TWO, each["seed"]) if each["fold"] == "two" else each for each in results]
    rows = rows_of(plan, broken)
    assert rows["A"]["image_auroc"] == pytest.approx((0.905 + 0.8 + 0.9 + 0.5) / 4)
    assert rows["A"]["image_auroc_lacking"] == 0
    text = markdown(plan, make_rows(plan, broken), broken, [])
    assert "in no mean: tiles: leave-one-subclass-out, two." in text


def test_a_metric_that_one_fold_lacks_is_missing_for_the_set(plan, results):
    for each in results:
        if (each["method"], each["fold"]) == ("B", "one"):
            each["sides"]["unseen"]["aupro"] = None
    rows = rows_of(plan, results)
    assert (rows["B"]["aupro_lacking"], rows["A"]["aupro_sets"], rows["A"]["image_auroc_sets"]) == (1, 3, 4)


def test_false_alarms_are_pooled_and_their_interval_counts_groups(plan):
    results = [
        result("A", SEEN, 0, seen=side(0.9, rate=0.1, images=10, groups=("t1", "t2"))),
        result("A", SEEN, 1, seen=side(0.9, rate=0.3, images=10, groups=("t2", "t3"))),
        result("A", ONE, 0, unseen=side(0.9, rate=0.0, images=20, groups=("t1",))),
        result("A", CLOTH, 0, seen=side(0.9, rate=0.5, images=40, groups=("t1", "c1"))),
    ]
    row = rows_of(plan, results)["A"]
    assert row[FAR] == pytest.approx((0.2 + 0.0 + 0.5) / 3)
    assert row[f"{FAR}_pooled"] == pytest.approx((1 + 3 + 0 + 20) / 80)
    assert row[f"{FAR}_groups"] == 5  # t1 to t3 of tiles, t1 and c1 of cloth
    assert (row[f"{FAR}_low"], row[f"{FAR}_high"]) == binomial_interval(0.3 * 5, 5)
    assert row[f"{FAR}_promised"] == pytest.approx(0.05)
    # A rate below the promise is not better than the promise.
    assert row[f"{FAR}_worst"] == pytest.approx(0.45)
    assert row[f"{FAR}_near"] == 1
    assert row[f"{FAR}_worst_set"] == "cloth: given, seen"


def test_a_side_may_promise_another_rate(plan, results):
    for each in results:
        for table in each["sides"].values():
            table["promised"] = 0.25
    assert rows_of(plan, results)["A"][f"{FAR}_promised"] == pytest.approx(0.25)


def test_results_of_an_older_version_have_no_false_alarms_here(plan, results):
    del results[0]["promised"]
    rows = rows_of(plan, results)
    assert (rows["A"][f"{FAR}_lacking"], rows["B"][f"{FAR}_sets"]) == (1, 3)


def test_one_set_has_no_summary(plan, results):
    one = [each for each in results if (each["data"], each["protocol"]) == ("tiles", "seen")]
    assert summarise(plan, one) is None
    assert "Over all data sets" not in markdown(plan, make_rows(plan, one), one, [])


def test_the_block_is_in_markdown_and_html(plan, results):
    rows = make_rows(plan, results)
    text = markdown(plan, rows, results, [])
    assert text.index("## cloth: given, unseen subclasses") < text.index("## Over all data sets")
    for heading in SUMMARISED.values():
        assert f"### {heading} (4 sets)" in text
    assert "| method | mean | worst | near | lacking | worst set |\n" in text
    assert "| A | 75.1 | 30.0 | 2 | 0 | cloth: given, unseen |\n" in text
    assert "| Image | – | – | – | 4 | – |\n" in text
    page = html(plan, rows, results, [])
    assert "It counts once" in page
    assert "cloth: given, unseen</td>" in page
