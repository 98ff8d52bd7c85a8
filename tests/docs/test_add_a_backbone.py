"""The page on backbones works as written: its blocks make a new extractor that passes the contract tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "add-a-backbone.md").read_text("utf-8")


@pytest.mark.slow
def test_a_backbone_is_added_as_the_page_shows(tmp_path):
    module, config, contract = re.findall(r"```py(?:thon)?\n(.*?)```", PAGE, flags=re.DOTALL)
    package = tmp_path / "src" / "normweave"
    shutil.copytree(ROOT / "src" / "normweave", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "contracts", tmp_path / "contracts")

    (package / "features" / "small_net.py").write_text(module, "utf-8")
    settings = package / "config.py"
    union = re.compile(r"^FeaturesConfig = .*$", flags=re.MULTILINE)
    assert len(union.findall(settings.read_text("utf-8"))) == 1
    settings.write_text(union.sub(lambda _: config, settings.read_text("utf-8")), "utf-8")
    test = tmp_path / "contracts" / "test_every_extractor.py"
    text = test.read_text("utf-8").replace("import OpenClipConfig", "import SmallNetConfig, OpenClipConfig")
    test.write_text(text.replace("\nHEIGHT, WIDTH", f"\n{contract}\nHEIGHT, WIDTH"), "utf-8")

    call = [sys.executable, "-m", "pytest", str(test), "-q", "-k", "small_net", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        call,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)
