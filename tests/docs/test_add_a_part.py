"""The pages on heads, experts and backbones work as written: their blocks add a part that passes the contract tests."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def page(name):
    """Return the text of a how-to, and its blocks of Python."""
    text = (ROOT / "docs" / "how-to" / name).read_text("utf-8")
    return text, re.findall(r"```py(?:thon)?\n(.*?)```", text, flags=re.DOTALL)


class Copy:
    """A copy of the package and its contract tests, to which a part is added."""

    def __init__(self, folder):
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "src" / "normweave", folder / "src" / "normweave", ignore=ignored)
        shutil.copytree(ROOT / "tests" / "contracts", folder / "contracts")
        shutil.copy(ROOT / "tests" / "builders.py", folder)
        shutil.copy(ROOT / "pyproject.toml", folder)

    def replace(self, file, pattern, text):
        """Replace the only match of a pattern in a file."""
        after, number = re.subn(pattern, lambda _: text, file.read_text("utf-8"), flags=re.MULTILINE)
        assert number == 1, pattern
        file.write_text(after, "utf-8")

    def run(self, *arguments):
        """Run Python on the copy, and return what it prints."""
        paths = os.pathsep.join(map(str, (self.folder / "src", self.folder)))
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def check(self, *, file, tests, name, setting):
        """Run the contract tests of the part, select it by a setting, and check its types."""
        options = ("-q", "-k", name, "--rootdir", self.folder, "-p", "no:cacheprovider")
        printed = self.run("-m", "pytest", self.folder / "contracts" / tests, *options)
        assert int(re.search(r"(\d+) passed", printed)[1]) >= 5
        code = "import sys; from normweave import settings; from normweave.config import Config; "
        self.run("-c", code + "settings.override(Config(), sys.argv[1:])", setting)
        cache = self.folder / "mypy"
        with suppress(FileNotFoundError):  # what make check knows of the types of the libraries
            shutil.copytree(ROOT / ".mypy_cache", cache)
        self.run("-m", "mypy", "--strict", self.folder / file, "--no-error-summary", "--cache-dir", cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "union", "tests", "part", "setting"),
    [
        ("add-a-head.md", "HeadConfig", "test_every_head.py", "autoencoder", "head.kind=autoencoder"),
        ("add-an-expert.md", "SingleExpertConfig", "test_every_expert.py", "mean", "head.expert.kind=mean"),
    ],
)
def test_a_head_or_an_expert_is_added_as_the_page_shows(tmp_path, name, union, tests, part, setting):
    text, (module, settings, members) = page(name)
    file, config = re.findall(r"^## [12]\. .*`(src/normweave/\S+\.py)`$", text, flags=re.MULTILINE)
    copy = Copy(tmp_path)
    (tmp_path / file).write_text(module, "utf-8")
    copy.replace(tmp_path / config, rf"^{union} = \(\n    \w+\s", f"{settings}\n\n{members}")
    copy.check(file=file, tests=tests, name=part, setting=setting)


@pytest.mark.slow
def test_a_backbone_is_added_as_the_page_shows(tmp_path):
    text, (module, settings, contract) = page("add-a-backbone.md")
    file, config = re.findall(r"^\*\*[12]\. `(src/normweave/\S+\.py)`\*\*", text, flags=re.MULTILINE)
    copy = Copy(tmp_path)
    (tmp_path / file).write_text(module, "utf-8")
    copy.replace(tmp_path / config, "^FeaturesConfig = .*$", settings)
    tests = tmp_path / "contracts" / "test_every_extractor.py"
    copy.replace(tests, "import OpenClipConfig", "import SmallNetConfig, OpenClipConfig")
    copy.replace(tests, "^HEIGHT, WIDTH", f"{contract}\nHEIGHT, WIDTH")
    copy.check(file=file, tests=tests.name, name="small_net", setting="features.kind=small_net")
