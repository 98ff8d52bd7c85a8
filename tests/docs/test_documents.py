"""The documents are correct: code runs, commands and settings are accepted, named files and versions exist."""

import ast
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.main import get_command

from normweave import __version__, settings
from normweave.cli import app, train
from normweave.config import Config, models
from normweave.errors import ConfigError
from normweave.textiles import Textile, make_textures, render
from normweave.validation import fields_of, variants

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
REFERENCE = ROOT / "docs" / "reference" / "commands.md"
WRITTEN = [path for path in DOCUMENTS if path != REFERENCE]  # by hand
ADDS_A_PART = ("add-a-head.md", "add-an-expert.md")
"""Documents whose code and settings are those of a new part; test_add_a_part.py runs them."""
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def relative(path):
    return str(path.relative_to(ROOT))


def tracked():
    """Return every text file of the repository; without git, every file of the source folders."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout
    names = [name for name in listed.decode().split("\0") if name]
    paths = [ROOT / name for name in names] or [p for f in ("src", "tests", "docs") for p in (ROOT / f).rglob("*")]
    return [path for path in paths if path.is_file()]


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def commands_in(text):
    """Return every `normweave …` of a document, from code blocks and inline code."""
    blocks = re.findall(r"```(?:sh|bash|console)?\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`(normweave [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line.lstrip("$ ") for line in [*lines, *inline] if line.lstrip("$ ").startswith("normweave ")]


COMMANDS = [
    pytest.param(line, path.name not in ADDS_A_PART, id=f"{relative(path)}: {line}")
    for path in [*WRITTEN, *CONFIGS]
    for line in dict.fromkeys(commands_in(path.read_text("utf-8")) + re.findall(r"# Command: (.*)", path.read_text()))
    if "…" not in line
]


def parse(words):
    """Parse a command line without running the command, and return its parameters."""
    command, name = get_command(app), "normweave"
    while True:
        with command.make_context(name, list(words), resilient_parsing=False) as context:
            if not hasattr(command, "resolve_command"):
                return context.params
            name, command, words = command.resolve_command(context, list(context._protected_args + context.args))


@pytest.mark.parametrize(("line", "with_settings"), COMMANDS)
def test_commands_parse(line, with_settings):
    words = shlex.split(line, comments=True)[1:]
    if words in (["--help"], ["--version"]):
        return
    if len(words) == 1 and "-" not in words[0]:  # a command without its arguments, in a sentence
        assert words[0] in get_command(app).commands
        return
    if words[:1] == ["data"] and len(words) == 2:
        assert words[1] in get_command(app).commands["data"].commands
        return
    parameters = parse(words)
    assert parameters
    if words[0] == "train" and with_settings:
        compose_settings(parameters)


def compose_settings(parameters):
    """Read the settings of a `normweave train` command, as the command does."""
    names = inspect.signature(train.compose_settings).parameters
    given = {"assignments": parameters["set_"] or []} | {name: parameters[name] for name in names if name in parameters}
    if given["config"] is not None:
        given["config"] = ROOT / given["config"]
    return train.compose_settings(**given)


def test_a_wrong_command_is_detected():
    for line in ("predict --no-such-option x y", "trian data -o b", "train data"):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse(line.split())


def test_a_wrong_setting_is_detected():
    with pytest.raises(ConfigError, match="no_such"):
        compose_settings(parse(["train", "data", "-o", "bundle", "--set", "head.no_such=1"]))


def setting_keys(settings=Config, prefix=""):
    """Return the dotted keys of all settings, of every variant."""
    keys = set()
    for name, field in fields_of(settings).items():
        keys.add(f"{prefix}{name}")
        for part in variants(field).values() or [field.annotation]:
            keys |= setting_keys(part, f"{prefix}{name}.")
    return keys


@pytest.mark.parametrize("path", WRITTEN, ids=relative)
def test_named_settings_exist(path):
    """Settings in inline code, as `head.top_k` or `--set head.top_k=2`. docs/log.md is a record of the past."""
    if path.name == "log.md":
        return
    for code in re.findall(r"`([^`\n]+)`", path.read_text("utf-8")):
        named = re.findall(r"(?:^|--set )((?:prepare|features|head|maps)\.[a-z_.]+)(?:=|$)", code)
        assert set(named) <= setting_keys(), code


def test_commands_are_found():
    assert len(COMMANDS) > 20


def test_the_command_reference_is_up_to_date(tmp_path, monkeypatch):
    """Run the command of `make commands`, in a terminal of another width."""
    recipe = re.search(r"^commands:.*\n\t\$\(BIN\)/python (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[
        1
    ]
    words = shlex.split(recipe)
    assert ROOT / words[-1] == REFERENCE
    words[-1] = str(tmp_path / "commands.md")
    monkeypatch.setenv("COLUMNS", "47")
    subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, check=True)
    assert Path(words[-1]).read_text("utf-8") == REFERENCE.read_text("utf-8"), "Run make commands."


# ── code ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), flags=re.DOTALL)


STATEMENTS = {
    path: [ast.dump(each) for each in ast.parse("\n".join(python_blocks(path))).body]
    for path in DOCUMENTS
    if path.name not in ADDS_A_PART and python_blocks(path)
}
"""The code of each document, without comments and layout."""
LONGEST = [
    path
    for path, own in STATEMENTS.items()
    if not any(len(other) > len(own) and other[: len(own)] == own for other in STATEMENTS.values())
]
"""Documents with code, but for those with which another document begins."""


def test_documents_with_code_are_found():
    assert {ROOT / "README.md", ROOT / "docs" / "how-to" / "first-detector.md"} <= STATEMENTS.keys()


@pytest.mark.parametrize("path", LONGEST, ids=relative)
def test_python_blocks_run(path, tmp_path, monkeypatch, request):
    """Run the blocks of each document in their order; `cloth` is a data set and `part.png` an image."""
    blocks = python_blocks(path)
    if "NORMWEAVE_URL" in blocks[0]:
        for name, value in request.getfixturevalue("served").items():
            monkeypatch.setenv(name, value)
    textile = Textile("plain", "ecru", "diffuse")
    make_textures(
        tmp_path / "cloth",
        size=(64, 64),
        train_images=24,
        test_images=0,
        defect_images=0,
        seen=[textile],
        unseen=[],
    )
    Image.fromarray(render(textile, seed=7, size=(64, 64)).image).save(tmp_path / "part.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exec(compile("\n".join(blocks), str(path), "exec"), {"__name__": "documents"})


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_examples_run(path, capsys):
    specification = importlib.util.spec_from_file_location("example", path)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    example.main()
    good, defective = capsys.readouterr().out.splitlines()
    assert good.startswith("good: normal")
    assert defective.startswith("knot: anomalous")


# ── files, names, versions ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_configs_load_and_name_their_source(path):
    settings.read(path)
    header = path.read_text("utf-8")
    for word in ("# Paper: ", f"-c configs/{path.name}", "# Expected numbers, date and machine: "):
        assert word in header


def test_every_model_has_a_config():
    assert {type(settings.read(path).head) for path in CONFIGS} == set(models().values())


def test_the_recommended_config_is_the_default():
    assert settings.read(ROOT / "configs" / "adapted-moe.yaml") == Config()


@pytest.mark.parametrize("path", [*WRITTEN, ROOT / "docs" / "tutorial" / "tutorial.ipynb"], ids=relative)
def test_link_targets_exist(path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("name", ["equations.md", "threat-model.md"])
def test_named_code_exists(name):
    """Every `path::name` exists; the method of a class is written Class.method."""
    text = (ROOT / "docs" / name).read_text("utf-8")
    references = re.findall(r"`([\w/]+\.py)::([\w.]+)`", text)
    assert references
    for file, name in references:
        path = next(p for p in (ROOT / file, ROOT / "src" / "normweave" / file) if p.is_file())
        scope = ast.parse(path.read_text("utf-8")).body
        for part in name.split("."):
            found = [node for node in scope if part in names_of(node)]
            assert found, f"{file}::{name}"
            scope = getattr(found[0], "body", [])


def names_of(node):
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return [getattr(node, "name", None)]


def test_the_newest_released_change_is_this_version():
    titles = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    assert next(title for title in titles if title != "Unreleased:") == __version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_every_dependency_has_a_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = (ROOT / "docs" / "decisions" / "0001-dependencies.md").read_text("utf-8").lower()
    for line in [*project["dependencies"], *chain(*project["optional-dependencies"].values())]:
        name = re.match(r"[A-Za-z0-9-]+", line)[0].lower()
        family = re.sub(r"lite\d", "lite0/1/2", name)
        assert name in reasons or family in reasons, name


def test_no_path_of_a_machine():
    """The pattern is built from parts, so that this file does not match it."""
    machine = re.compile("|".join(f"/{word}/" for word in ("wo" + "rk", "ro" + "ot", "ho" + "me", "tmp/pro" + "to")))
    found = [
        f"{relative(path)}: {match[0]}"
        for path in tracked()
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".cff", ".json", ".csv", ".html", ".ipynb", ""}
        for match in [machine.search(path.read_text("utf-8", errors="ignore"))]
        if match
    ]
    assert found == []


def test_ci_runs_the_documented_targets():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make check test" in script.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"make ([a-z]+)", "".join(re.findall(r"`+[^`]*`+", (ROOT / document).read_text()))):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


# ── language ─────────────────────────────────────────────────────────────────────────────────────────────────────────

OUTDATED = re.compile(r"\b(kinds?|strangers?|kin|lessons?|likeness|says|said|made-up)\b", flags=re.IGNORECASE)
"""Terms that docs/conventions.md replaces."""


@pytest.mark.parametrize("path", WRITTEN, ids=relative)
def test_documents_use_the_terms_of_the_conventions(path):
    """Code is excluded: `kind` selects a class in settings. docs/log.md is a record of the past."""
    if path.name == "log.md":
        return
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text("utf-8"), flags=re.DOTALL)
    assert OUTDATED.findall(prose) == []
