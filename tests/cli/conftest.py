"""A small data set and a bundle trained on it through the command line, with untrained weights."""

from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from normweave.cli import app
from normweave.textiles import Textile, make_textures

SMALL = [
    "--set=data.calibration=split",
    "--set=features.weights=random",
    "--set=features.strides=[8]",
    "--set=prepare.height=64",
    "--set=prepare.width=64",
    "--false-alarm-rate=0.2",
    "--set=outcome.unknown_rate=0.2",
]


class Trained(NamedTuple):
    """The bundle and the output of 'normweave train --json'."""

    bundle: object
    output: str


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, env={"COLUMNS": "200"})


@pytest.fixture(scope="session")
def textiles(tmp_path_factory):
    """Two subclasses to train with, one unseen; the folder."""
    folder = tmp_path_factory.mktemp("data") / "cloth"
    make_textures(
        folder,
        size=(64, 64),
        train_images=12,
        test_images=3,
        defect_images=3,
        seen=[Textile("plain", "ecru", "diffuse"), Textile("twill", "indigo", "raking")],
        unseen=[Textile("satin", "navy", "diffuse")],
    )
    return folder


@pytest.fixture(scope="session")
def trained(textiles, tmp_path_factory):
    bundle = tmp_path_factory.mktemp("trained") / "cloth.bundle"
    result = run("train", textiles, "-o", bundle, "--model", "dfm", "--no-cache", "--json", "--seed", "1", *SMALL)
    assert result.exit_code == 0, result.output
    return Trained(bundle, result.stdout)
