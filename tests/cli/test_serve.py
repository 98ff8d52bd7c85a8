"""The command turns its options into a configured server; what a running server does is tested in tests/serve."""

import json
import shutil
import sys

import pytest

from .conftest import run

process = pytest.importorskip("normweave.serve.process", reason="needs pip install 'normweave[serve]'")

MIB = 2**20


@pytest.fixture
def runs(monkeypatch):
    """The servers that would run: their address, limits and certificate."""
    runs = []

    def fake(app, listening, *, config, certificate):
        runs.append((listening.getsockname(), config, certificate))

    monkeypatch.setattr(process, "run", fake)
    return runs


def serve(bundle, *options):
    return run("serve", bundle, "--port", 0, *options)


def test_limits_are_those_of_the_options(trained, runs, tmp_path):
    result = serve(
        *(trained.bundle, "--data", tmp_path / "data", "--max-waiting", 5, "--max-images", 9),
        *("--max-image-mib", 100, "--max-megapixels", 3, "--keep-days", 7, "--keep-gib", 2),
    )
    assert result.exit_code == 0, result.output
    ((address, config, certificate),) = runs
    assert address[0] == "127.0.0.1"
    assert (config.max_waiting, config.max_images) == (5, 5)  # a request never holds more than may wait
    assert (config.max_image_bytes, config.max_request_bytes) == (100 * MIB, 200 * MIB)
    assert (config.max_pixels, config.keep_days, config.keep_gib) == (3_000_000, 7, 2)
    assert certificate is None


def test_a_request_may_have_128_mib_even_if_images_are_small(trained, runs, tmp_path):
    serve(trained.bundle, "--data", tmp_path / "data", "--max-image-mib", 2)
    assert runs[0][1].max_request_bytes == 128 * MIB


def test_tokens_are_printed_by_the_first_start_only(trained, runs, tmp_path):
    def start(*options):
        result = serve(trained.bundle, "--data", tmp_path / "data", "--json", *options)
        assert result.exit_code == 0, result.output
        output = json.loads(result.stdout)
        assert output["url"] == f"http://127.0.0.1:{runs[-1][0][1]}"
        assert output["data"] == str(tmp_path / "data")
        return [token["role"] for token in output["tokens"]]

    assert sorted(start()) == ["engineer", "operator"]
    assert start() == []
    assert start("--new-token", "operator") == ["operator"]
    assert start("--no-token") == []


def test_inspections_are_stored_next_to_the_bundle_by_default(trained, runs, tmp_path):
    own = shutil.copytree(trained.bundle, tmp_path / "own.bundle")
    result = serve(own)
    assert result.stdout.count("printed only once") == 2
    assert f"Results are stored in {tmp_path / 'inspections'}" in result.stdout
    assert any((tmp_path / "inspections").iterdir())


def test_a_database_elsewhere_is_named(trained, runs, tmp_path):
    url = f"sqlite:///{tmp_path / 'own.db'}"
    result = serve(trained.bundle, "--data", tmp_path / "data", "--database", url)
    places = f"{url}, their images in {tmp_path / 'data' / 'files'}"
    assert f"Results are stored in {places}. Stop with Ctrl+C." in result.stdout, result.output


def test_two_databases_in_one_folder_are_refused(trained, runs, tmp_path):
    """Each would remove the images of the other."""
    data = tmp_path / "data"
    assert serve(trained.bundle, "--data", data).exit_code == 0
    result = serve(trained.bundle, "--data", data, "--database", f"sqlite:///{tmp_path / 'own.db'}")
    assert (result.exit_code, len(runs)) == (2, 1)
    assert f"The images in {data / 'files'} belong to another database" in result.output
    assert serve(trained.bundle, "--data", data).exit_code == 0


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_other_machines_without_tls_are_remarked(trained, runs, tmp_path, host, warned):
    result = serve(trained.bundle, "--data", tmp_path / "data", "--host", host)
    assert result.exit_code == 0, result.output
    assert ("sent unencrypted" in result.stderr) == warned


def test_nothing_is_written_if_an_option_is_wrong(trained, runs, tmp_path):
    result = serve(trained.bundle, "--data", tmp_path / "data", "--new-token", "boss")
    assert (result.exit_code, runs) == (2, [])
    assert "Unknown role 'boss'" in result.output
    assert not (tmp_path / "data").exists()


def test_without_its_libraries_the_installation_is_named(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "normweave.serve.store", None)
    result = serve(trained.bundle)
    assert result.exit_code == 2
    assert 'pip install "normweave[serve]"' in result.output


def test_a_library_serves_its_only_bundle_or_the_chosen_one(trained, runs, tmp_path):
    library = tmp_path / "bundles"
    shutil.copytree(trained.bundle, library / "first")
    result = run("serve", "--library", library, "--port", 0, "--shadow-share", 0.5)
    assert f"Serving {library} at" in result.stdout
    assert f"Results are stored in {tmp_path / 'inspections'}" in result.stdout
    assert runs[0][1].shadow_share == 0.5
    shutil.copytree(trained.bundle, library / "second")
    assert run("serve", "--library", library, "--port", 0).exit_code == 0  # it was active before
    result = run("serve", "--library", library, "--port", 0, "--name", "Press 5")
    assert (result.exit_code, "--active NAME. Usable: first, second" in result.output) == (2, True)
    assert run("serve", "--library", library, "--port", 0, "--name", "Press 5", "--active", "second").exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "Give one BUNDLE, or a folder of bundles"),
        (("--library", "nowhere"), "is not a folder"),
        (("--active", "first"), "Give one BUNDLE"),
        (("--library", ".", "--shadow-share", "2"), "shadow_share must be above 0 and at most 1"),
    ],
)
def test_a_library_or_one_bundle(options, words):
    result = run("serve", "--port", 0, *options)
    assert (result.exit_code, words in result.output) == (2, True), result.output


def test_active_needs_a_library(trained):
    assert "it needs --library" in serve(trained.bundle, "--active", "first").output


def test_the_line_is_read_before_anything_starts(trained, runs, tmp_path):
    line = tmp_path / "line.yaml"
    line.write_text("outputs:\n- {type: telepathy, name: a}\n")
    result = serve(trained.bundle, "--data", tmp_path / "data", "-c", line)
    assert (result.exit_code, runs) == (2, [])
    assert "Unknown outputs[0].type 'telepathy'" in result.output
    line.write_text(f"name: {'x' * 61}\n")
    assert (
        "line.yaml: name must have at most 60" in serve(trained.bundle, "--data", tmp_path / "data", "-c", line).output
    )
    line.write_text("parts: {views: [front, back]}\nview_bundles: {back: back.bundle}\n")
    result = serve(trained.bundle, "--data", tmp_path / "data", "-c", line)
    assert (result.exit_code, "view_bundles.back: back.bundle does not exist" in result.output) == (2, True)
    result = serve(trained.bundle, "--data", tmp_path / "data", "--view-bundle", "back=b")
    assert "--view-bundle needs the names of all views in parts.views" in " ".join(result.output.split())
    line.write_text("name: Press 5\n")
    assert serve(trained.bundle, "--data", tmp_path / "data", "-c", line).exit_code == 0
    assert len(runs) == 1
