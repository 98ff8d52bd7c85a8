"""A file is written completely or not at all."""

from pathlib import Path

import pytest

from normweave.atomic import write_atomically


def test_the_content_is_in_a_temporary_file_of_the_same_folder_until_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    seen: list[Path] = []

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        seen.append(temporary)
        assert path.read_text() == "old"

    write_atomically(path, write)
    assert path.read_text() == "new"
    assert seen[0].parent == tmp_path
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_old_content_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
