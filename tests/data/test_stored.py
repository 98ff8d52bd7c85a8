"""Images of stores and of Parquet tables are read as files are; results are written completely or not at all."""

import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from PIL import Image
from pyarrow import parquet

from counterparts import Proxy
from normweave.data import stored
from normweave.data.images import decode
from normweave.data.stored import Folder, ParquetImage, UrlImage, fetched, in_store, in_table
from normweave.errors import DataError, ImageError, MissingError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)).save(folder / f"{number}.png")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture
def store(photos):
    """A store of fsspec in memory with the photos, hidden files and other files."""
    system = fsspec.filesystem("memory")
    for number, path in enumerate(photos):
        system.put(path, f"/bucket/b/{number}.PNG" if number else "/bucket/a.png")
    for name in ("notes.txt", ".hidden.png", ".thumbnails/0.png"):
        system.pipe_file(f"/bucket/{name}", b"x")
    yield system
    system.rm("/bucket", recursive=True)


# ── stores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_urls():
    assert all(map(stored.is_url, ["s3://bucket/a.png", "gs://b", "memory://c"]))
    assert not any(map(stored.is_url, ["a.png", "/a/b.png", "C:\\a.png", "a:b.png", "part[1]://.png"]))


def test_a_folder_a_pattern_and_a_file_of_a_store(store, photos):
    names = [f"memory:///bucket/b/{number}.PNG" for number in range(1, len(photos))]
    assert [image.path for image in in_store("memory://bucket")] == ["memory:///bucket/a.png", *names]
    assert [image.path for image in in_store("memory://bucket/b/*.PNG")] == names
    assert [image.path for image in in_store("memory://bucket/gone.png")] == ["memory:///bucket/gone.png"]


def test_the_name_of_a_file_may_have_the_signs_of_a_pattern(store, photos):
    store.put(photos[0], "/bucket/br[1].png")
    assert [image.path for image in in_store("memory://bucket/br[1].png")] == ["memory:///bucket/br[1].png"]


def test_an_image_of_a_store_has_the_pixels_of_the_file(store, photos):
    images = list(in_store("memory://bucket"))
    for image, read_ahead, path in zip(images, fetched(images), photos, strict=True):
        assert (decode(image) == decode(path)).all()
        assert (decode(read_ahead) == decode(path)).all()
        assert read_ahead.path == image.path


def test_paths_pass_the_read_ahead_unchanged(store):
    images = ["a.png", UrlImage("memory:///bucket/a.png"), UrlImage("memory:///bucket/gone.png"), "b.png"]
    first, second, third, fourth = fetched(images)
    assert (first, second.path, fourth) == ("a.png", "memory:///bucket/a.png", "b.png")
    with pytest.raises(ImageError, match=r"memory:///bucket/gone\.png: no such file\. Check the URL\."):
        decode(third)


def test_a_refused_image_has_its_path_and_its_reason():
    image = stored.refused(UrlImage("memory:///bucket/a.png"), "it ended its process.")
    assert image.path == "memory:///bucket/a.png"
    with pytest.raises(ImageError, match=r"^it ended its process\.$"):
        decode(image)


def test_an_empty_image_of_a_store_is_named(store):
    store.pipe_file("/bucket/empty.png", b"")
    with pytest.raises(ImageError, match=r"memory:///bucket/empty\.png: empty, 0 bytes"):
        decode(UrlImage("memory:///bucket/empty.png"))


@pytest.mark.parametrize("url", ["memory://bucket/.thumbnails", "memory://bucket/*.bmp"])
def test_a_store_without_images(store, url):
    store.pipe_file("/bucket/.thumbnails/0.txt", b"x")
    store.rm_file("/bucket/.thumbnails/0.png")
    with pytest.raises(DataError, match=r"contains no image\. Give a folder with images"):
        in_store(url)


def test_an_unknown_store_and_one_whose_package_is_missing(monkeypatch):
    with pytest.raises(DataError, match=r"nonsense://x: .*Allowed: s3://, gs://, abfs://"):
        in_store("nonsense://x")
    with pytest.raises(MissingError, match=r"gs://bucket needs a package that is not installed: .*gcsfs"):
        in_store("gs://bucket")


def test_a_store_that_fails_is_asked_again_and_then_ends_the_run(store, monkeypatch):
    monkeypatch.setattr(stored, "WAIT_S", 0.0)
    asked = []
    original = MemoryFileSystem.cat_file

    def cat_file(self, path, **options):
        asked.append(path)
        if len(asked) < failures:
            raise TimeoutError("no answer")
        return original(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    failures = stored.TRIES
    assert UrlImage("memory:///bucket/a.png").read()[:4] == b"\x89PNG"
    assert len(asked) == stored.TRIES
    asked.clear()
    failures = 100
    with pytest.raises(DataError, match=r"the store does not answer \(TimeoutError: no answer\)\. Check") as caught:
        decode(UrlImage("memory:///bucket/a.png"))
    assert not isinstance(caught.value, ImageError)  # it is no fault of the image


def test_a_store_that_hangs_ends_the_run(monkeypatch):
    """A real client of S3, and a server that accepts connections and never answers."""
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # one of another test has another address
    proxy = Proxy(0)
    proxy.switch("silent")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setattr(stored, "OBJECT_S", 0.3)
    monkeypatch.setattr(stored, "WAIT_S", 0.0)
    results = Folder("s3://hanging/results")
    hanging = (UrlImage("s3://hanging/a.png").read, lambda: results.read("a"), lambda: results.write("a", b"1"))
    for request in hanging:
        begun = time.monotonic()
        with pytest.raises(DataError, match=r"store does not answer \(TimeoutError: no answer within 0\.3 s\)\. Ch"):
            request()
        assert time.monotonic() - begun < 10
    monkeypatch.setattr(stored, "REQUEST_S", 1)
    monkeypatch.setattr(stored, "ATTEMPTS", 1)
    for url in ("s3://hanging/", "s3://hanging/*.png", "s3://hanging/*.parquet", "s3://hanging/t.parquet"):
        begun = time.monotonic()
        with pytest.raises(DataError, match=r"store does not answer"):
            list(in_table(url) if url.endswith("t") else in_store(url))
        assert time.monotonic() - begun < 20
    proxy.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_images_that_were_to_be_read_ahead_are_not_waited_for(store, monkeypatch):
    asked = []

    def cat_file(self, path, **options):
        asked.append(path)
        time.sleep(2.0 if len(asked) > 1 else 0.0)
        raise TimeoutError("no answer")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(stored, "TRIES", 1)
    with pytest.raises(DataError, match="does not answer"):
        list(fetched(UrlImage(f"memory:///bucket/{number}.png") for number in range(stored.AHEAD)))
    assert len(asked) <= stored.READERS + 1


def test_a_store_that_fails_while_a_table_is_read_ends_the_run(store, tmp_path, photos, monkeypatch):
    monkeypatch.setattr(stored, "WAIT_S", 0.0)
    store.put(table(tmp_path / "t.parquet", {"image": contents(photos)}, row_group_size=1), "/bucket/failing.parquet")
    (first, *_, last) = in_table("memory://bucket/failing.parquet")
    assert decode(first).shape == (16, 24, 3)
    monkeypatch.setattr(MemoryFile, "read", lambda *_: (_ for _ in ()).throw(ConnectionError("gone")))
    with pytest.raises(DataError, match=r"failing\.parquet: the store does not answer \(Conn") as caught:
        decode(last)
    assert not isinstance(caught.value, ImageError)


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(path, columns, **options):
    parquet.write_table(pyarrow.table(columns), path, **options)
    return str(path)


def contents(paths):
    return [Path(path).read_bytes() for path in paths]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_manifest_names_images_beside_it(tmp_path, ending):
    if ending == ".csv":
        (tmp_path / "m.csv").write_text("image_path,label\na.png,good\n/b.png,bad\ns3://bucket/c.png,\n")
    else:
        table(tmp_path / "m.parquet", {"image_path": ["a.png", "/b.png", "s3://bucket/c.png"]})
    found = list(in_table(str(tmp_path / f"m{ending}")))
    assert found == [str(tmp_path / "a.png"), "/b.png", UrlImage("s3://bucket/c.png")]


@pytest.mark.parametrize("form", ["binary", "large_binary", "struct"])
def test_images_in_a_table(tmp_path, photos, form):
    raw = contents(photos)
    column = pyarrow.array(raw, pyarrow.large_binary() if form == "large_binary" else pyarrow.binary())
    if form == "struct":
        column = pyarrow.array([{"bytes": each, "path": "x"} for each in raw])
    path = table(tmp_path / "t.parquet", {"image": column, "n": range(len(raw))}, row_group_size=2)
    images = list(in_table(path))
    assert [image.path for image in images] == [f"{path}#{row}" for row in range(len(raw))]
    for image, photo in reversed(list(zip(images, photos, strict=True))):  # any order
        assert (decode(stored.from_json(stored.as_json(image))) == decode(photo)).all()


def test_images_in_a_folder_of_tables_keep_their_names(tmp_path, photos):
    folder = tmp_path / "t.parquet"
    folder.mkdir()
    for number, path in enumerate(photos):
        table(folder / f"{number}.parquet", {"image_path": [path], "image_bytes": contents([path])})
    images = list(in_table(str(folder)))
    assert [image.path for image in images] == photos
    assert images[1] == ParquetImage(photos[1], str(folder / "1.parquet"), 0)
    assert all((decode(image) == decode(path)).all() for image, path in zip(images, photos, strict=True))


def test_a_table_of_a_store_names_images_beside_it_or_contains_them(store, tmp_path, photos):
    store.put(table(tmp_path / "m.parquet", {"image_path": ["a.png"]}), "/bucket/m.parquet")
    store.put(table(tmp_path / "t.parquet", {"image": contents(photos[:1])}), "/bucket/t.parquet")
    (beside,) = in_table("memory://bucket/m.parquet")
    (inside,) = in_table("memory://bucket/t.parquet")
    assert (decode(beside) == decode(photos[0])).all()
    assert (decode(inside) == decode(photos[0])).all()


def test_a_pattern_over_tables_of_a_store(store, tmp_path, photos):
    for number, photo in enumerate(photos[:2]):
        store.put(table(tmp_path / "t.parquet", {"image": contents([photo])}), f"/bucket/{number}.parquet")
    images = list(in_table("memory://bucket/*.parquet"))
    assert [image.path for image in images] == ["memory:///bucket/0.parquet#0", "memory:///bucket/1.parquet#0"]
    for name in ("set.parquet/a.parquet", "set.parquet/notes.txt"):
        store.put(table(tmp_path / "t.parquet", {"image": contents(photos[2:3])}), f"/bucket/{name}")
    inside = "memory:///bucket/set.parquet/a.parquet#0"
    assert [image.path for image in in_table("memory://bucket/*.parquet")] == [*(each.path for each in images), inside]
    assert [image.path for image in in_table("memory://bucket/**/*.parquet")] == [
        *(each.path for each in images),
        inside,
    ]
    with pytest.raises(DataError, match=r"contains no \.parquet file\. .* or a pattern that matches"):
        in_table("memory://bucket/x*.parquet")


def test_a_row_without_an_image_is_an_unreadable_image(tmp_path, photos):
    first, second = in_table(table(tmp_path / "t.parquet", {"image": [None, *contents(photos[:1])]}))
    with pytest.raises(ImageError, match=r"t\.parquet#0: row 0 of .*t\.parquet has no content\. Fill it"):
        decode(first)
    assert decode(second).shape == (16, 24, 3)


def test_tables_that_cannot_be_used(tmp_path, store):
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(DataError, match=r"columns are n\. It needs image_path, or the contents of image files"):
        list(in_table(table(tmp_path / "n.parquet", {"n": [1]})))
    with pytest.raises(DataError, match=r"folder\.parquet contains no \.parquet file"):
        in_table(str(tmp_path / "folder.parquet"))
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(DataError, match=r"text\.parquet: cannot be read as Parquet"):
        list(in_table(str(tmp_path / "text.parquet")))
    with pytest.raises(DataError, match=r"a row has no image_path"):
        list(in_table(table(tmp_path / "e.parquet", {"image_path": [None]})))
    with pytest.raises(DataError, match=r"a manifest of a store must be \.parquet"):
        in_table("memory://bucket/m.csv")


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["path", "memory://bucket/results"])
def test_a_folder(store, tmp_path, where):
    folder = Folder(str(tmp_path / "a" / "results") if where == "path" else where)
    assert (folder.names(), folder.read("a")) == ([], None)
    folder.write("b", b"1")
    folder.write("a", b"2")
    folder.write("b", b"3")
    assert (folder.names(), folder.read("a"), folder.read("b")) == (["a", "b"], b"2", b"3")
    folder.remove("b")
    assert folder.names() == ["a"]
