"""The table, the files and the exit code of an evaluation."""

import json

import pytest

from normweave.cli.evaluate import report
from normweave.cli.terminal import Terminal

from .conftest import run


def values(**given):
    measured = dict.fromkeys(
        ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro"), 0.875
    )
    counts = {"n_normal": 10, "n_anomalous": 5, "n_refused": 0}
    alarms = {"false_alarm_rate": 0.1, "false_alarm_interval": [0.0025, 0.445]}
    absent = {"category_accuracy": None, "over_generalisation": None}
    return measured | counts | alarms | absent | given


@pytest.fixture
def metrics():
    nothing = values(n_normal=0, n_anomalous=0)
    return {
        "pooled": values(),
        "mean": values(false_alarm_interval=None),
        "seen": values(),
        "unseen": nothing,
        "by_category": {"cloth": values()},
        "by_subclass": {"cloth/[twill]": values(aupro=None, image_auroc=1.0)},
        "mask_faults": [],
        "provenance": {"promise": "At most 5 % false alarms."},
    }


@pytest.fixture
def several(metrics):
    """Two subclasses of cloth, and a board."""
    one, two, both = ({"d_normal": 0.1, "d_abnormal": a, "ratio": 10 * a, "cell_auroc": a} for a in (0.2, 0.4, 0.3))
    return metrics | {
        "pooled": values(category_accuracy=0.75, over_generalisation=both),
        "mean": values(category_accuracy=0.5, over_generalisation=both | {"ratio": 3.25}),
        "by_category": {
            "board": values(category_accuracy=0.0, over_generalisation=one),
            "cloth": values(category_accuracy=1.0, over_generalisation=two),
        },
        "by_subclass": {
            name: values(category_accuracy=0.25, over_generalisation=both)
            for name in ("board", "cloth/red", "cloth/blue")
        },
    }


def printed(metrics, folder, capsys):
    assert report(Terminal(), metrics, folder) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_the_table_is_in_percent_with_dashes_for_undefined_values(metrics, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # however narrow the terminal, no number is cut off
    assert report(Terminal(), metrics, tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Report: {tmp_path / 'report.html'}"
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["cloth/[twill]"] == [
        "10",
        "5",
        "100.0",
        "87.5",
        "87.5",
        "87.5",
        "87.5",
        "–",
        "10.0",
        "(0.2–44.5)",
    ]
    assert rows["mean"][-1] == "10.0"
    assert "unseen" not in rows  # there were none


def test_several_categories_have_a_row_each(several, tmp_path, capsys):
    rows = printed(several, tmp_path, capsys)
    assert rows[0][-2:] == ["category", "named"]
    first = [(row[0], row[-1]) for row in rows[1:9]]
    assert first == [  # a category without subclasses is among them
        *(
            ("board", "25.0"),
            ("cloth/red", "25.0"),
            ("cloth/blue", "25.0"),
            ("cloth", "100.0"),
            ("seen", "–"),
        ),
        *(("pooled", "75.0"), ("mean", "50.0"), ("decoder", "AUROC")),
    ]
    assert rows[9:13] == [
        ["board", "0.100", "0.200", "2.00", "20.0"],
        ["cloth", "0.100", "0.400", "4.00", "40.0"],
        ["pooled", "0.100", "0.300", "3.00", "30.0"],
        ["mean", "0.100", "0.300", "3.25", "30.0"],
    ]


def test_one_category_has_no_row_of_its_own(metrics, tmp_path, capsys):
    rows = printed(metrics, tmp_path, capsys)
    assert [row[0] for row in rows] == ["subclass", "cloth/[twill]", "seen", "pooled", "mean", "At", "Report:"]
    assert "named" not in rows[0]


def test_changes_are_shown_beside_the_numbers(several, tmp_path, capsys):
    several["provenance"] |= {"against": {"model": "cnc", "bundle_hash": "ab"}}
    cloth = several["by_category"]["cloth"]["over_generalisation"]
    cloth["change"] = {"ratio": -0.125, "cell_auroc": 0.0625}
    several["by_category"]["board"]["over_generalisation"] = None
    rows = {row[0]: row[1:] for row in printed(several, tmp_path, capsys)[8:]}
    assert rows["decoder"][-6:] == ["change", "of", "ratio", "of", "cell", "AUROC"]
    assert rows["cloth"] == ["0.100", "0.400", "4.00", "40.0", "-0.12", "+6.2"]
    assert rows["board"] == ["–"] * 6
    assert rows["mean"][-2:] == ["–", "–"]


def test_a_bundle_without_a_decoder_has_nothing_to_compare(metrics, tmp_path, capsys):
    metrics["provenance"] |= {"against": {"model": "cnc", "bundle_hash": "ab"}}
    assert report(Terminal(), metrics, tmp_path) == 0
    assert "Nothing to compare: this model has no decoder" in capsys.readouterr().out


def test_another_file_than_metrics_json_is_refused_with_exit_code_2(trained, textiles, tmp_path):
    other = tmp_path / "predictions.csv"
    other.write_text("image_path")
    result = run("evaluate", trained.bundle, textiles, "-o", tmp_path / "results", "--against", other)
    assert result.exit_code == 2, result.output
    assert "is not a metrics.json of normweave" in result.stderr
    assert not (tmp_path / "results").exists()


def test_masks_that_cannot_be_used_are_counted(metrics, tmp_path, capsys):
    metrics["mask_faults"] = [{"image_path": "a.png", "reason": "gone"}]
    assert report(Terminal(), metrics, tmp_path) == 0
    assert "1 masks could not be used" in capsys.readouterr().out


def test_unreadable_images_give_exit_code_4(metrics, tmp_path, capsys):
    assert report(Terminal(), metrics, tmp_path) == 0
    metrics["pooled"]["n_refused"] = 2
    assert report(Terminal(), metrics, tmp_path) == 4
    assert "2 images could not be read" in capsys.readouterr().out
    assert report(Terminal(json=True), metrics, tmp_path) == 4
    assert json.loads(capsys.readouterr().out)["pooled"]["n_refused"] == 2


def test_writes_its_files_with_seen_and_unseen_subclasses(trained, textiles, tmp_path):
    result = run("evaluate", trained.bundle, textiles, "-o", tmp_path / "results", "--json")
    assert result.exit_code == 0, result.output
    output = json.loads(result.stdout)
    assert json.loads((tmp_path / "results" / "metrics.json").read_text()) == {
        key: value for key, value in output.items() if key != "output"
    }
    assert (output["seen"]["n_normal"], output["seen"]["n_anomalous"]) == (6, 6)
    assert (output["unseen"]["n_normal"], output["unseen"]["n_anomalous"]) == (3, 3)
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "metrics.json",
        "predictions.csv",
        "report.html",
    }


def test_chosen_subclasses(trained, textiles, tmp_path):
    result = run("evaluate", trained.bundle, textiles, "-o", tmp_path, "--subclass", "satin-navy-diffuse", "--json")
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)["by_subclass"]) == ["cloth/satin-navy-diffuse"]
