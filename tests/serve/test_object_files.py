"""Images in an object store, SeaweedFS by its interface of S3."""

import asyncio
import hashlib
import os
import sys
import time
import uuid
from contextlib import closing
from pathlib import Path
from threading import Event

import pytest

from counterparts import Proxy
from inspections import inspect_files
from normweave.errors import ConfigError, DataError, MissingError
from normweave.serve import object_files
from normweave.serve.config import ServeConfig
from normweave.serve.database import StoreError
from normweave.serve.files import ContentError, MissingFileError
from normweave.serve.object_files import ObjectFiles
from normweave.serve.service import InspectionService
from normweave.serve.store import Store
from s3_server import WRITER, s3_server

botocore = pytest.importorskip("botocore.session")
s3fs = pytest.importorskip("s3fs")
fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """Address of a bucket in an S3 on this machine."""
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        client = botocore.Session().create_client("s3", endpoint_url=url)
        client.create_bucket(Bucket="line")
        yield "s3://line/press 5"


@pytest.fixture
def files(s3):
    files = ObjectFiles(s3)
    yield files
    for digest in list(files.all_hashes()):
        files.remove(digest)


def test_a_content_is_read_by_its_hash(files):
    digest = files.put(b"part")
    assert digest == hashlib.sha256(b"part").hexdigest()
    assert files.put(b"part") == digest
    assert files.read(digest) == b"part"
    assert list(files.all_hashes()) == [digest]
    files.remove(digest)
    files.remove(digest)
    with pytest.raises(MissingFileError, match=r"is not in s3://line/press 5. It was removed by retention"):
        files.read(digest)


def test_a_changed_object_and_a_malformed_hash_are_refused(files):
    digest = files.put(b"part")
    fsspec.filesystem("s3").pipe_file(f"line/press 5/{digest[:2]}/{digest}", b"pirt")
    with pytest.raises(ContentError, match=r"in s3://line/press 5 was changed. Restore it"):
        files.read(digest)
    for work in (files.read, files.remove):
        with pytest.raises(ContentError, match=r"must be a SHA-256 in 64 lowercase hex digits, got '../etc'"):
            work("../etc")


def test_objects_without_a_record_are_removed_and_others_kept(files):
    kept = [files.put(bytes([number])) for number in range(3)]
    files.put(b"of a killed server")
    with_record = set(kept)
    assert files.remove_orphans(lambda hashes: hashes - with_record, stopped=Event()) == 1
    assert list(files.all_hashes()) == sorted(kept)


def test_a_service_stores_and_shows_its_images(files, loaded, photos, tmp_path):
    with closing(Store.open(tmp_path / "store.db")) as store:
        service = InspectionService(loaded, store=store, files=files, config=ServeConfig(), folder=tmp_path)
        kept = inspect_files(service, *photos[:5])
        service.check_ready()
        for one, path in zip(kept, photos, strict=False):
            assert asyncio.run(service.read_image(one.image)) == Path(path).read_bytes()
            shape = asyncio.run(service.render(one.image, lambda reader: reader.anomaly_map().shape))
            assert shape == one.image.size
        service.stop()


def test_a_store_that_does_not_answer_is_an_error_with_its_address(files, monkeypatch):
    digest = files.put(b"part")
    files.check_writable()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # sooner
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    away = ObjectFiles(f"{files.name}/away")
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1"):
        away.put(b"part")
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1"):
        away.check_writable()
    with pytest.raises(StoreError, match=rf"The file {digest} cannot be read from s3://line/press 5/away: .*"):
        away.read(digest)


def test_a_store_that_hangs_is_an_error_within_the_time_of_two_attempts(files, monkeypatch):
    """A write that fails is tested at the next look, also if one has just passed."""
    proxy = Proxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setattr(object_files, "SECONDS", 1)
    hanging = ObjectFiles(files.name)
    hanging.check_writable()
    proxy.switch("silent")
    hanging.check_writable()  # the result of a moment ago
    start = time.monotonic()
    with pytest.raises(OSError, match=r"no answer within 2 s|127\.0\.0\.1"):
        hanging.put(b"part")
    assert time.monotonic() - start < 10
    with pytest.raises(OSError, match=r"no answer within 2 s|127\.0\.0\.1"):
        hanging.check_writable()
    proxy.switch("pass")
    hanging.check_writable()
    proxy.stop()


def test_credentials_that_cannot_read_are_not_enough(files, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, WRITER)
    writer = ObjectFiles(files.name)
    digest = writer.put(b"part")
    with pytest.raises(PermissionError):
        writer.check_writable()
    with pytest.raises(StoreError, match=r"cannot be read from s3://line/press 5: .*[^.]\. Check its address, the cre"):
        writer.read(digest)


def test_images_belong_to_one_database(files):
    """The servers of another one would remove them as files without a record."""
    files.claim("a" * 32)
    digest = files.put(b"part")
    other = ObjectFiles(files.name)
    with pytest.raises(DataError, match=rf"{files.name} belong to another .* remove the file {files.name}/.database: "):
        other.claim("b" * 32)
    other.claim("a" * 32)
    assert list(files.all_hashes()) == [digest]


def test_an_object_store_that_refuses_cannot_be_claimed(files, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError, match=rf"cannot be stored in {files.name}: .*[^.]\. Check its address, the cre"):
        ObjectFiles(files.name).claim("a" * 32)


def test_an_address_is_the_same_with_a_slash_and_needs_a_bucket(s3):
    assert ObjectFiles(f"{s3}/").identity == ObjectFiles(s3).identity == s3
    with pytest.raises(ConfigError, match=r"--images 's3://' has no bucket. Give s3://BUCKET/FOLDER"):
        ObjectFiles("s3://")


def test_the_probe_writes_no_object_each_time(files, monkeypatch):
    monkeypatch.setattr(object_files, "PROBE_SECONDS", 60.0)
    files.check_writable()
    monkeypatch.setattr(uuid, "uuid4", None)  # of which a probe has its name
    files.check_writable()
    monkeypatch.setattr(object_files, "PROBE_SECONDS", 0.0)
    with pytest.raises(TypeError, match="NoneType"):
        files.check_writable()


@pytest.mark.parametrize("url", ["memory://line", "file:///tmp/line", "https://host/line"])
def test_what_stores_nothing_to_last_is_refused(url):
    with pytest.raises(
        ConfigError, match=r"--images cannot be of .*://, got .*Give a folder, or the address of an obj"
    ):
        ObjectFiles(url)


def test_unknown_protocols_and_missing_packages(monkeypatch):
    with pytest.raises(ConfigError, match=r"--images 'nowhere://line' cannot be used: .*Give s3://BUCKET/FOLDER."):
        ObjectFiles("nowhere://line")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingError, match=r'needs fsspec, which is not installed. pip install "normweave\[s3\]"'):
        ObjectFiles("s3://line")
