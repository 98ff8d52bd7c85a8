"""Files named by the hash of their content."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normweave.errors import DataError
from normweave.serve import files as module
from normweave.serve.files import ContentError, Files


@pytest.fixture
def files(tmp_path):
    files = Files(tmp_path / "files")
    yield files
    files.close()


def on_disk(files):
    return sorted(
        str(path.relative_to(files.folder))
        for path in files.folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_a_content_is_read_by_its_hash(files, content):
    digest = files.put(content)
    assert digest == hashlib.sha256(content).hexdigest()
    assert files.read(digest) == content
    assert (files.folder / digest[:2] / digest).read_bytes() == content


def test_the_same_content_is_written_once(files):
    path = files.folder / files.put(b"part")[:2] / files.put(b"part")
    written = path.stat()
    files.put(b"part")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert len(on_disk(files)) == 1


def test_a_damaged_file_is_replaced_when_its_content_comes_again(files, caplog):
    for damage in (b"pirt", b"par", b""):
        digest = files.put(b"part")
        path = files.folder / digest[:2] / digest
        path.write_bytes(damage)
        assert files.put(b"part") == digest
        assert files.read(digest) == b"part"
    assert caplog.text.count("was changed on disk and is replaced") == 3
    assert len(on_disk(files)) == 1


@pytest.fixture
def orphans(files):
    """Three files with a record and three without."""
    with_record = {files.put(bytes([number])) for number in range(3)}
    without = {files.put(bytes([number])) for number in range(3, 6)}
    return with_record, without


def test_files_that_a_killed_server_left_are_removed(files, orphans):
    with_record, _ = orphans
    assert files.remove_orphans(lambda hashes: hashes - with_record, stopped=Event()) == 3
    assert set(files.all_hashes()) == with_record
    assert files.remove_orphans(lambda hashes: hashes - with_record, stopped=Event()) == 0


def test_a_file_that_gets_its_record_in_the_meantime_is_kept(files, orphans):
    with_record, without = orphans
    asked = []

    def unreferenced(hashes):
        asked.append(hashes)
        return hashes - with_record if len(asked) == 1 else set()

    assert files.remove_orphans(unreferenced, stopped=Event()) == 0
    assert set(files.all_hashes()) == with_record | without


def test_files_of_another_database_are_not_removed(files, orphans, caplog, monkeypatch):
    with_record, without = orphans
    assert files.remove_orphans(lambda hashes: hashes, stopped=Event()) == 0  # an empty database
    assert "6 files in" in caplog.text
    fewer = set(sorted(with_record)[:2])
    assert files.remove_orphans(lambda hashes: hashes - fewer, stopped=Event()) == 0
    monkeypatch.setattr(module, "MOST_ORPHANS", 2)  # a database of an older backup
    monkeypatch.setattr(module, "CHUNK", 2)
    assert files.remove_orphans(lambda hashes: hashes - with_record, stopped=Event()) == 0
    stopped = Event()
    stopped.set()
    monkeypatch.undo()
    assert files.remove_orphans(lambda hashes: hashes - with_record, stopped=stopped) == 0
    assert set(files.all_hashes()) == with_record | without


def test_concurrent_writes(files):
    contents = [bytes([number % 7]) * 100_000 for number in range(70)]
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(files.put, contents))
    assert [files.read(digest) for digest in digests] == contents
    assert len(on_disk(files)) == 7


@pytest.mark.parametrize(
    "digest",
    ["", "../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", "a" * 62 + "/x", "..", "\0" * 64, "ä" * 64],
)
def test_a_malformed_hash_is_refused(files, digest):
    for use in (files.read, files.remove):
        with pytest.raises(ContentError, match="must be a SHA-256 in 64 lowercase hex digits, got"):
            use(digest)


def test_a_removed_file_is_reported(files):
    digest = files.put(b"part")
    files.remove(digest)
    files.remove(digest)
    with pytest.raises(ContentError, match=f"{digest} is not in .*removed by retention"):
        files.read(digest)


def test_a_changed_file_is_refused(files):
    digest = files.put(b"part")
    (files.folder / digest[:2] / digest).write_bytes(b"pirt")
    with pytest.raises(ContentError, match=f"{digest} in .* was changed on disk"):
        files.read(digest)


def test_a_referenced_file_is_not_removed(files):
    kept, gone = files.put(b"kept"), files.put(b"gone")
    assert [files.remove_unreferenced(lambda hashes: hashes - {kept}, digest) for digest in (kept, gone)] == [
        False,
        True,
    ]
    assert list(files.all_hashes()) == [kept]


def test_all_hashes(files):
    digests = {files.put(bytes([number])) for number in range(40)}
    (files.folder / "notes.txt").write_text("not ours")
    (files.folder / min(digests)[:2] / "notes.txt").write_text("not ours")
    assert list(files.all_hashes()) == sorted(digests)


def test_a_full_disk_leaves_no_partial_file(files):
    """A file size limit of 1000 bytes simulates a full disk."""
    import resource
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            files.put(b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert on_disk(files) == []
    assert files.read(files.put(b"x" * 5000)) == b"x" * 5000


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from normweave.serve.files import Files

def die(descriptor):
    os.kill(os.getpid(), signal.SIGKILL)

files = Files(Path(sys.argv[1]))
os.fsync = die if sys.argv[2] == "fsync" else os.fsync
files.put(b"x" * 100_000)
"""


def test_partial_files_of_a_killed_server_are_removed(tmp_path, monkeypatch):
    folder = tmp_path / "files"
    digest = hashlib.sha256(b"x" * 100_000).hexdigest()
    folder.mkdir()
    (folder / digest[:2]).mkdir()  # so that the first fsync is that of the content
    assert subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, folder, "fsync"], check=False).returncode == -9
    files = Files(folder)  # the lock went with the process
    try:
        (left,) = on_disk(files)
        assert left.startswith(f"{digest[:2]}/.partial-")
        assert list(files.all_hashes()) == []
        sync = os.fsync
        with monkeypatch.context() as patch:  # a file that is being written is not removed
            patch.setattr(os, "fsync", lambda descriptor: (files.sweep(), sync(descriptor)))
            kept = files.put(b"kept")
        assert on_disk(files) == [f"{kept[:2]}/{kept}"]
    finally:
        files.close()


def test_a_file_is_synced_before_it_gets_its_name(files, monkeypatch):
    """The order is content, name, folder of the name; any other order can lose the file in a power failure."""
    done = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(Path(f"/proc/self/fd/{file}").readlink()), sync(file)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (done.append(("name", to)), replace(path, to))[1])
    path = files.folder / (digest := files.put(b"part"))[:2] / digest
    assert done[0] == files.folder
    assert done[1].name.startswith(".partial-")
    assert done[2:] == [("name", path), path.parent]
    done.clear()
    files.put(b"part")
    assert done == [path.parent]


def test_a_second_server_in_the_same_folder_is_refused(tmp_path):
    first = Files(tmp_path)
    with pytest.raises(
        DataError, match=r"Another server stores its images in .*Stop that server, or choose another folder"
    ):
        Files(tmp_path)
    first.close()
    Files(tmp_path).close()


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match=r"is not writable: .*Choose another folder"):
        Files(tmp_path / "taken" / "files")


def test_servers_share_a_folder_only_if_all_of_them_do(tmp_path):
    first, second = Files(tmp_path, shared=True), Files(tmp_path, shared=True)
    digest = first.put(b"part")
    assert second.read(digest) == b"part"
    assert first.identity == second.identity
    with pytest.raises(DataError, match=r"Several servers share a folder if each is started with --images."):
        Files(tmp_path)
    first.close()
    second.close()
    alone = Files(tmp_path)
    with pytest.raises(DataError, match="Another server stores its images in"):
        Files(tmp_path, shared=True)
    alone.close()
    other = Files(tmp_path / "other")
    assert other.identity != first.identity
    other.close()


def test_images_belong_to_one_database(tmp_path):
    """The servers of another one would remove them as files without a record."""
    first, second = Files(tmp_path, shared=True), Files(tmp_path, shared=True)
    first.claim("a" * 32)
    second.claim("a" * 32)
    (tmp_path / ".database").write_text(f"{'a' * 32}\n")  # as an editor writes it
    first.claim("a" * 32)
    with pytest.raises(DataError, match=r"belong to another database, .*\. Give each database its own folder \(--i"):
        second.claim("b" * 32)
    (tmp_path / ".database").write_bytes(b"\xff")
    with pytest.raises(DataError, match="belong to another database"):
        first.claim("a" * 32)
    (tmp_path / ".database").unlink()
    second.claim("b" * 32)
    with pytest.raises(DataError, match="belong to another database"):
        first.claim("a" * 32)
    assert list(first.all_hashes()) == []
    assert not list(tmp_path.glob(".partial*"))
    first.close()
    second.close()


def test_a_folder_that_cannot_be_claimed_is_refused(tmp_path):
    (tmp_path / ".database").mkdir()
    files = Files(tmp_path)
    with pytest.raises(DataError, match=r"Images cannot be stored in .*Is a directory.*\. Free disk space, change"):
        files.claim("a" * 32)
    files.close()


def test_a_shared_folder_keeps_the_partial_files_of_others(tmp_path):
    first, second = Files(tmp_path, shared=True), Files(tmp_path, shared=True)
    first.put(b"part")
    (shard,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    young, old = shard / ".partial-of-another", shard / ".partial-of-a-killed-server"
    for path in (young, old):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    second.sweep()
    assert (young.exists(), old.exists()) == (True, False)
    first.close()
    second.close()
