"""Check that everything a line PC needs has wheels for 64-bit ARM on Linux; nothing is installed."""

import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

PYTHON = "3.11"
NEWEST_GLIBC = 39
EXTRAS = ("serve", "line", "postgres", "openvino", "align")


def main() -> int:
    """Let pip resolve the packages of the runtime and its extras for ARM; return its exit code.

    An index without a wheel of NumPy for ARM is a mirror that cannot answer: then nothing is checked.
    """
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *(each for name in EXTRAS for each in project["optional-dependencies"][name])]
    if resolve(["numpy"]):
        print("The package index has no wheels for ARM: not checked.")
        return 0
    return resolve(wanted)


def resolve(packages: Sequence[str]) -> int:
    """Return the exit code of pip, which downloads no more than it needs to know what belongs together."""
    platforms = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, NEWEST_GLIBC + 1))]
    options = ["--dry-run", "--quiet", "--ignore-installed", "--only-binary=:all:", "--python-version", PYTHON]
    options += [option for platform in platforms for option in ("--platform", platform)]
    with tempfile.TemporaryDirectory() as nothing:
        command = [sys.executable, "-m", "pip", "install", *options, "--target", nothing, *packages]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
