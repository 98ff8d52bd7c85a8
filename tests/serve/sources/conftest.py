"""Runners of real sources with a running service."""

import pytest

from feeders import Mosquitto, RtspServer, Snapshots
from normweave.serve.source import SourceRunner


@pytest.fixture
def run(service):
    """Function that starts a runner; all are stopped at the end."""
    started = []

    def run(config):
        started.append(SourceRunner(config, service))
        started[-1].start()
        return started[-1]

    yield run
    for runner in started:
        runner.stop()


@pytest.fixture
def mosquitto(tmp_path):
    with Mosquitto(tmp_path) as broker:
        yield broker


@pytest.fixture
def rtsp():
    with RtspServer() as server:
        yield server


@pytest.fixture
def snapshots():
    with Snapshots() as server:
        yield server


@pytest.fixture
def contents(photos):
    """Different image files."""
    found = []
    for path in photos[:6]:
        with open(path, "rb") as file:
            found.append(file.read())
    return found
