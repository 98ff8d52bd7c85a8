"""Cameras over RTSP, with GStreamer's server."""

import socket
import threading

import pytest

from feeders import until
from inspections import ALL
from normweave.errors import ConfigError
from normweave.serve import stream
from normweave.serve.source import check
from normweave.serve.sources.camera import Config
from normweave.serve.trigger import SecondsTrigger
from ports import free_port


def camera(url, **given):
    return Config(type="camera", name="top", url=url, retry_seconds=0.05, **given)


def test_frames_come_until_the_camera_is_dead_and_again_when_it_is_back(run, rtsp, service):
    runner = run(camera(rtsp.url))
    until(lambda: runner.counts["inspected"] >= 2)
    assert runner.state.status == "running"
    (newest,) = service.store.inspections(ALL, limit=1)
    assert (newest.outcome.error, newest.outcome.height, newest.outcome.width) == (None, 64, 96)
    assert (newest.source, newest.image.image_type) == ("camera", "image/png")
    rtsp.stop()
    until(lambda: rtsp.url in runner.state.text)
    assert runner.state.status == "no images"
    before = runner.counts["inspected"]
    rtsp.start()
    until(lambda: runner.counts["inspected"] > before)
    runner.stop()
    again = run(camera(rtsp.url, trigger=SecondsTrigger(type="seconds", seconds=0.2)))  # a restart of ours
    until(lambda: again.counts["inspected"] >= 2)
    assert check(camera(rtsp.url)).startswith("first image of 96 x 64 pixels after")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n\r\ngarbage" * 100, b""], ids=["garbage", "slow"])
def test_what_is_no_stream_is_red_with_its_reason(run, monkeypatch, answer):
    monkeypatch.setattr(stream, "OPEN_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", free_port())) as listening:

        def serve():
            connections = []
            while True:
                try:
                    connections.append(listening.accept()[0])
                    connections[-1].sendall(answer)
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        url = f"rtsp://127.0.0.1:{listening.getsockname()[1]}/line"
        runner = run(camera(url, username="ada", password_env="NORMWEAVE_TEST_PASSWORD"))
        monkeypatch.setenv("NORMWEAVE_TEST_PASSWORD", "secret word")
        until(lambda: f"{url} cannot be read" in runner.state.text)
        assert runner.state.status == "no images"
        assert "secret" not in runner.state.text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give one of them"),
        ({"url": "rtsp://a/b", "device": "/dev/video0"}, "give one of them"),
        ({"url": "file:///etc/passwd"}, "must begin with"),
        ({"url": "rtsp://ada:secret@a/b"}, "must have no password"),
        ({"device": "/etc/passwd"}, "device"),
    ],
)
def test_wrong_settings(given, words):
    with pytest.raises(ConfigError, match=words):
        Config(type="camera", name="top", **given)


def test_a_usb_camera_that_is_not_there_is_red(run):
    runner = run(Config(type="camera", name="usb", device="/dev/video99", size="640x480", retry_seconds=0.05))
    until(lambda: "/dev/video99 cannot be read" in runner.state.text)
