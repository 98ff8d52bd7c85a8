"""Snapshots over HTTP, from a server of the tests."""

import pytest

from feeders import Snapshots, until
from inspections import ALL
from normweave.errors import ConfigError
from normweave.serve.source import SourceRunner, check
from normweave.serve.sources.http import Config


def source(url, **given):
    settings = {"poll_seconds": 0.02, "timeout_seconds": 1.0, "retry_seconds": 0.05} | given
    return Config(type="http", name="top", url=url, **settings)


def test_a_changed_image_is_inspected_once_also_after_the_server_was_dead(run, snapshots, contents, service):
    snapshots.content, snapshots.etag = contents[0], '"1"'
    runner = run(source(snapshots.url))
    until(lambda: runner.counts["inspected"] == 1)
    asked = len(snapshots.requests)
    until(lambda: len(snapshots.requests) > asked + 3)
    assert runner.counts["inspected"] == 1
    assert snapshots.requests[-1]["If-None-Match"] == '"1"'
    snapshots.content, snapshots.etag = contents[1], None
    until(lambda: runner.counts["inspected"] == 2)
    asked = len(snapshots.requests)
    until(lambda: len(snapshots.requests) > asked + 3)
    assert runner.counts["inspected"] == 2  # the same content without an ETag is the same image
    snapshots.stop()
    until(lambda: runner.state.status == "no images")
    assert snapshots.url in runner.state.text
    snapshots.content = contents[2]
    snapshots.start()
    until(lambda: runner.counts["inspected"] == 3)
    assert {one.source for one in service.store.inspections(ALL, limit=9)} == {"http"}
    runner.stop()
    again = run(source(snapshots.url))  # a restart of ours
    until(lambda: again.counts["inspected"] == 1)
    assert check(source(snapshots.url)).startswith("first image after")


def test_garbage_is_inspected_as_not_readable_and_the_source_is_amber(run, snapshots, service, contents):
    snapshots.content = b"no image"
    runner = run(source(snapshots.url))
    until(lambda: runner.counts["inspected"] == 1)
    assert service.store.inspections(ALL, limit=1)[0].outcome.error is not None
    snapshots.content = b"no image either"
    until(lambda: runner.counts["inspected"] == 2)
    status, text = until(lambda: runner.state)
    assert (status, "The last 2 images could not be read: " in text) == ("attention", True)
    with pytest.raises(
        OSError, match=r"What came is no image that can be read: .*Check that the source sends image files"
    ):
        check(source(snapshots.url))
    snapshots.content = contents[0]
    until(lambda: runner.state.status == "running")


def test_slow_and_large_answers_and_errors_are_red(start, snapshots, contents):
    service = start(max_image_bytes=50_000)
    snapshots.content, snapshots.pause = b"x" * 10_000, 0.2
    runner = SourceRunner(source(snapshots.url, timeout_seconds=0.4), service)
    runner.start()
    until(lambda: "has not sent its image in 0.4 s" in runner.state.text)
    snapshots.pause, snapshots.content = 0.0, b"x" * 60_000
    until(lambda: "more than 50,000 bytes" in runner.state.text)
    snapshots.status = 503
    until(lambda: "answers 503" in runner.state.text)
    assert runner.state.status == "no images"
    snapshots.status, snapshots.content = 200, contents[0]
    until(lambda: runner.counts["inspected"] == 1)
    runner.stop()


def test_redirects_stay_on_the_host_and_the_password_too(run, snapshots, contents, monkeypatch):
    monkeypatch.setenv("NORMWEAVE_TEST_PASSWORD", "secret word")
    with Snapshots() as other:
        other.content = contents[0]
        snapshots.redirect = other.url
        runner = run(source(snapshots.url, username="ada", password_env="NORMWEAVE_TEST_PASSWORD"))
        until(lambda: "redirects to another host" in runner.state.text)
        assert other.requests == []
    assert snapshots.requests[0]["Authorization"].startswith("Basic ")


@pytest.mark.parametrize("url", ["ftp://a/b", "http://ada:secret@a/b", "a.jpg"])
def test_wrong_addresses(url):
    with pytest.raises(ConfigError, match="url must"):
        source(url)
