"""Plug-ins of other packages: the example is installed and used by the commands; faulty ones break nothing."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from normweave import bundle, plugins
from normweave.config import Config
from normweave.data.layouts import Layout
from normweave.errors import MissingError

EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin"
SMALL = [f"--set={one}" for one in ("features.weights=random", "features.strides=[8]", "prepare.height=64")]
SMALL += ["--set=prepare.width=64", "--set=outcome.unknown_rate=0.2", "--false-alarm-rate=0.2", "--no-cache"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the example."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    subprocess.run(["cp", "-r", EXAMPLE, source], check=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", target]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, source / "plugin"], check=True)
    return target


def run(*arguments, site=None, module="normweave"):
    path = os.pathsep.join(filter(None, (str(site or ""), os.environ.get("PYTHONPATH", ""))))
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
    call = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(call, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def lots(tmp_path_factory):
    """Images of eight lots, in the layout of the example."""
    root, rng = tmp_path_factory.mktemp("lots"), np.random.default_rng(0)
    for number in range(24):
        folder = root / ("rejects" if number > 21 else f"LOT-{number % 8}")
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(90, 110, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


def test_the_example_passes_its_own_tests(site):
    done = run("-q", "-p", "no:cacheprovider", EXAMPLE / "tests", site=site, module="pytest")
    assert done.returncode == 0, done.stdout


def test_a_head_and_a_layout_of_another_package(site, lots, tmp_path):
    """Doctor lists them, train uses them, and the bundle says that it needs the head."""
    listed = json.loads(run("doctor", "--json", site=site).stdout)["plugins"]
    assert {(one["group"], one["name"], one["version"], one["reason"]) for one in listed} == {
        ("heads", "mean_image", "1.0", None),
        ("layouts", "lots", "1.0", None),
    }
    made = tmp_path / "mean.bundle"
    trained = run("train", lots, "-o", made, "--model", "mean-image", "--layout", "lots", *SMALL, site=site)
    assert trained.returncode == 0, trained.stderr
    assert bundle.read(made)["plugins"] == [
        {"group": "heads", "name": "mean_image", "package": "normweave-example", "version": "1.0"}
    ]
    shown = run("bundle", "show", made, site=site).stdout
    assert "needs the plug-in mean_image (heads) of normweave-example 1.0" in shown
    image = next(lots.glob("rejects/*.png"))
    with_it = run("predict", made, image, "--json", site=site)
    assert json.loads(with_it.stdout)["model"] == "mean_image", with_it.stderr
    without = run("predict", made, image)
    assert without.returncode == 2
    assert "needs the plug-in mean_image (heads) of normweave-example 1.0" in without.stderr
    assert "pip install normweave-example" in without.stderr


class Quits:
    """Ends the process when it is looked at, as a module may."""

    @property
    def code(self):
        raise SystemExit(7)


QUITS = Quits()


@pytest.fixture
def offer(monkeypatch):
    """Replaces the entry points of all packages."""

    def replace(*entries):
        def entry_points(*, group):
            return [entry for entry in entries if entry.group == group]

        monkeypatch.setattr(plugins, "entry_points", entry_points)
        plugins.found.cache_clear()

    yield replace
    monkeypatch.undo()
    plugins.found.cache_clear()


def entry(name, value, group="layouts", package="other"):
    made = EntryPoint(name=name, value=value, group=f"normweave.{group}")
    vars(made).update(dist=SimpleNamespace(name=package, version="2.0"))
    return made


def test_what_cannot_be_used_is_left_out_with_its_reason(offer, caplog):
    offer(
        entry("fine", "normweave.data.layouts:LAYOUTS.__class__"),
        entry("gone", "no_such_module:LAYOUT"),
        entry("folders", "builtins:dict"),
        entry("twice", "builtins:dict", package="a"),
        entry("twice", "builtins:dict", package="b"),
        entry("wrong", "builtins:int"),
        entry("quits", f"{__name__}:QUITS.code"),
    )
    assert plugins.usable("layouts", known=("folders",), of=dict) == {"fine": dict, "twice": dict}
    reasons = "\n".join(caplog.messages)
    assert "The plug-in gone of other 2.0 is not used: ModuleNotFoundError" in reasons
    assert "the name folders is one of normweave itself" in reasons
    assert "twice of b 2.0 is not used: another package has the name twice, too" in reasons
    assert "it is no dict" in reasons
    assert plugins.usable("layouts", of=Layout) == {}
    assert plugins.usable("layouts", known=("folders",), of=dict, has=("keys", "Config")) == {}
    listed = {(one["name"], one["package"]): one["reason"] for one in plugins.listed()}
    assert listed["wrong", "other"] == "it is no dict"
    assert listed["fine", "other"] == "it has no Config"
    assert "ModuleNotFoundError" in listed["gone", "other"]
    assert {one.name: one.reason for one in plugins.found("layouts")}["quits"] == "SystemExit: 7"


def test_a_bundle_needs_its_plugins(offer):
    assert plugins.recorded(Config()) == {}
    offer(entry("fusion", "builtins:dict", "experts"), entry("torn", "no_such_module:X", "heads"))
    assert plugins.recorded(Config()) == {
        "plugins": [{"group": "experts", "name": "fusion", "package": "other", "version": "2.0"}]
    }
    plugins.check({}, where="a.bundle")
    plugins.check(plugins.recorded(Config()), where="a.bundle")
    needed = {"group": "heads", "name": "torn", "package": "other", "version": "2.0"}
    with pytest.raises(MissingError, match=r"a.bundle needs the plug-in torn of other 2.0, which failed: ModuleNot"):
        plugins.check({"plugins": [needed]}, where="a.bundle")
    with pytest.raises(MissingError, match=r"needs the plug-in gone \(heads\) of other 2.0, .* pip install other"):
        plugins.check({"plugins": [needed | {"name": "gone"}]}, where="a.bundle")
