"""Each output is tested against its counterpart; what is wrong is one line with the cure."""

import dataclasses
from pathlib import Path

import pytest

from counterparts import Mosquitto, PlcServer, Receiver, make
from feeders import Snapshots
from normweave.serve.line_check import check_bundles, check_outputs, check_sources
from normweave.serve.line_config import LineConfig
from normweave.serve.sources import http, video
from ports import free_port

COUNTERPARTS = [Mosquitto, PlcServer, Receiver]


@pytest.fixture(params=COUNTERPARTS, ids=lambda one: one.type)
def counterpart(request, tmp_path):
    made = request.param(tmp_path)
    made.listen()
    yield made
    made.close()


def test_a_working_counterpart_and_one_of_each_fault(counterpart):
    config = LineConfig(outputs=(counterpart.output(timeout_seconds=0.6).config,))
    (found,) = check_outputs(config)
    assert (found.type, found.error) == (counterpart.type, None)
    for mode in ("silent", "garbage"):
        counterpart.proxy.switch(mode)
        (found,) = check_outputs(config)
        assert " Check " in found.error, mode
        assert "\n" not in found.error
    counterpart.proxy.stop()
    (found,) = check_outputs(config)
    assert " Check " in found.error


def test_bundles_of_views_are_loaded(bundle):
    works, missing = check_bundles(LineConfig(view_bundles={"front": Path(bundle), "back": Path("back.bundle")}))
    assert (works.name, works.type, works.error) == ("view_bundles.front", "bundle", None)
    assert works.text.startswith("works, ")
    assert missing.name == "view_bundles.back"
    assert "back.bundle does not exist" in missing.error


def test_outputs_are_tested_in_their_order(tmp_path):
    receiver = Receiver(tmp_path)
    receiver.listen()
    wrong = receiver.output(name="wrong", timeout_seconds=1.0).config
    receiver.statuses = [404]
    found = check_outputs(LineConfig(outputs=(wrong,)))
    assert [(one.name, "status 404" in one.error) for one in found] == [("wrong", True)]
    assert check_outputs(LineConfig()) == []
    unset = receiver.output(name="unset").config
    unset = dataclasses.replace(unset, secret_env="NORMWEAVE_NOT_SET", secret_file="")
    first, second = check_outputs(LineConfig(outputs=(unset, receiver.output(name="works").config)))
    assert ("NORMWEAVE_NOT_SET, named by secret_env, is not set" in first.error, second.error) == (True, None)
    receiver.close()


def test_the_libraries_log_nothing(caplog):
    plc = make("modbus", role="client", host="127.0.0.1", port=free_port())
    (found,) = check_outputs(LineConfig(outputs=(plc.config,)))
    assert "Check host, port" in found.error
    assert caplog.text == ""


def test_each_source_is_tested_and_what_came_or_is_wrong_is_told(tmp_path, photos):
    with Snapshots() as snapshots:
        snapshots.content = Path(photos[0]).read_bytes()
        working = http.Config(type="http", name="top", url=snapshots.url)
        missing = video.Config(type="video", name="film", path=str(tmp_path / "missing.mkv"))
        top, film = check_sources(LineConfig(sources=(working, missing)), seconds=1.0)
    assert (top.name, top.type, top.error) == ("top", "http", None)
    assert top.text.startswith("first image after")
    assert "There is no video file" in film.error
    assert check_sources(LineConfig()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries of asyncua
def test_an_opcua_server_has_more_time_to_start_than_to_answer(monkeypatch):
    monkeypatch.setenv("SCADA", "a password")
    login = {"username": "line", "password_env": "SCADA", "security": "none"}
    output = make("opcua", host="127.0.0.1", port=free_port(), timeout_seconds=0.01, **login)
    (found,) = check_outputs(LineConfig(outputs=(output.config,)))
    assert found.error is None
