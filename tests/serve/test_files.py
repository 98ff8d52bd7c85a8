"""Contents on disk: under their hash, whole or not there, and nowhere else."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normweave.errors import DataError
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
def test_comes_back_under_the_hash_of_its_content(files, content):
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


def test_many_threads_put_the_same_and_others_at_once(files):
    contents = [bytes([number % 7]) * 100_000 for number in range(70)]
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(files.put, contents))
    assert [files.read(digest) for digest in digests] == contents
    assert len(on_disk(files)) == 7


@pytest.mark.parametrize(
    "digest",
    ["", "../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", "a" * 62 + "/x", "..", "\0" * 64, "ä" * 64],
)
def test_what_is_no_hash_leads_nowhere(files, digest):
    for use in (files.read, files.remove):
        with pytest.raises(ContentError, match="must be a SHA-256 in 64 lowercase hex digits, got"):
            use(digest)


def test_a_removed_content_is_said_to_be_gone(files):
    digest = files.put(b"part")
    files.remove(digest)
    files.remove(digest)
    with pytest.raises(ContentError, match=f"{digest} is not in .*removed by retention"):
        files.read(digest)


def test_a_changed_content_is_not_given_out(files):
    digest = files.put(b"part")
    (files.folder / digest[:2] / digest).write_bytes(b"pirt")
    with pytest.raises(ContentError, match=f"{digest} in .* was changed on disk"):
        files.read(digest)


def test_a_content_is_removed_unless_somebody_refers_to_it(files):
    kept, gone = files.put(b"kept"), files.put(b"gone")
    assert [files.remove_unless(lambda digest: digest == kept, digest) for digest in (kept, gone)] == [
        False,
        True,
    ]
    assert list(files.all_hashes()) == [kept]


def test_lists_every_content(files):
    digests = {files.put(bytes([number])) for number in range(40)}
    (files.folder / "notes.txt").write_text("not ours")
    (files.folder / min(digests)[:2] / "notes.txt").write_text("not ours")
    assert list(files.all_hashes()) == sorted(digests)


def test_a_full_disk_leaves_nothing_behind(files):
    """A disk that takes 1000 bytes a file stands for a full one."""
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


WRITES_HALF = """
import os, signal, sys
from pathlib import Path
from normweave.serve.files import Files

def die(descriptor):
    os.kill(os.getpid(), signal.SIGKILL)

files = Files(Path(sys.argv[1]))
os.fsync = die if sys.argv[2] == "fsync" else os.fsync
files.put(b"x" * 100_000)
"""


def test_what_a_kill_left_half_written_is_swept(tmp_path):
    folder = tmp_path / "files"
    digest = hashlib.sha256(b"x" * 100_000).hexdigest()
    folder.mkdir()
    (folder / digest[:2]).mkdir()  # so that the first fsync is that of the content
    assert subprocess.run([sys.executable, "-c", WRITES_HALF, folder, "fsync"], check=False).returncode == -9
    files = Files(folder)  # the lock went with the process
    try:
        (left,) = on_disk(files)
        assert left.startswith(f"{digest[:2]}/.partial-")
        assert list(files.all_hashes()) == []
        own = folder / digest[:2] / f"{files._partial}being-written"
        own.touch()
        kept = files.put(b"kept")
        files.sweep()
        assert on_disk(files) == sorted([str(own.relative_to(folder)), f"{kept[:2]}/{kept}"])
    finally:
        files.close()


def test_a_name_is_given_to_what_is_on_disk_only(files, monkeypatch):
    """Content, then name, then the folder that holds the name: any other order loses something in a power cut."""
    done = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (done.append(Path(f"/proc/self/fd/{file}").readlink()), sync(file))
    )
    monkeypatch.setattr(Path, "replace", lambda path, to: (done.append(("name", to)), replace(path, to))[1])
    path = files.folder / (digest := files.put(b"part"))[:2] / digest
    assert done[0] == files.folder
    assert done[1].name.startswith(".partial-")
    assert done[2:] == [("name", path), path.parent]
    done.clear()
    files.put(b"part")
    assert done == [path.parent]


def test_a_folder_serves_one_server(tmp_path):
    first = Files(tmp_path)
    with pytest.raises(
        DataError, match=r"Another server stores its images in .*Stop that server, or choose another folder"
    ):
        Files(tmp_path)
    first.close()
    Files(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match=r"is not writable: .*Choose another folder"):
        Files(tmp_path / "taken" / "files")
