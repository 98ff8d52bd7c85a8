"""Tables add up: every test image counts once in each, and means are means."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from normweave import settings
from normweave.benchmark.evaluate import (
    Stratum,
    compare,
    evaluate,
    make_tables,
    measure,
    read_metrics,
    tile_coverage,
)
from normweave.config import Config, DataConfig
from normweave.data.images import read_mask
from normweave.data.layouts import read
from normweave.detector import Detector
from normweave.errors import DataError
from normweave.report.metrics import OverGeneralisation, PixelMetrics
from normweave.textiles import Textile, make_textures
from normweave.types import Sample, Tile


def row(label: str, score: float, *, error: str | None = None, category: str = "a", routed: str | None = None) -> dict:
    return {
        "category": category,
        "routed_category": routed,
        "label": label,
        "pred_score": None if error else score,
        "threshold": 0.5,
        "verdict": None if error else ("anomalous" if score > 0.5 else "normal"),
        "error": error,
    }


@pytest.fixture
def tables() -> tuple[dict, list[dict], list[Stratum]]:
    rng = np.random.default_rng(0)
    cells, rows = [], []
    for category, subclass, seen in (("a", "x", True), ("a", "y", False), ("b", "x", True)):
        for defect in (None, None, None, "hole", "stain"):
            cells.append(Stratum(category, subclass, seen, defect))
            rows.append(row("anomalous" if defect else "normal", float(rng.random()), category=category, routed="a"))
    cells.append(Stratum("b", "x", True, None))
    rows.append(row("normal", 0.0, error="truncated", category="b"))
    pixels, decoded = {}, {}
    for cell in dict.fromkeys(cells):
        accumulated = pixels.setdefault(cell, PixelMetrics())
        mask = np.zeros((8, 8), dtype=bool)
        mask[2:4, 2:4] = cell.defect is not None
        accumulated.update(rng.random((8, 8)).astype(np.float32) + mask, mask)
        distance = rng.random((4, 4)).astype(np.float32)
        share = mask.reshape(4, 2, 4, 2).mean(axis=(1, 3), dtype=np.float32)
        decoded.setdefault(cell, OverGeneralisation()).update(distance, share if cell.defect else None)
    return make_tables(cells, rows, pixels, decoded, {"a", "b"}), rows, cells


def test_every_image_counts_once(tables):
    metrics, rows, _ = tables
    for split in ("by_category", "by_subclass"):
        assert sum(part["n_normal"] for part in metrics[split].values()) == metrics["pooled"]["n_normal"] == 9
        assert sum(part["n_anomalous"] for part in metrics[split].values()) == metrics["pooled"]["n_anomalous"] == 6
    assert metrics["seen"]["n_normal"] + metrics["unseen"]["n_normal"] == 9
    assert metrics["pooled"]["n_refused"] == 1
    assert set(metrics["by_subclass"]) == {"a/x", "a/y", "b/x"}
    assert len(rows) == 16


def test_an_image_level_head_has_no_pixel_metrics(tmp_path: Path):
    """Its map has one cell. Upsampled, it has the score everywhere, and could be mistaken for an anomaly map."""
    data = tmp_path / "cloth"
    textile = Textile("plain", "ecru", "diffuse")
    make_textures(data, size=(64, 64), train_images=40, test_images=4, defect_images=3, seen=[textile], unseen=[])
    config = settings.override(Config(), ["prepare.height=64", "prepare.width=64", "data.calibration=split"])
    detector = Detector.fit(data, config=config, model="mean-shift")
    outcome = detector.score(next(data.rglob("*.png")))
    assert np.ptp(outcome.anomaly_map) <= 1e-6
    assert outcome.anomaly_map.max() == pytest.approx(outcome.pred_score, rel=1e-5)
    metrics, _ = measure(detector, [one for one in read(data, DataConfig()) if one.split == "test"])
    for table in (metrics["pooled"], *metrics["by_defect"].values()):
        for name in ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro"):
            assert table[name] is None
            assert table["reasons"][name] == "the model scores whole images and has no map"
        assert 0 <= table["image_auroc"] <= 1
    assert metrics["mean"]["pixel_auroc"] is None


def test_numbers_are_those_of_their_images(tables):
    metrics, rows, cells = tables
    chosen = [
        (row["label"] == "anomalous", row["pred_score"])
        for row, cell in zip(rows, cells, strict=True)
        if cell.category == "a"
    ]
    labels, scores = zip(*chosen, strict=True)
    assert metrics["by_category"]["a"]["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    alarms = sum(score > 0.5 for label, score in chosen if not label)
    assert metrics["by_category"]["a"]["false_alarm_rate"] == alarms / 6


def test_a_defect_is_compared_with_all_normals(tables):
    metrics, _, _ = tables
    assert metrics["by_defect"]["hole"]["n_normal"] == 9
    assert metrics["by_defect"]["hole"]["n_anomalous"] == 3


def test_means_are_over_categories(tables):
    metrics, _, _ = tables
    for name in ("image_auroc", "pixel_auroc", "false_alarm_rate"):
        values = [part[name] for part in metrics["by_category"].values()]
        assert metrics["mean"][name] == pytest.approx(np.mean(values))


def test_undefined_metrics_have_a_reason():
    cells = [Stratum("a", None, True, None)]
    metrics = make_tables(cells, [row("normal", 0.1)], {}, {}, {"a"})
    assert metrics["pooled"]["image_auroc"] is None
    assert "image_auroc" in metrics["pooled"]["reasons"]
    assert metrics["mean"]["image_auroc"] is None
    assert metrics["mean"]["reasons"]["image_auroc"]
    assert metrics["pooled"]["over_generalisation"] is None
    assert metrics["mean"]["over_generalisation"] is None


def test_over_generalisation_stands_in_every_table(tables):
    metrics, _, _ = tables
    parts = [part["over_generalisation"] for part in metrics["by_category"].values()]
    assert len(parts) == 2
    for name, value in metrics["mean"]["over_generalisation"].items():
        assert value == pytest.approx(np.mean([part[name] for part in parts]))
    # Of "a" two subclasses, of "b" one: an equal number of cells each.
    pooled = metrics["pooled"]["over_generalisation"]["d_normal"]
    assert pooled == pytest.approx((2 * parts[0]["d_normal"] + parts[1]["d_normal"]) / 3)
    assert metrics["by_defect"]["hole"]["over_generalisation"]["d_normal"] == pooled
    json.dumps(metrics, allow_nan=False)


def test_means_leave_out_categories_without_a_number(tables):
    metrics, rows, cells = tables
    several = make_tables(cells, rows, {}, {Stratum("a", "x", True, None): OverGeneralisation()}, set())
    assert several["mean"]["over_generalisation"] is None
    flat, bad = OverGeneralisation(), OverGeneralisation()
    flat.update(np.zeros((2, 2), np.float32), None)
    bad.update(np.ones((2, 2), np.float32), np.ones((2, 2), np.float32))
    usual = OverGeneralisation()
    usual.update(np.full((2, 2), 0.5, np.float32), None)
    decoded = {
        Stratum("a", "x", True, None): flat,
        Stratum("a", "x", True, "hole"): bad,
        Stratum("b", "x", True, None): usual,
        Stratum("b", "x", True, "hole"): bad,
    }
    metrics = make_tables(cells, rows, {}, decoded, set())
    assert metrics["by_category"]["a"]["over_generalisation"]["ratio"] is None
    assert metrics["mean"]["over_generalisation"] == {
        "d_normal": 0.25,
        "d_abnormal": 1,
        "ratio": 2,
        "cell_auroc": 1,
    }


def test_the_right_category_is_counted(tables):
    metrics, rows, cells = tables  # everything was taken for "a"
    assert [metrics["by_category"][name]["category_accuracy"] for name in "ab"] == [1, 0]
    assert metrics["pooled"]["category_accuracy"] == 10 / 15
    assert metrics["mean"]["category_accuracy"] == 0.5
    foreign = make_tables(cells, rows, {}, {}, {"a", "c"})  # "b" is not known: there is no right answer
    assert foreign["pooled"]["category_accuracy"] == 1
    assert foreign["by_category"]["b"]["category_accuracy"] is None
    assert foreign["by_category"]["b"]["reasons"]["category_accuracy"] == "no test image of a known category"
    for known in (set(), {"a"}):
        metrics = make_tables(cells, rows, {}, {}, known)
        assert metrics["pooled"]["category_accuracy"] is None
        assert "does not distinguish categories" in metrics["pooled"]["reasons"]["category_accuracy"]


def test_a_tile_is_covered_by_its_own_part_of_the_mask():
    mask = np.zeros((8, 20), dtype=bool)
    mask[2:4, 12:14] = True
    left, right = Tile(0, 0, 8, 12), Tile(0, 8, 8, 12)
    assert not tile_coverage(mask, left, (4, 6)).any()
    expected = np.zeros((4, 6))
    expected[1, 2] = 1  # rows 2..3 and, 8 to the left, columns 4..5
    np.testing.assert_array_equal(tile_coverage(mask, right, (4, 6)), expected)


# ── of a detector that decodes, on two categories ────────────────────────────────────────────────────────────────────

SMALL = (
    "data.calibration=split",
    "prepare.height=64",
    "prepare.width=64",
    "prepare.tile_beyond=1.5",
    "features.weights=random",
    "features.strides=[8]",
    "outcome.false_alarm_rate=0.2",
    "outcome.unknown_rate=0.2",
)
DECODER = ("head.training.epochs=1", "head.prompts.text=off", "head.synthetic.variants=0", "head.width=16")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[Sample]:
    """Two subclasses of cloth as two categories; one defective image is twice as wide, so that it has two tiles."""
    folder = tmp_path_factory.mktemp("two") / "data"
    made = make_textures(
        folder,
        size=(64, 64),
        train_images=12,
        test_images=4,
        defect_images=4,
        seen=[Textile("plain", "ecru", "diffuse"), Textile("twill", "indigo", "raking")],
        unseen=[],
    )
    samples = [
        replace(sample, category=sample.subclass.split("-")[0], subclass=None) for sample in read(made, DataConfig())
    ]
    place = next(k for k, sample in enumerate(samples) if sample.label == "anomalous")
    damaged = samples[place]
    pixels, mask = np.asarray(Image.open(damaged.image_path)), np.asarray(Image.open(damaged.mask_path))
    wide, marked = folder / "wide.png", folder / "wide-mask.png"
    Image.fromarray(np.concatenate([pixels[:, ::-1], pixels], axis=1)).save(wide)
    Image.fromarray(np.concatenate([np.zeros_like(mask), mask], axis=1)).save(marked)
    samples[place] = replace(damaged, image_path=wide, mask_path=marked)
    return samples


@pytest.fixture(scope="module")
def decoder(data, tmp_path_factory) -> Detector:
    config = replace(Config(), head=settings.model_config("cnc"), seed=1)
    return Detector.fit(data, config=settings.override(config, [*SMALL, *DECODER]), use_cache=False)


def to_test(samples: list[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.split == "test"]


def test_cells_of_every_tile_are_those_of_the_detector(decoder, data):
    """Every cell of every tile by hand: a cell is abnormal when 30 % of the pixels under it are."""
    cells: dict = {"plain": ([], []), "twill": ([], [])}
    tiles = []
    for sample, _, cut, reconstruction in decoder.stream_samples(to_test(data)):
        height, width = np.asarray(Image.open(sample.image_path)).shape[:2]
        tiles.append(len(cut))
        mask = np.zeros((height, width), bool)
        if sample.label == "anomalous":
            mask = read_mask(sample.mask_path, height=height, width=width)
        for tile, grid in zip(cut, reconstruction, strict=True):
            for i, j in np.ndindex(grid.shape):
                top, left = tile.top + i * tile.height / 8, tile.left + j * tile.width / 8
                fine = np.arange(0.005, 1, 0.01)
                under = mask[
                    np.ix_((top + fine * tile.height / 8).astype(int), (left + fine * tile.width / 8).astype(int))
                ].mean()
                if sample.label == "normal":
                    cells[sample.category][0].append(grid[i, j])
                elif under >= 0.3:
                    cells[sample.category][1].append(grid[i, j])
    assert sorted(set(tiles)) == [1, 2]
    metrics, _ = measure(decoder, to_test(data))
    for category, (normal, abnormal) in cells.items():
        found = metrics["by_category"][category]["over_generalisation"]
        assert found["d_normal"] == pytest.approx(np.mean(normal), rel=1e-5)
        assert found["d_abnormal"] == pytest.approx(np.mean(abnormal), rel=1e-5)
        assert found["ratio"] == pytest.approx(np.mean(abnormal) / np.mean(normal), rel=1e-5)
    means = [part["over_generalisation"]["ratio"] for part in metrics["by_category"].values()]
    assert metrics["mean"]["over_generalisation"]["ratio"] == pytest.approx(np.mean(means))


def test_a_detector_that_does_not_decode_has_no_over_generalisation(data):
    config = replace(Config(), head=settings.model_config("dfm"), seed=1)
    plain = Detector.fit(data, config=settings.override(config, SMALL), use_cache=False)
    metrics, _ = measure(plain, to_test(data))
    assert metrics["pooled"]["over_generalisation"] is None
    assert metrics["pooled"]["category_accuracy"] is None  # nor does it route


def test_what_changed_is_written_and_shown(decoder, data, tmp_path):
    first = evaluate(decoder, data, output=tmp_path / "first")
    assert first["pooled"]["category_accuracy"] == 1  # ecru and indigo
    assert json.loads((tmp_path / "first" / "metrics.json").read_text()) == first
    base = json.loads((tmp_path / "first" / "metrics.json").read_text())
    for table in (base["pooled"], base["mean"], *base["by_category"].values()):
        table["over_generalisation"]["ratio"] -= 0.25
        table["over_generalisation"]["cell_auroc"] += 0.5
    base["by_category"]["twill"]["over_generalisation"]["ratio"] = None
    (tmp_path / "base.json").write_text(json.dumps(base))

    second = evaluate(decoder, data, output=tmp_path / "second", against=tmp_path / "base.json")
    assert json.loads((tmp_path / "second" / "metrics.json").read_text()) == second
    for table in (second["pooled"], second["mean"], second["by_category"]["plain"]):
        change = table["over_generalisation"].pop("change")
        assert change == pytest.approx({"ratio": 0.25, "cell_auroc": -0.5})
    change = second["by_category"]["twill"]["over_generalisation"].pop("change")
    assert change == {"ratio": None, "cell_auroc": pytest.approx(-0.5)}
    assert second["provenance"].pop("against") == {"model": "cnc", "bundle_hash": None}
    assert second == first
    page = (tmp_path / "second" / "report.html").read_text()
    assert "+0.25" in page
    assert "-50.0" in page
    assert "change of ratio" not in (tmp_path / "first" / "report.html").read_text()


def test_nothing_changes_where_one_side_has_no_number():
    nothing = {"over_generalisation": None}
    known = {"over_generalisation": {"ratio": 2.0, "cell_auroc": 0.75}}

    def metrics(mean, category):
        tables = {"pooled": dict(known), "mean": mean, "by_category": {"a": category}, "provenance": {}}
        return json.loads(json.dumps(tables))

    own = metrics(nothing, known)
    compare(own, metrics(known, nothing))
    assert own["pooled"]["over_generalisation"]["change"] == {"ratio": 0, "cell_auroc": 0}
    assert own["mean"]["over_generalisation"] is None
    assert own["by_category"]["a"]["over_generalisation"]["change"] == {"ratio": None, "cell_auroc": None}


FOUND = {
    "pooled": {"over_generalisation": {"ratio": 2.0}},
    "mean": {},
    "by_category": {"a": {"n_normal": 1, "n_anomalous": 1, "n_refused": 1}},
    "provenance": {"model": "cnc", "bundle_hash": "ab"},
}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "is not a metrics.json of normweave: FileNotFoundError"),
        ("image_path,category", "is not a metrics.json of normweave: JSONDecodeError"),
        ("[]", "is not a metrics.json of normweave: TypeError"),
        (
            "{}",
            "is not a metrics.json of normweave: KeyError: 'pooled'. Give the file that 'normweave evaluate",
        ),
        (json.dumps(FOUND | {"provenance": {}}), "KeyError: 'model'"),
        (json.dumps(FOUND | {"pooled": {"over_generalisation": None}}), "holds no over-generalisation"),
        (
            json.dumps(FOUND | {"pooled": {}}),
            "or it is of an older version. Evaluate a bundle of --model cnc",
        ),
        (
            json.dumps(FOUND),
            "on other test images: 3 of a instead of 2 of a, 1 of b. Evaluate both bundles on the",
        ),
    ],
)
def test_metrics_that_cannot_be_compared_raise_with_a_reason(text, complaint, tmp_path):
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    samples = [Sample(image_path=Path(f"{k}.png"), category=category) for k, category in enumerate("aab")]
    with pytest.raises(DataError) as caught:
        read_metrics(path, samples)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_cannot_be_compared_is_refused_before_the_first_image(decoder, data, tmp_path):
    with pytest.raises(DataError, match="is not a metrics"):
        evaluate(decoder, data, output=tmp_path / "results", against=tmp_path / "gone.json")
    assert not (tmp_path / "results").exists()


def test_thresholds_know_the_categories_of_their_subclasses(data, decoder):
    """Halves of each cloth as subclasses: without its own half, an image is nearest to the other one."""
    assert decoder.calibration.subclass_categories == ("plain", "twill")
    halves = [replace(sample, subclass="ab"[k % 2]) for k, sample in enumerate(data) if sample.split == "train"]
    alone = [replace(sample, subclass=None) for sample in halves]
    closed = ("head.expert.kind=gaussian", "head.adaption.method=off", "data.subclass_from=column")
    config = settings.override(replace(Config(), seed=1), [*SMALL, *closed])
    halves_calibration, whole_calibration = (
        Detector.fit(chosen, config=config, use_cache=False).calibration for chosen in (halves, alone)
    )
    assert halves_calibration.subclass_categories == ("plain", "plain", "twill", "twill")
    assert halves_calibration.unseen.subclass_categories == halves_calibration.subclass_categories
    assert len(halves_calibration.unseen) == len(halves_calibration)
    # Without its only subclass, an image of one cloth is routed to the other category: its variations take that place.
    varied = whole_calibration.unseen
    assert varied.subclass_categories == ("plain", "twill")
    assert len(varied) > len(whole_calibration)
    assert set(varied.groups) <= set(whole_calibration.groups)


def test_an_output_that_cannot_be_written_is_refused_before_the_first_image(tmp_path, monkeypatch):
    monkeypatch.setattr("normweave.benchmark.evaluate.test_samples", lambda *_: [])
    monkeypatch.setattr("normweave.benchmark.evaluate.measure", lambda *_, **__: pytest.fail("an image was scored"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        evaluate(SimpleNamespace(config=None), "data", output=tmp_path / "file")


def test_an_evaluation_that_is_refused_leaves_no_folder(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise DataError("a test image was used in training")

    monkeypatch.setattr("normweave.benchmark.evaluate.test_samples", lambda *_: [])
    monkeypatch.setattr("normweave.benchmark.evaluate.measure", refuse)
    with pytest.raises(DataError):
        evaluate(SimpleNamespace(config=None), "data", output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_name_that_is_not_utf_8_is_written_with_escapes(tmp_path, monkeypatch):
    """The table remains UTF-8, whatever the encoding of the system."""
    written = {"image_path": b"K\xc3\xb6per \xff.png".decode(errors="surrogateescape")}
    for name, result in (
        ("test_samples", []),
        ("measure", ({}, [written])),
        ("provenance", {}),
        ("write_page", None),
    ):
        monkeypatch.setattr(f"normweave.benchmark.evaluate.{name}", lambda *_, result=result, **__: result)
    monkeypatch.setattr("normweave.benchmark.evaluate.write_atomically", lambda path, write: write(path))
    evaluate(SimpleNamespace(config=None, record={}), "data", output=tmp_path)
    assert r"Köper \udcff.png" in (tmp_path / "predictions.csv").read_text("utf-8")
