"""The list of inspected files."""

from contextlib import closing

import pytest

from normweave.serve import seen as module
from normweave.serve.database import StoreError
from normweave.serve.seen import File, Seen


def files(*numbers, changed=5):
    return [File(b"\xff%d.png" % number, number, changed) for number in numbers]


def test_files_are_known_by_name_size_and_time_of_change_also_after_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    with closing(Seen(tmp_path / "seen.sqlite")) as seen:
        seen.add(files(1, 2, 3, 4, 5))
        assert list(seen.unseen(files(1, 2, 6, 3, 4, 5))) == files(6)
    with closing(Seen(tmp_path / "seen.sqlite")) as seen:
        assert list(seen.unseen([*files(1), *files(2, changed=4)])) == files(2, changed=4)  # also to an earlier time
        larger = files(3)[0]._replace(size=9)
        seen.add([larger])
        assert list(seen.unseen([larger, *files(3)])) == files(3)
        assert len(seen) == 5


def test_the_list_is_bounded_and_keeps_what_is_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_GONE", 10)
    with closing(Seen(tmp_path / "seen.sqlite")) as seen:
        seen.add(files(*range(5)))
        seen.add(files(*range(5, 40)))
        assert seen.is_full
        seen.forget(files(*range(5)))
        assert not seen.is_full
        assert list(seen.unseen(files(*range(40)))) == files(*range(5, 30))
        seen.forget([])  # the folder is away for a while
        assert list(seen.unseen(files(*range(40)))) == files(*range(5, 35))
        assert len(seen) == 10


def test_a_damaged_list_says_how_to_get_on(tmp_path):
    (tmp_path / "seen.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match=r"seen.sqlite, failed: file is not a database. .* remove it"):
        Seen(tmp_path / "seen.sqlite")


def test_of_several_files_all_are_remembered_or_none(tmp_path):
    with closing(Seen(tmp_path / "seen.sqlite")) as seen:
        with pytest.raises(StoreError, match="NOT NULL"):
            seen.add([*files(1), File(b"2.png", None, 0)])
        assert len(seen) == 0
