"""The example in C++ is compiled, and gives the scores and verdicts of `Detector`."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from normweave.detector import Detector
from normweave.textiles import SEEN, render
from required import absent

SOURCE = Path(__file__).parents[1] / "examples" / "cpp" / "inspect.cpp"


@pytest.fixture(scope="module")
def inspect(tmp_path_factory):
    """The compiled example; returns exit code, output and error."""
    found = importlib.util.find_spec("openvino")
    if found is None or found.origin is None:
        pytest.skip("openvino is not installed")
    if shutil.which("g++") is None or not Path("/usr/include/nlohmann/json.hpp").is_file():
        absent("g++", "g++ or nlohmann-json3-dev is not installed")
    home = Path(found.origin).parent
    program = tmp_path_factory.mktemp("cpp") / "inspect"
    libraries = [str(next(home.glob("libs/libopenvino.so*"))), f"-Wl,-rpath,{home}/libs"]
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", f"{home}/include", "-o", str(program)]
    subprocess.run(["g++", str(SOURCE), *options, *libraries], check=True)

    def run(*arguments):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
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
