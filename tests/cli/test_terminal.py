"""Every exception of a command becomes a message and an exit code."""

import json
import os
import subprocess
import sys
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from normweave.cli import terminal as shared
from normweave.cli.terminal import Terminal, command, unreadable
from normweave.errors import CheckError, ConfigError, MissingError


def invoke(work, *arguments):
    """Run `work` as a command."""
    app = typer.Typer()

    def own(terminal: Terminal, number: Annotated[int, typer.Option(help="A number.")] = 3) -> int:
        """Do something."""
        return work(terminal)

    command(app, "own", own)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def failing(error):
    def work(terminal):
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (ConfigError("no [such] setting"), 2, "Error: no [such] setting\n"),
        (CheckError("a rate of 0.01 needs more"), 3, "Error: a rate of 0.01 needs more\n"),
        (MissingError("no cuda"), 2, "Error: no cuda\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch.nn"),
            2,
            'pip install "normweave[train]"',
        ),
        (PermissionError(13, "Permission denied", "out"), 2, "Permission denied: 'out'. Check the path"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (
            ZeroDivisionError("division"),
            70,
            "A bug in normweave: ZeroDivisionError: division. Please report it.",
        ),
        (
            ModuleNotFoundError("No module named 'normweave.x'", name="normweave.x"),
            70,
            "A bug in normweave: ModuleNotFoundError: No module named 'normweave.x'.",
        ),
    ],
)
def test_an_error_becomes_a_message_and_an_exit_code(error, exit_code, message):
    result = invoke(failing(error))
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert result.stdout == ""


def test_an_error_has_a_traceback_only_with_verbose():
    assert "Traceback" not in invoke(failing(ConfigError("x"))).stderr
    assert "Traceback" in invoke(failing(ConfigError("x")), "-v").stderr
    assert "Traceback" in invoke(failing(ZeroDivisionError())).stderr


def test_an_error_is_json_on_stdout_with_json():
    result = invoke(failing(CheckError("too few")), "--json")
    assert json.loads(result.stdout) == {"error": "too few", "exit_code": 3}
    assert result.stderr == ""
    assert result.exit_code == 3


def test_a_message_is_one_line_however_long():
    result = invoke(failing(ConfigError("word " * 100)))
    assert result.stderr.count("\n") == 1


def test_the_return_value_of_a_command_is_the_exit_code():
    assert invoke(lambda terminal: 4).exit_code == 4


def test_the_common_options_arrive():
    seen = []
    invoke(lambda terminal: seen.append(terminal) or 0, "--json", "-q", "-v", "--seed", "5", "--device", "cuda:1")
    assert seen == [Terminal(json=True, quiet=True, verbose=True, seed=5, device="cuda:1")]


def test_own_options_are_checked_by_their_type():
    assert invoke(lambda terminal: 0, "--number", "4").exit_code == 0
    assert invoke(lambda terminal: 0, "--number", "four").exit_code == 2


def test_remarks_go_to_stderr_and_quiet_stops_them():
    def work(terminal):
        terminal.remark("a remark [x]")
        terminal.show("a result [x]")
        return 0

    result = invoke(work)
    assert (result.stdout, result.stderr) == ("a result [x]\n", "a remark [x]\n")
    assert invoke(work, "-q").stderr == ""


def test_json_contains_no_nan():
    def work(terminal):
        terminal.record({"score": float("nan")})
        return 0

    assert invoke(work, "--json").exit_code == shared.BUG


def test_threads_are_limited_before_anything_is_loaded():
    script = (
        "import os, sys\n"
        "from normweave.cli import doctor, main\n"
        "doctor.devices = lambda: [os.environ['OMP_NUM_THREADS']] if 'torch' not in sys.modules else []\n"
        "sys.argv = ['normweave', 'doctor', '--json', '--threads', '1']\n"
        "main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(result.stdout)["devices"] == ["1"]


@pytest.mark.parametrize("part", ["'a line'", "Table('a table')"])
def test_a_closed_pipe_is_not_a_verdict(part):
    """The exit code of `normweave … | head -1` must not be 1, which means an anomalous image."""
    script = (
        "import typer\n"
        "from normweave.cli.terminal import command\n"
        "app = typer.Typer()\n"
        "from rich.table import Table\n"
        "def own(terminal) -> int:\n"
        "    for _ in range(10_000):\n"
        "        terminal.show(PART)\n"
        "    return 0\n"
        "command(app, 'own', own)\n"
        "app()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script.replace("PART", part)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == shared.PIPE_CLOSED
        assert process.stderr.read() == b""


SCRIPT = r"""
import typer
from normweave.cli.terminal import command, run
from normweave.errors import ConfigError
app = typer.Typer()
def own(terminal, fail: bool = False) -> int:
    '''Print K\u00f6per.'''
    if fail:
        raise ConfigError("K\u00f6per \udcff")
    text = "K\u00f6per \udcff"
    terminal.record({"path": text}) if terminal.json else terminal.show(text)
    return 0
command(app, "own", own)
run(app)
"""


def run_script(*arguments, **options):
    """Run the command of the script in a process of its own."""
    options = {"stdout": subprocess.PIPE} | options
    command_line = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command_line, stderr=options.pop("stderr", subprocess.PIPE), check=False, **options)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_results_that_cannot_be_written_are_an_error_with_exit_code_2():
    with open("/dev/full", "wb") as full:
        for arguments in (["--json"], [], ["--json", "--fail"], ["--help"]):
            result = run_script(*arguments, stdout=full)
            assert result.returncode == 2, (arguments, result)
            assert b"Error: " in result.stderr
            assert b"Traceback" not in result.stderr
        for arguments in (["--fail"], ["--fail", "--verbose"]):
            assert run_script(*arguments, stderr=full).returncode == 2


def test_help_in_a_closed_pipe_is_not_a_verdict():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert run_script("--help", stdout=writing).returncode == shared.PIPE_CLOSED
    finally:
        os.close(writing)


def test_a_usage_error_keeps_its_exit_code():
    assert run_script("--unknown").returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_lacks_a_character_shows_an_escape(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    shown = {"ascii": b"K\\xf6per", "cp1252": b"K\xf6per", "utf-8": "K\u00f6per".encode()}[encoding]
    result = run_script(env=environment)
    assert (result.returncode, result.stdout) == (0, shown + b" \\udcff\n")
    result = run_script("--json", env=environment)
    assert (result.returncode, json.loads(result.stdout.decode(encoding))) == (0, {"path": "K\u00f6per \udcff"})
    result = run_script("--fail", env=environment)
    assert (result.returncode, shown in result.stderr) == (2, True)
    result = run_script("--help", env=environment)
    assert (result.returncode, shown in result.stdout) == (0, True)


def test_progress_bars_are_drawn_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # Rich then treats stderr as a terminal
    monkeypatch.setenv("COLUMNS", "120")
    with Terminal().progress() as progress:
        progress("reading images", 1, 2)
        progress("training", 5, 10)
        progress("reading images", 2, 2)
    shown = capsys.readouterr()
    assert shown.out == ""
    for text in ("reading images", "2/2", "training", "5/10"):
        assert text in shown.err


def test_no_progress_without_a_terminal():
    with Terminal().progress() as progress:
        assert progress is None


@pytest.mark.parametrize("error", ["does not fit the reference image.", "a/1.png: it is damaged."])
def test_the_line_of_an_unreadable_image_has_its_path_once(error):
    line = unreadable("a/1.png", error)
    assert line.startswith("unreadable  a/1.png")
    assert line.count("a/1.png") == 1
    assert line.endswith(error)


def test_control_characters_of_a_name_are_printed_as_escapes():
    def work(terminal):
        terminal.show("a\x1b[2Jb\tc\nd")
        terminal.remark("e\x9bf")
        raise ConfigError("g\x07")

    result = invoke(work)
    assert result.stdout == "a\\x1b[2Jb\tc\nd\n"
    assert "e\\x9bf" in result.stderr
    assert "Error: g\\x07" in result.stderr
    assert "\n" not in unreadable("a\nb.png", "cut")


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_leave_the_processor_to_others(given, expected):
    """Beside another program a training takes ten times as long if they do not."""
    script = (
        "import atexit, os, sys; sys.argv = ['normweave', '--help']; from normweave.cli import main; "
        "atexit.register(lambda: print(os.environ['OMP_WAIT_POLICY'], file=sys.stderr)); main()"
    )
    own = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | given
    done = subprocess.run([sys.executable, "-c", script], env=own, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == expected
