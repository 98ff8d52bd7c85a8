"""A table is made once: finished runs are not repeated, failures are rows with their reason."""

import json
import multiprocessing
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from normweave.benchmark.plan import read_plan
from normweave.benchmark.run import Run, divide, fit_peer, list_runs, read_samples, run
from normweave.bridges import peers, ray_tasks
from normweave.bridges.ray_tasks import Failed
from normweave.errors import ConfigError, DataError, MissingError
from normweave.textiles import SEEN, make_textures

PLAN = """
title: Small
data:
  - name: cloth
    textures: {train_images: 8, test_images: 2, defect_images: 2}
    protocols: [given]
    set: [data.subclass_from=column, prepare.height=128, prepare.width=128, outcome.false_alarm_rate=0.1]
methods:
  - {name: DFM, model: dfm}
  - {name: Cannot be, model: dfm, set: [features.backbone=absent]}
seeds: [0]
"""

FAILING = "{name: Cannot be, model: dfm, set: [features.backbone=absent]}"


@pytest.mark.slow
def test_a_plan_becomes_a_table_and_is_not_run_twice(tmp_path: Path):
    plan = tmp_path / "small.yaml"
    plan.write_text(PLAN.replace("methods:", "  - {name: absent, path: absent}\nmethods:"))
    output = tmp_path / "results"
    rows = run(plan, output=output, cache=tmp_path / "cache")
    *good, over_all, _, failed, absent = rows
    assert {(row["method"], row["side"]) for row in good} == {("DFM", "seen"), ("DFM", "unseen")}
    assert over_all["image_auroc"] == pytest.approx(sum(row["image_auroc"] for row in good) / 2)
    assert over_all["false_alarm_rate_groups"] == 10  # one for the good test images of each subclass
    assert over_all["false_alarm_rate_promised"] == pytest.approx(0.1)
    assert (failed["method"], failed["side"], failed["failed_runs"]) == ("Cannot be", None, 1)
    assert "absent" in failed["error"]
    assert (absent["method"], absent["data"]) == ("(every method)", "absent")
    for row in good:
        assert row["inference_ms"] > 0
        assert row["peak_mib"] > 100  # torch alone
        assert 3e4 < row["parameters"] < 1e7
        assert 0 <= row["image_auroc"] <= 1
        assert 0 <= row["false_alarm_rate"] <= 1
    text = (output / "small.md").read_text()
    assert "## Failed runs" in text
    assert "absent" in text
    assert "![scores-cloth-given-unseen](small.figures/scores-cloth-given-unseen.svg)" in text
    assert (output / "small.figures" / "maps-cloth-given-unseen.jpg").stat().st_size > 10_000
    files = sorted((output / "small.runs").glob("*.json"))
    assert len(files) == 2
    before = [file.stat().st_mtime_ns for file in files]

    assert run(plan, output=output, cache=tmp_path / "cache") == rows
    assert [file.stat().st_mtime_ns for file in files] == before
    files[0].unlink()
    again = run(plan, output=output, cache=tmp_path / "cache")
    assert [row.get("image_auroc") for row in again] == [row.get("image_auroc") for row in rows]
    assert all(json.loads(file.read_text())["data"] == "cloth" for file in files)


def test_runs_that_are_computed_elsewhere_give_the_same_table(cloth, tmp_path, monkeypatch):
    """`ray_tasks` is tested for itself; here its tasks run in this process."""
    calls = []

    def one_by_one(address, function, items, *, save, processors, progress):
        calls.append((address, len(items), processors))
        for item in items[:1]:
            save(item, function(item))
        return [Failed(number, "the loss of its worker, 4 times") for number in range(1, len(items))]

    monkeypatch.setattr(ray_tasks, "run", one_by_one)
    plan = tmp_path / "small.yaml"
    plan.write_text(
        f"""
title: Small
data:
  - name: cloth
    path: {cloth}
    protocols: [given]
    set: [data.subclass_from=column, data.calibration=split, features.weights=random, 'features.strides=[8]',
      prepare.height=64, prepare.width=64, outcome.false_alarm_rate=0.1]
methods:
  - {{name: DFM, model: dfm}}
  - {FAILING}
seeds: [0]
"""
    )
    options = {"root": tmp_path, "cache": tmp_path / "cache"}
    far = run(plan, output=tmp_path / "far", ray="10.0.0.5:6379", **options)
    assert calls == [("10.0.0.5:6379", 2, 1)]
    assert "the loss of its worker, 4 times" in far[-1]["error"]
    near = run(plan, output=tmp_path / "near", threads=1, **options)
    measured = ("train_s", "test_ms", "inference_ms", "peak_mib")
    for one, other in zip(near[:-1], far[:-1], strict=True):
        assert {key: one[key] for key in one if key not in measured} == {
            key: other[key] for key in other if key not in measured
        }
    assert len(list((tmp_path / "far" / "small.runs").glob("*.safetensors"))) == 1
    assert run(plan, output=tmp_path / "far", ray="10.0.0.5:6379", **options)[:-1] == far[:-1]
    assert calls[1:] == [("10.0.0.5:6379", 1, 1)]  # the finished run is not repeated


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
    samples = read_samples(read_plan(plan).data[0], tmp_path / "data", tmp_path / "results")

    names = {sample.subclass_name for sample in samples}
    assert {"tile/exp1", "tile/exp2"} <= names
    assert {f"cloth/{textile.name}" for textile in SEEN} <= names
    assert {sample.group.split("/")[0] for sample in samples if sample.group} == {"cloth"}
    made = [sample for sample in samples if sample.category == "cloth"]
    wanted = make_textures(tmp_path / "wanted", seed=3, train_images=1, test_images=0, defect_images=1).parent / made[
        0
    ].image_path.relative_to(tmp_path / "results" / "data" / "both" / "2")
    assert made[0].image_path.read_bytes() == wanted.read_bytes()


def test_parts_of_one_category_say_where_it_stands_twice(tmp_path):
    for name in ("a/tile/good/1.png", "b/tile/good/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    plan = tmp_path / "plan.yaml"
    plan.write_text(MANY.replace("{path: tile}, {path: board}", "{path: a}, {path: b}"))
    with pytest.raises(DataError, match="Category 'tile' is in a and in b"):
        read_samples(read_plan(plan).data[0], tmp_path, tmp_path / "results")


UNUSABLE = """
title: Some sets cannot be used
data:
  - {name: absent, path: absent, protocols: [seen]}
  - {name: shared, path: shared.csv, protocols: [given]}
  - {name: single, path: single.csv, protocols: [given, leave-one-subclass-out]}
  - {name: untested, path: untested.csv, protocols: [seen]}
methods:
  - {name: Bank, model: patchcore}
seeds: [0, 1]
"""


@pytest.fixture
def unusable(tmp_path: Path) -> Path:
    """A plan of sets none of which can be trained: absent, a file in train and test, few images, no test image."""
    for number, name in enumerate("abc"):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "shared.csv").write_text("image_path,split\na.png,train\na.png,test\n")
    (tmp_path / "single.csv").write_text("image_path,split,label\na.png,train,\nb.png,test,\nc.png,test,bad\n")
    (tmp_path / "untested.csv").write_text("image_path,split\na.png,train\nb.png,train\n")
    plan = tmp_path / "unusable.yaml"
    plan.write_text(UNUSABLE)
    return plan


def test_a_set_that_cannot_be_read_or_divided_is_a_row_and_the_others_go_on(unusable: Path, tmp_path: Path):
    plan = read_plan(unusable)
    divisions, failed = divide(plan, tmp_path, tmp_path / "results")
    assert list(divisions) == [
        (*where, seed) for where in (("single", "given"), ("untested", "seen")) for seed in (0, 1)
    ]
    runs = [(item.seed, timed) for item, _, timed in list_runs(plan, divisions, tmp_path)]
    assert runs == [(0, True), (1, False), (0, True), (1, False)]
    reasons = {(row["data"], row["protocol"]): row["error"] for row in failed}
    assert len(failed) == 6  # one for each seed
    assert "absent" in reasons["absent", "seen"]
    assert "The same file is in train and test" in reasons["shared", "given"]
    assert "at least two subclasses" in reasons["single", "leave-one-subclass-out"]


@pytest.mark.slow
def test_reasons_of_sets_and_of_runs_are_in_the_table(unusable: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"unusable\.md"):
        run(unusable, output=tmp_path / "results", root=tmp_path, cache=tmp_path / "cache")
    text = (tmp_path / "results" / "unusable.md").read_text()
    assert "| (every method) | shared | given | all | 0, 1 | DataError: The same file" in text
    assert "| Bank | single | given | all | 0, 1 | DataError: 1 normal train images." in text
    assert "| Bank | untested | seen | all | 0, 1 | DataError: Fold 'all' has no test images." in text
    assert "shared,given" in (tmp_path / "results" / "unusable.csv").read_text()


@pytest.mark.slow
def test_a_run_that_the_system_ends_is_a_row_and_is_tried_again(tmp_path: Path):
    """As when memory runs out: the other runs go on."""
    plan = tmp_path / "small.yaml"
    plan.write_text(PLAN.replace("features.backbone=absent", "head.cells=4"))
    output = tmp_path / "results"

    def kill_the_next() -> None:
        while not (found := multiprocessing.active_children()):
            time.sleep(0.01)
        psutil.Process(found[0].pid).kill()

    def kill_the_second(what: str, number: int, total: int) -> None:
        if number == 1:
            threading.Thread(target=kill_the_next).start()

    *good, _, _, failed = run(plan, output=output, cache=tmp_path / "cache", progress=kill_the_second)
    assert {row["method"] for row in good} == {"DFM"}
    assert failed["error"] == "The process of the run ended with signal 9."
    assert (
        "| Cannot be | cloth | given | all | 0 | The process of the run ended with signal 9. |"
        in (output / "small.md").read_text()
    )
    assert len(list((output / "small.runs").glob("*.json"))) == 1

    rows = run(plan, output=output, cache=tmp_path / "cache")
    assert {row["method"] for row in rows} == {"DFM", "Cannot be"}
    assert all("error" not in row for row in rows)


@pytest.mark.slow
def test_peers_stand_in_the_table_and_what_they_cannot_do_too(tmp_path: Path):
    pytest.importorskip("anomalib", reason="needs pip install 'normweave[bench]'")
    plan = tmp_path / "small.yaml"
    plan.write_text(
        PLAN.replace(
            "{name: Cannot be, model: dfm, set: [features.backbone=absent]}",
            "{name: P, model: anomalib/padim}",
        )
        + "baseline: P\n"
    )
    text = plan.read_text().replace("seeds:", "  - {name: Dino, model: anomalib/dinomaly}\nseeds:")
    plan.write_text(text)
    *rows, dino = (
        row for row in run(plan, output=tmp_path / "results", cache=tmp_path / "cache") if row["data"] != "(all)"
    )

    peer = {row["side"]: row for row in rows if row["method"] == "P"}
    assert set(peer) == {"seen", "unseen"}
    for row in peer.values():
        assert 0 <= row["pixel_auroc"] <= 1
        assert row["parameters"] > 32 * 32 * 100 * 100  # a covariance for each cell of stride 4
        assert row["image_auroc_p"] is None  # not compared with itself
    ours = {row["side"]: row for row in rows if row["method"] == "DFM"}
    assert ours["seen"]["image_auroc_pairs"] == 6
    assert "needs the weights of vit_base_patch14_reg4_dinov2" in dino["error"]
    written = (tmp_path / "results" / "small.md").read_text()
    assert "| P | tf_efficientnet_lite0 for resnet18 |" in written
    assert "anomalib 2." in written


def test_wrong_settings_of_a_peer_are_named_before_anything_runs(tmp_path: Path):
    plan = tmp_path / "small.yaml"
    plan.write_text(
        PLAN.replace("model: dfm, set: [features.backbone=absent]", "model: anomalib/stfpm, set: [epoch=1]")
    )
    with pytest.raises(ConfigError, match=r"Unknown setting of anomalib/stfpm 'epoch'\. Did you mean 'epochs'"):
        run(plan, output=tmp_path / "results", cache=tmp_path / "cache")
    assert not list((tmp_path / "results").glob("small.*s/*"))


def test_a_peers_settings_decide_its_run(tmp_path: Path):
    def key(settings: str) -> str:
        plan = tmp_path / "small.yaml"
        plan.write_text(
            PLAN.replace(
                "model: dfm, set: [features.backbone=absent]",
                f"model: anomalib/stfpm, set: [{settings}]",
            )
        )
        read = read_plan(plan)
        return Run(method=read.methods[1], data=read.data[0], root="data", protocol="given", fold="all", seed=0).key

    assert len({key("epochs=1"), key("epochs=2"), key("prepare.height=64")}) == 3


def test_a_further_seed_or_protocol_repeats_nothing(tmp_path: Path):
    def keys(text: str) -> set[str]:
        plan = tmp_path / "small.yaml"
        plan.write_text(text)
        read = read_plan(plan)
        divisions, _ = divide(read, tmp_path, tmp_path / "results")
        return {item.key for item, *_ in list_runs(read, divisions, tmp_path)}

    first = keys(PLAN)
    assert len(first) == 2
    more = keys(
        PLAN.replace("protocols: [given]", "protocols: [given, seen]")
        .replace("model: dfm}", "model: dfm, seeds: [0, 1]}")
        .replace("model: dfm, set", "model: dfm, baseline: DFM, set")
    )
    assert first < more
    assert len(more) == 6
    assert not first & keys(PLAN.replace("height=128", "height=64"))


@pytest.mark.slow
def test_one_model_of_two_categories_from_a_plan(tmp_path):
    """Through training and test: what `measure` gives is what the tables need."""
    table = make_textures(tmp_path / "rugs", train_images=8, test_images=2, defect_images=2, seen=SEEN[:2], unseen=())
    table.write_text(table.read_text().replace(",cloth,", ",rug,"))
    plan = tmp_path / "small.yaml"
    plan.write_text(
        PLAN.replace(
            "textures: {train_images: 8, test_images: 2, defect_images: 2}",
            "parts: [{path: rugs}, {textures: {train_images: 8, test_images: 2, defect_images: 2}}]",
        ).replace("protocols: [given]", "protocols: [seen]")
    )
    *rows, _ = run(plan, output=tmp_path / "results", root=tmp_path, cache=tmp_path / "cache")
    assert [row["category"] for row in rows] == ["(pooled)", "(mean)", "cloth", "rug"]
    pooled, mean, cloth, rug = (row["image_auroc"] for row in rows)
    assert mean == pytest.approx((cloth + rug) / 2)
    assert 0 <= pooled <= 1
    text = (tmp_path / "results" / "small.md").read_text()
    assert "### rug" in text
    assert {row["ratio"] for row in rows} == {None}


def test_without_anomalib_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "normweave.bridges.peer_network", None)
    with pytest.raises(MissingError, match=r"pip install 'normweave\[bench\]'"):
        fit_peer(peers.read("anomalib/padim", [], seed=0), [])
