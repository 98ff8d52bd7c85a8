"""Work runs in a process of its own; what is wrong with the cluster is an error with a cure."""

import importlib.util
import socket
import subprocess
import sys

import pytest

from normweave.bridges import ray as session
from normweave.errors import ConfigError, MissingError


@pytest.mark.parametrize(
    "address", ["", "here", "host:", ":6379", "http://host:8265", "host:70000", "ray://host:10001"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match=r"--ray must be local, auto or the host:port of a head node, such as 10\.0"):
        session.check_address(address)


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.5:6379", "head.factory:6379"])
def test_addresses(address):
    session.check_address(address)


def never(progress):
    raise AssertionError


def test_no_cluster_answers(monkeypatch):
    """It is known before a process imports Ray, which takes long."""
    monkeypatch.setattr(session.multiprocessing, "get_context", never)
    with pytest.raises(MissingError, match=r"No Ray cluster answers at 127\.0\.0\.1:1 .*`ray start --head"):
        session.run("127.0.0.1:1", never)


@pytest.mark.slow
def test_another_service_at_the_address_is_no_cluster(monkeypatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "2")
    with socket.create_server(("127.0.0.1", 0)) as service:  # accepts connections and never answers
        address = f"127.0.0.1:{service.getsockname()[1]}"
        with pytest.raises(MissingError, match=r"No Ray cluster answers at 127.* RAY_AUTH_MODE, the token and the"):
            session.run(address, never)


def test_ray_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"--ray needs Ray, which is not installed: pip install 'norm"):
        session.run("local", never)


def test_a_task_that_no_machine_can_run_is_refused():
    machines = [{"CPU": 2.0}, {"CPU": 1.0}]
    session.check_resources(machines, threads=2, device="auto")
    session.check_resources([{"memory": 1.0}], threads=2, device="cuda")  # none with processors has joined yet
    session.check_resources([*machines, {"CPU": 1.0, "GPU": 1.0}], threads=1, device="cuda:0")
    with pytest.raises(ConfigError, match=r"must be at most .* of the cluster, 2, got 3\."):
        session.check_resources(machines, threads=3)
    with pytest.raises(MissingError, match=r"--device cuda:0 .* no machine of the cluster has a graphics processor\."):
        session.check_resources(machines, threads=1, device="cuda:0")


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["benchmark", "--help"]])
def test_nothing_imports_ray_unless_asked(arguments):
    code = (
        "import sys\nfrom normweave.cli import main\n"
        f"sys.argv = ['normweave', *{arguments!r}]\n"
        "try:\n    main()\nfinally:\n    assert not {'ray', 'fsspec', 's3fs'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "AssertionError" not in done.stderr
