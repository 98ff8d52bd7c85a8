"""Contract of every source: each module of `normweave.serve.sources` is found here, and has a test of its name too."""

import threading
from contextlib import closing

import pytest

from feeders import free_port
from normweave.serve import line_config
from normweave.serve.source import SourceConfig, frames

SETTINGS = {
    "camera": "url: rtsp://127.0.0.1:{port}/line",
    "genicam": "producer: missing-{port}.cti",
    "video": "path: missing-{port}.mkv",
    "mqtt": "broker: {{host: 127.0.0.1, port: {port}, topic: a}}",
    "http": "url: 'http://127.0.0.1:{port}/a.jpg'",
}
"""What a source of each type needs besides type and name; nothing listens there."""


@pytest.fixture(params=line_config.types("sources"))
def config(request, tmp_path):
    path = tmp_path / "line.yaml"
    settings = SETTINGS[request.param].format(port=free_port())
    trigger = "trigger: {type: still, frames: 3}"
    path.write_text(f"sources:\n- type: {request.param}\n  name: top\n  {settings}\n  {trigger}\n")
    (config,) = line_config.read(path).sources
    return config


def test_its_settings_are_read_from_line_yaml(config):
    assert isinstance(config, SourceConfig)
    assert (config.name, config.trigger.frames) == ("top", 3)


def test_without_its_counterpart_it_raises_a_reason_and_leaves_no_thread(config):
    before = threading.active_count()
    with pytest.raises(Exception, match=r"[A-Za-z ]{10}") as caught, closing(frames(config, max_bytes=1000)) as found:
        next(found)
    assert "Traceback" not in str(caught.value)
    assert threading.active_count() == before
