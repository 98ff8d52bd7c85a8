"""The examples in C++ and C# are compiled, and give the scores and verdicts of `Detector`."""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from normweave.detector import Detector
from normweave.textiles import SEEN, render
from required import absent

EXAMPLES = Path(__file__).parents[1] / "examples"
SYSTEM_JSON = Path("/usr/lib/mono/4.5/System.Json.dll")


def compiled_cpp(home, folder):
    """The command that runs the example in C++."""
    if shutil.which("g++") is None or not Path("/usr/include/nlohmann/json.hpp").is_file():
        absent("g++", "g++ or nlohmann-json3-dev is not installed")
    libraries = [str(next(home.glob("libs/libopenvino.so*"))), f"-Wl,-rpath,{home}/libs"]
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", f"{home}/include", "-o", f"{folder}/inspect"]
    subprocess.run(["g++", EXAMPLES / "cpp" / "inspect.cpp", *options, *libraries], check=True)
    return [f"{folder}/inspect"]


def compiled_csharp(home, folder):
    """The command that runs the example in C#."""
    if shutil.which("mcs") is None or shutil.which("mono") is None or not SYSTEM_JSON.is_file():
        absent("mono", "mono-mcs, mono-runtime or libmono-system-json4.0-cil is not installed")
    (folder / "libopenvino_c.so").symlink_to(next(home.glob("libs/libopenvino_c.so*")))
    program = f"-out:{folder}/inspect.exe"
    subprocess.run(["mcs", "-warnaserror", "-r:System.Json", program, EXAMPLES / "csharp" / "inspect.cs"], check=True)
    return ["mono", f"{folder}/inspect.exe"]


@pytest.fixture(scope="module", params=[compiled_cpp, compiled_csharp], ids=["C++", "C#"])
def inspect(request, tmp_path_factory):
    """The compiled example; returns exit code, output and error."""
    found = importlib.util.find_spec("openvino")
    if found is None or found.origin is None:
        pytest.skip("openvino is not installed")
    home, folder = Path(found.origin).parent, tmp_path_factory.mktemp("compiled")
    command = request.param(home, folder)
    environment = os.environ | {"LD_LIBRARY_PATH": f"{folder}:{home}/libs"}

    def run(*arguments):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment)
        return done.returncode, done.stdout, done.stderr

    return run


def test_scores_and_verdicts_are_those_of_the_detector(inspect, fusion_bundle, tmp_path):
    detector = Detector.load(fusion_bundle)
    verdicts = set()
    for number in range(9):
        pixels = render(SEEN[number % 3], seed=700 + number, size=(64, 64)).image.copy()
        if number > 5:
            pixels[20:30, 20:30] = 255 - pixels[20:30, 20:30]
        Image.fromarray(pixels).save(tmp_path / "part.ppm")
        expected = detector.score(pixels, maps=False)
        code, output, error = inspect(fusion_bundle, tmp_path / "part.ppm")
        assert error == ""
        found = json.loads(output)
        assert found["pred_score"] == pytest.approx(expected.pred_score, rel=1e-3, abs=1e-3)
        assert found["threshold"] == pytest.approx(expected.threshold)
        assert (found["verdict"], code) == (expected.verdict, int(expected.verdict != "normal"))
        verdicts.add(found["verdict"])
    assert len(verdicts) > 1


def test_what_it_cannot_inspect_is_refused(inspect, fusion_bundle, tmp_path):
    assert inspect(fusion_bundle)[0] == 2
    Image.new("RGB", (32, 64)).save(tmp_path / "small.ppm")
    code, _, error = inspect(fusion_bundle, tmp_path / "small.ppm")
    assert (code, "must be a binary PPM of 64 x 64" in error) == (2, True)
    (tmp_path / "torn.ppm").write_bytes(b"P6\n64 64\n255\n" + bytes(100))
    assert "is cut off" in inspect(fusion_bundle, tmp_path / "torn.ppm")[2]
    assert inspect(tmp_path, tmp_path / "torn.ppm")[0] == 2
