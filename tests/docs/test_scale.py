"""docs/scale.md has the results of perf/scale_model.py."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_costs_and_limits_of_the_model():
    command = [sys.executable, ROOT / "perf" / "scale_model.py"]
    small = ["--lines", "80", "--hours", "0.1"]
    output = subprocess.run([*command, *small], check=True, capture_output=True, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    assert result["simulation"]["images not stored at the end"] < 10
    assert result["simulation"]["images"] > 10_000
    page = (ROOT / "docs" / "scale.md").read_text()
    first = output[: output.index("| 80 lines")]  # these do not depend on the number of lines
    rows = [line for line in first.splitlines() if line.startswith("| ") and "---" not in line and line[-3].isdigit()]
    assert len(rows) == 13
    assert [row for row in rows if row not in page] == []
