"""Options that several commands share."""

import pytest

from normweave.cli import options

from .conftest import run


@pytest.mark.parametrize(
    ("names", "expected"),
    [(None, ()), ([], ()), (["all"], ()), (["a", "all"], ()), (["b", "a"], ("b", "a"))],
    ids=str,
)
def test_no_name_or_all_selects_everything(names, expected):
    assert options.chosen(names) == expected


@pytest.mark.parametrize(
    ("option", "commands"),
    [
        ("--category", ("train", "evaluate")),
        ("--subclass", ("train", "evaluate")),
        ("--layout", ("train", "evaluate", "calibrate")),
        ("--false-alarm-rate", ("train", "calibrate")),
        ("--cache", ("train", "benchmark")),
    ],
)
def test_an_option_has_the_same_help_in_every_command(option, commands):
    lines = set()
    for command in commands:
        shown = [line for line in run(command, "--help").output.splitlines() if f" {option} " in line]
        assert len(shown) == 1, command
        lines.add(" ".join(shown[0].partition(option)[2].strip("│ ").split()))
    assert len(lines) == 1
