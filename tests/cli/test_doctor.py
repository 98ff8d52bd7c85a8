"""Installed packages and devices are reported, and how to install what is missing."""

import json
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

from normweave.cli import doctor

from .conftest import run

WITHOUT = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "timm", "onnxruntime", "safetensors"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
from importlib import util
known = util.find_spec
util.find_spec = lambda name: None if name in {"torch", "onnxruntime"} else known(name)
from normweave.cli import main
"""


def test_finds_what_is_installed():
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["packages"][""]["numpy"] == version("numpy")
    assert found["packages"]["train"]["torch"] == version("torch")
    assert found["devices"][0] == "cpu"
    assert "CPU" in found["onnxruntime"]
    assert ("CPU" in found["openvino"]) == (find_spec("openvino") is not None)
    assert "tf_efficientnet_lite0" in found["backbones"]["in pip packages"]


def test_names_the_command_that_installs_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "required", lambda: {"": ["numpy"], "train": ["torch", "no-such-package"]})
    output = run("doctor").stdout
    assert 'missing: no-such-package. Install them with: pip install "normweave[train]"' in output
    assert f"base: numpy {version('numpy')}" in output


def test_finds_the_backbones_that_timm_downloaded(monkeypatch, tmp_path):
    for name, file in [
        ("timm--resnet18.a1_in1k", "model.safetensors"),
        ("timm--vit_large_patch14_clip_336.openai", "open_clip_model.safetensors"),  # not weights of timm's model
        ("timm--resnet34.a1_in1k", "config.json"),  # a download that was interrupted
        ("someone--else", "model.safetensors"),
    ]:
        snapshot = tmp_path / "hub" / f"models--{name}" / "snapshots" / "0"
        snapshot.mkdir(parents=True)
        (snapshot / file).touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert doctor.cached_weights() == ["resnet18.a1_in1k"]


def without_torch(*arguments):
    script = WITHOUT + f"sys.argv = ['normweave', *{list(arguments)!r}]\nmain()"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_works_without_torch():
    result = without_torch("doctor", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["devices"] == ["cpu"]


def test_commands_that_need_torch_name_the_command_that_installs_it(tmp_path):
    result = without_torch("train", str(tmp_path), "-o", str(tmp_path / "b"))
    assert result.returncode == 2
    assert 'which is not installed: pip install "normweave[train]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_the_line_is_tested(tmp_path, monkeypatch):
    monkeypatch.setenv("MES_SECRET", "whsec_c2VjcmV0IG9mIHRoZSBsaW5lIGFuZCB0aGUgbWVz")
    line = tmp_path / "line.yaml"
    line.write_text("outputs:\n- {type: webhook, name: mes, url: 'http://127.0.0.1:1/', secret_env: MES_SECRET}\n")
    result = run("doctor", "--line", line)
    assert result.exit_code == 3
    assert "mes (webhook): http://127.0.0.1:1/ does not answer: Connection refused." in result.stdout
    assert "Check url and secret" in result.stdout
    (found,) = json.loads(run("doctor", "--line", line, "--json").stdout)["outputs"]
    assert (found["name"], found["type"], "Check url" in found["error"]) == ("mes", "webhook", True)
    line.write_text("outputs:\n- {type: webhook}\n")
    assert run("doctor", "--line", line).exit_code == 2
    line.write_text("parts: {views: [front, back]}\nview_bundles: {back: back.bundle}\n")
    result = run("doctor", "--line", line)
    assert result.exit_code == 3
    assert "view_bundles.back (bundle): back.bundle does not exist" in result.stdout
    line.write_text("name: Press 5\n")
    result = run("doctor", "--line", line)
    assert (result.exit_code, "has no sources, no outputs" in result.stdout) == (0, True)
