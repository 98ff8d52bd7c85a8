"""The pages on heads and experts work as written: their blocks add a part that passes the contract tests and mypy."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "union", "tests", "name", "setting"),
    [
        ("add-a-head.md", "HeadConfig", "test_every_head.py", "autoencoder", "head.kind=autoencoder"),
        ("add-an-expert.md", "ExpertConfig", "test_every_expert.py", "mean", "head.expert.kind=mean"),
    ],
)
def test_a_part_is_added_as_the_page_shows(tmp_path, page, union, tests, name, setting):
    text = (ROOT / "docs" / "how-to" / page).read_text("utf-8")
    module, settings, members = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (file,) = re.findall(r"^## 1\. .*`(src/normweave/\S+\.py)`$", text, flags=re.MULTILINE)
    package = tmp_path / "src" / "normweave"
    shutil.copytree(ROOT / "src" / "normweave", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "contracts", tmp_path / "contracts")
    shutil.copy(ROOT / "tests" / "builders.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    (tmp_path / file).write_text(module, "utf-8")
    config = package / "config.py"
    before = config.read_text("utf-8")
    start = re.search(rf"^{union} = \(\n    \w+\n", before, flags=re.MULTILINE)
    assert start is not None
    after = before[: start.start()] + f"{settings}\n\n{members}" + before[start.end() :]
    config.write_text(after, "utf-8")

    def run(*call):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "src", tmp_path)))}
        done = subprocess.run(
            [sys.executable, *call],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    path = str(tmp_path / "contracts" / tests)
    out = run("-m", "pytest", path, "-q", "-k", name, "--rootdir", str(tmp_path), "-p", "no:cacheprovider")
    assert int(re.search(r"(\d+) passed", out)[1]) >= 8
    code = "import sys; from normweave import settings; from normweave.config import Config; "
    run("-c", code + "settings.override(Config(), sys.argv[1:])", setting)
    run("-m", "mypy", "--strict", str(tmp_path / file), "--no-error-summary")
