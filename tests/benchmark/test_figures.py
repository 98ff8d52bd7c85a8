"""Figures show the numbers of the table, as far as results and artifacts exist."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from normweave.benchmark.figures import CHANCE, curves, draw, image_and_mask
from normweave.benchmark.plan import read_plan
from normweave.benchmark.table import METRICS, html, make_rows, markdown
from normweave.types import Sample

PLAN = """
title: Figures
data:
  - {name: My cloth!, path: cloth, protocols: [given]}
methods:
  - {name: One, model: adapted-moe, set: [head.top_k=1]}
  - {name: Two, model: adapted-moe, set: [head.top_k=2]}
  - {name: Three, model: adapted-moe, set: [head.top_k=3, head.border=0]}
  - {name: Four, model: adapted-moe, set: [head.top_k=4]}
  - {name: Image, model: mean-shift}
seeds: [0, 1]
"""
METHODS = ("One", "Two", "Three", "Four", "Image")


@pytest.fixture
def made(tmp_path: Path):
    """Return a plan, results of its runs, their folds, and the folder of their artifacts."""
    plan_path = tmp_path / "plan.yaml"
    plan_path.write_text(PLAN)
    plan = read_plan(plan_path)
    samples = [
        Sample(image_path=tmp_path / f"fit{n}.png", category="cloth", subclass="ab"[n % 2], split="train")
        for n in range(12)
    ]
    for number, (subclass, defect) in enumerate([("a", None), ("a", "hole"), ("b", None), ("b", "stain")]):
        path = tmp_path / f"test{number}.png"
        Image.new("RGB", (40, 20), (90, 40, 60 * number)).save(path)
        mask = path.with_name(f"mask{number}.png")
        Image.fromarray(np.pad(np.full((4, 4), 255, np.uint8), ((8, 8), (18, 18)))).save(mask)
        samples.append(
            Sample(
                image_path=path,
                category="cloth",
                subclass=subclass,
                split="test",
                label="anomalous" if defect else "normal",
                defect=defect,
                mask_path=mask if defect else None,
            )
        )
    runs = tmp_path / "plan.runs"
    runs.mkdir()
    rng = np.random.default_rng(0)
    results = []
    for number, method in enumerate(METHODS):
        for seed in plan.seeds:
            image_level = method == "Image"
            shares = dict.fromkeys(METRICS, 0.7 + 0.02 * number + 0.01 * seed)
            if image_level:
                shares |= {"pixel_auroc": None, "aupro": None}
            subclasses = {
                f"cloth/{name}": {"image_auroc": shares["image_auroc"] - 0.3 * (name == "b")} for name in "ab"
            }
            counts = {"n_normal": 2, "n_anomalous": 2, "over_generalisation": None}
            side = shares | counts | {"by_category": {"cloth": shares | counts}, "by_subclass": subclasses}
            name = f"{method}{seed}.safetensors"
            tensors = {"scores/seen": np.array([[0, 1, 2], [0, 1.5, 2], [1, 3, 2], [1, 1, 2]], dtype=np.float64)}
            if not image_level:
                tensors |= {f"maps/seen/{n}": rng.random((20, 40), dtype=np.float32) for n in range(3)}
                tensors |= {
                    "embeddings": np.random.default_rng(number // 2).random((16, 5), dtype=np.float32),
                    "roles": np.array([0] * 12 + [1, 1, 2, 2], dtype=np.int64),
                }
            names = "[]" if image_level else str([f"cloth/{s.subclass}" for s in samples]).replace("'", '"')
            save_file(tensors, runs / name, metadata={"subclass_names": names})
            results.append(
                {
                    "method": method,
                    "data": "My cloth!",
                    "protocol": "given",
                    "fold": "all",
                    "seed": seed,
                    "sides": {"seen": side},
                    "artifact": name,
                    "train_s": 1.0,
                    "test_ms": 1.0,
                }
            )
    (item,) = plan.data
    divisions = {(item.name, "given", seed): item.folds(samples, "given", seed=seed) for seed in plan.seeds}
    return plan, results, divisions, runs


def drawn(made, folder: Path):
    plan, results, divisions, runs = made
    return draw(plan, results, make_rows(plan, results), divisions, runs=runs, folder=folder)


def test_every_figure_of_the_plan_is_drawn(made, tmp_path: Path):
    figures = drawn(made, tmp_path / "figures")
    assert [figure.path.name for figure in figures] == [
        "methods-my-cloth-given-seen.svg",
        "subclasses-my-cloth-given-seen.svg",
        "scores-my-cloth-given-seen.svg",
        "maps-my-cloth-given-seen.jpg",
        "routing-my-cloth-given.svg",
        "curve-head-top-k.svg",
    ]
    assert [figure.of_images for figure in figures] == [False, False, False, True, False, False]
    assert sorted(figure.path for figure in figures) == sorted((tmp_path / "figures").iterdir())
    with Image.open(figures[3].path) as image:
        assert image.format == "JPEG"
        assert image.width > image.height


def texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_bars_are_labelled_with_the_numbers_of_the_table(made, tmp_path: Path):
    folder = tmp_path / "figures"
    drawn(made, folder)
    bars = texts(folder / "methods-my-cloth-given-seen.svg")
    for index, method in enumerate(METHODS):
        assert method in bars
        number = f"{70.5 + 2 * index:.1f}"  # the mean of both seeds
        assert bars.count(number) == (1 if method == "Image" else 3)
    subclasses = texts(folder / "subclasses-my-cloth-given-seen.svg")
    assert {"a", "b", "70.5", "40.5", "78.5", "48.5"} <= set(
        subclasses
    )  # names without the category, as there is only one


def test_histograms_and_embeddings_name_their_methods(made, tmp_path: Path):
    folder = tmp_path / "figures"
    drawn(made, folder)
    assert set(METHODS) <= set(texts(folder / "scores-my-cloth-given-seen.svg"))
    routing = texts(folder / "routing-my-cloth-given.svg")
    assert {"a", "b"} <= set(routing)
    assert {"One and 1 more", "Three and 1 more"} <= set(routing)  # equal embeddings are drawn once
    assert "Image" not in routing


def test_a_curve_has_methods_that_differ_in_one_setting_only(made):
    plan, results, _, _ = made
    made_curves = dict(curves(plan, make_rows(plan, results)))
    assert list(made_curves) == ["head.top_k"]
    (points,) = made_curves["head.top_k"].values()
    assert [(value, row["method"]) for value, row in points] == [(1, "One"), (2, "Two"), (4, "Four")]


def test_the_same_results_give_the_same_figures(made, tmp_path: Path):
    first, second = (drawn(made, tmp_path / name) for name in ("first", "second"))
    for one, other in zip(first, second, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()


def test_failed_runs_are_left_out(made, tmp_path: Path):
    plan, results, divisions, runs = made
    broken = [
        {key: result[key] for key in ("method", "data", "protocol", "fold", "seed")} | {"error": "no memory"}
        if result["method"] == "Two"
        else result
        for result in results
    ]
    drawn(made, tmp_path / "figures")
    (tmp_path / "figures" / "notes.txt").write_text("a file of the user")
    drawn((plan, broken, divisions, runs), tmp_path / "figures")
    assert (tmp_path / "figures" / "notes.txt").exists()
    names = texts(tmp_path / "figures" / "methods-my-cloth-given-seen.svg")
    assert "Two" not in names
    assert "One" in names
    assert not (tmp_path / "figures" / "curve-head-top-k.svg").exists()  # a curve needs three points


def test_unreadable_images_and_masks_are_grey(made, tmp_path: Path):
    _, _, divisions, _ = made
    ((fold,), *_) = divisions.values()
    (tmp_path / "test1.png").write_bytes(b"no image")
    (tmp_path / "mask3.png").write_bytes(b"no mask")
    first, *_, last = [sample for sample in fold.tests["seen"] if sample.label == "anomalous"]
    assert {int(value) for value in np.unique(image_and_mask(first)[0])} == {128}
    assert np.unique(image_and_mask(last)[1]).tolist() == [0.5]
    drawn(made, tmp_path / "figures")
    assert (tmp_path / "figures" / "maps-my-cloth-given-seen.jpg").exists()


def test_bars_start_at_the_metrics_of_random_scores():
    from normweave.report.metrics import PixelMetrics

    rng = np.random.default_rng(0)
    metrics = PixelMetrics()
    for _ in range(8):
        mask = np.zeros((64, 64), dtype=bool)
        mask[10:30, 10:30] = True
        metrics.update(rng.random((64, 64)).astype(np.float32), mask)
    values, _ = metrics.compute()
    assert values["pixel_auroc"] == pytest.approx(CHANCE["pixel_auroc"], abs=0.02)
    assert values["aupro"] == pytest.approx(CHANCE["aupro"], abs=0.02)


def test_pages_show_all_figures_and_markdown_those_without_images(made, tmp_path: Path):
    plan, results, _, _ = made
    figures = drawn(made, tmp_path / "plan.figures")
    rows = make_rows(plan, results)
    text = markdown(plan, rows, results, ["provenance"], figures)
    assert "![methods-my-cloth-given-seen](plan.figures/methods-my-cloth-given-seen.svg)" in text
    assert "maps-" not in text
    page = html(plan, rows, results, ["provenance"], figures)
    assert page.count("data:image/svg+xml;base64,") == 5
    assert page.count("data:image/jpeg;base64,") == 1
    assert "## Figures" not in markdown(plan, rows, results, ["provenance"])
