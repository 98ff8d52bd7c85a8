"""The base install is enough for predict, calibrate and doctor: whatever `[train]` brings is not there."""

import json
import os
import shutil
import subprocess
import sys

import pytest

# Runs `normweave ...` where nothing of [train] can be imported, and prints which imports were tried.
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({absent}))  # None: not to be had
from normweave.cli import main
sys.argv = ["normweave", *sys.argv[1:]]
try:
    main()
finally:
    assert not [name for name in {absent} if sys.modules[name] is not None]
"""
ABSENT = {
    "lightning",
    "matplotlib",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "pandas",
    "pyarrow",
    "safetensors",
    "scipy",
    "sklearn",
    "timm",
    "torch",
    "torchvision",
}


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.replace("{absent}", repr(ABSENT)), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_predict_gives_the_scores_of_training(detector, bundle, photos):
    result = run("predict", bundle, *photos, "--json", "--threads", "1")
    assert result.returncode in (0, 1), result.stderr
    rows = [json.loads(text) for text in result.stdout.splitlines()]
    expected = detector.score(photos)
    assert [row["verdict"] for row in rows] == [outcome.verdict for outcome in expected]
    assert [row["pred_score"] for row in rows] == pytest.approx([outcome.pred_score for outcome in expected], rel=1e-3)


def test_calibrate(bundle, photos, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    folder = tmp_path / "good"
    folder.mkdir()
    good = [path for path in photos if "/good/" in path]
    for number, path in enumerate(good):
        shutil.copy(path, folder / f"{number}.png")
    result = run("calibrate", copy, folder, "--false-alarm-rate", "0.25", "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["false_alarm_rate"] == 0.25
    assert said["calibration_images"] == len(good)


def test_doctor_lists_what_is_missing():
    result = run("doctor", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["devices"] == ["cpu"]


def test_training_without_torch_states_what_to_install(photos, tmp_path):
    result = run("train", tmp_path, "-o", tmp_path / "b", "--json")
    assert result.returncode == 2
    assert 'pip install "normweave[train]"' in json.loads(result.stdout)["error"]


def test_nothing_is_sent_home(bundle, photos, tmp_path):
    """Builds of ONNX Runtime with telemetry leave a device id and a queue of events in the user's cache."""
    code = (
        "import os, sys\n"
        "from normweave.cli import main\n"
        f"sys.argv = ['normweave', 'predict', {str(bundle)!r}, {photos[0]!r}]\n"
        "try:\n    main()\nfinally:\n    print(os.environ['ORT_DISABLE_TELEMETRY'])\n"
    )
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=home, check=False)
    assert done.stdout.endswith("\n1\n"), done.stderr
    assert list(tmp_path.rglob("*icrosoft*")) == []
