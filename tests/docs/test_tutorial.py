"""The tutorial notebook runs, and the committed one has small outputs without a path of a machine."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial" / "tutorial.ipynb"
SECONDS = 900  # for one cell
FEWER = {"test_images=8": "test_images=2", '"prepare.width=128"]': '"prepare.width=128", "data.folds=2"]'}
"""Replacements with which the notebook trains three heads instead of six, and predicts fewer images."""


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(autouse=True)
def without_photographs(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMWEAVE_DATA", str(tmp_path / "absent"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


def outputs(cell):
    """Return the text that a cell prints, and the bytes of its images in base64."""
    text = "".join(output.get("text", "") for output in cell.outputs)
    images = "".join(
        data for output in cell.outputs for name, data in output.get("data", {}).items() if name.startswith("image/")
    )
    return text, images


def test_committed_outputs_are_complete_and_small(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    texts, images = zip(*map(outputs, code), strict=True)
    assert 0 < sum(map(len, images)) * 3 / 4 < 200_000
    assert "trace" not in "".join(texts).lower()
    assert not re.search(r"(^|[\s'\"])/\w", "".join(texts)), "an absolute path"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter; a kernel is a process of its own
def test_the_notebook_runs_without_the_photographs(notebook, tmp_path):
    for own, few in FEWER.items():
        (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and own in cell.source)
        cell.source = cell.source.replace(own, few)
    photographs = [cell for cell in notebook.cells if "photographs" in cell.metadata.get("tags", [])]
    NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    assert (tmp_path / "runs" / "cloth.bundle" / "bundle.json").is_file()
    first, *others = map(outputs, photographs)
    assert "NORMWEAVE_DATA" in first[0]
    assert others == [("", "")] * len(others)
