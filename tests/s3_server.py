"""A server with the protocol of S3 for tests, that of moto, in a process of its own."""

import contextlib
import shutil
import socket
import subprocess
import time

import fsspec
import pytest

from required import absent

SECONDS = 30.0
"""Longest wait for the start."""


@contextlib.contextmanager
def s3_server():
    """Start a server without buckets, and yield its address; clients find it by the environment meanwhile."""
    if (program := shutil.which("moto_server")) is None:
        absent(
            "moto_server",
            "moto_server was not found: pip install 'moto[s3]' flask flask-cors, in an environment of its own",
        )
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with (
        subprocess.Popen([program, "--host", "127.0.0.1", "--port", str(port)], **quiet) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            end = time.monotonic() + SECONDS
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None, "moto_server has ended"
                    assert time.monotonic() < end, f"moto_server does not answer after {SECONDS:g} s"
                    time.sleep(0.1)
            url = f"http://127.0.0.1:{port}"
            patch.setenv("AWS_ENDPOINT_URL", url)
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            fsspec.get_filesystem_class("s3").clear_instance_cache()  # a client has the address of its start
            yield url
        finally:
            process.terminate()
