"""Help is complete and quick to load."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from normweave import __version__
from normweave.cli import app
from normweave.config import Config, models

COMMANDS = [
    ["demo"],
    ["train"],
    ["evaluate"],
    ["predict"],
    ["calibrate"],
    ["drift"],
    ["doctor"],
    ["benchmark"],
    ["data", "check"],
    ["data", "manifest"],
    ["data", "make-textures"],
]
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "sklearn",
    "scipy",
    "pandas",
    "numpy",
    "PIL",
    "onnxruntime",
}


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help_and_the_common_options(command, flag):
    result = run(*command, flag)
    assert result.exit_code == 0, result.output
    for option in ("--json", "--quiet", "-q", "--verbose", "-v", "--seed", "--device", "--threads"):
        assert option in result.output


def test_the_list_of_commands_is_complete():
    output = run("--help").output
    for command in COMMANDS:
        assert command[0] in output
    assert "Exit codes" in output


def test_version():
    assert run("--version").output.strip() == f"normweave {__version__}"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["predict", "-h"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments):
    """So that help takes less than half a second."""
    script = (
        "import sys\n"
        "from normweave.cli import main\n"
        f"sys.argv = ['normweave', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        f"print(code, sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "0 []"


def test_python_m_normweave():
    result = subprocess.run(
        [sys.executable, "-m", "normweave", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == f"normweave {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["predict", "cloth.bundle"],
        ["train", "data", "-o", "b", "--seed", "-1"],
        ["doctor", "--threads", "0"],
        ["predikt"],
    ],
    ids=" ".join,
)
def test_a_wrong_call_has_exit_code_2(arguments):
    assert run(*arguments).exit_code == 2


def test_the_help_of_train_lists_every_model():
    output = " ".join(run("train", "--help").output.split())
    assert all(name in output for name in models())
    assert f"[default: ({Config().head.model})]" in output
