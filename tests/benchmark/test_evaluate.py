"""Tables add up: every test image counts once in each, and means are means."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from normweave.benchmark.evaluate import _Cell, _tables
from normweave.report.metrics import PixelMetrics


def row(label: str, score: float, *, error: str | None = None) -> dict:
    return {
        "label": label,
        "pred_score": None if error else score,
        "threshold": 0.5,
        "verdict": None if error else ("anomalous" if score > 0.5 else "normal"),
        "error": error,
    }


@pytest.fixture
def tables() -> tuple[dict, list[dict], list[_Cell]]:
    rng = np.random.default_rng(0)
    cells, rows = [], []
    for category, subclass, seen in (("a", "x", True), ("a", "y", False), ("b", "x", True)):
        for defect in (None, None, None, "hole", "stain"):
            cells.append(_Cell(category, subclass, seen, defect))
            rows.append(row("anomalous" if defect else "normal", float(rng.random())))
    cells.append(_Cell("b", "x", True, None))
    rows.append(row("normal", 0.0, error="truncated"))
    pixels = {}
    for cell in dict.fromkeys(cells):
        accumulated = pixels.setdefault(cell, PixelMetrics())
        mask = np.zeros((8, 8), dtype=bool)
        mask[2:4, 2:4] = cell.defect is not None
        accumulated.update(rng.random((8, 8)).astype(np.float32) + mask, mask)
    return _tables(cells, rows, pixels), rows, cells


def test_every_image_counts_once(tables):
    metrics, rows, _ = tables
    for split in ("by_category", "by_subclass"):
        assert sum(part["n_normal"] for part in metrics[split].values()) == metrics["pooled"]["n_normal"] == 9
        assert (
            sum(part["n_anomalous"] for part in metrics[split].values())
            == metrics["pooled"]["n_anomalous"]
            == 6
        )
    assert metrics["seen"]["n_normal"] + metrics["unseen"]["n_normal"] == 9
    assert metrics["pooled"]["n_refused"] == 1
    assert set(metrics["by_subclass"]) == {"a/x", "a/y", "b/x"}
    assert len(rows) == 16


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


def test_what_is_undefined_says_why():
    cells = [_Cell("a", None, True, None)]
    metrics = _tables(cells, [row("normal", 0.1)], {})
    assert metrics["pooled"]["image_auroc"] is None
    assert "image_auroc" in metrics["pooled"]["reasons"]
    assert metrics["mean"]["image_auroc"] is None
    assert metrics["mean"]["reasons"]["image_auroc"]
