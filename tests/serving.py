"""A server process started by the command line, and clients for it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx2

START_SECONDS = 60
STOP_SECONDS = 60


class Server:
    """`normweave serve` on a free port; without a bundle, the options have a library.

    Attributes:
        url: its address.
        tokens: secret of each role, from its first start.
    """

    def __init__(self, bundle, data, *options, tokens=None):
        self._command = [
            sys.executable,
            "-m",
            "normweave",
            "serve",
            *([] if bundle is None else [str(bundle)]),
            "--data",
            str(data),
            "--port",
            "0",
            "--json",
            "--threads",
            "1",
            *map(str, options),
        ]
        self.data = Path(data)
        self.tokens = tokens or {}
        self.start()

    def start(self):
        self.data.mkdir(parents=True, exist_ok=True)
        self._log = (self.data / "server.log").open("ab")
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        output = self._process.stdout.readline()
        if not output.startswith("{") or "url" not in (first := json.loads(output)):
            self._process.kill()
            self.ended()
            raise AssertionError(f"The server did not start: {output} {self.log()}")
        self.url = first["url"]
        self.tokens |= {made["role"]: made["token"] for made in first["tokens"]}

    @property
    def pid(self):
        return self._process.pid

    def log(self):
        return (self.data / "server.log").read_text("utf-8")

    def client(self, role="operator", **given):
        """Return a client with the token of this role."""
        headers = {"Authorization": f"Bearer {self.tokens[role]}"} if role else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **given)

    def stop(self):
        """Stop it with SIGTERM, as systemd does, and return the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self.ended()

    def kill(self):
        """Stop it with SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        self.ended()

    def ended(self):
        """Wait for the end of the process and return the exit code."""
        try:
            return self._process.wait(STOP_SECONDS)
        finally:
            self._process.kill()
            self._process.stdout.close()
            self._log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            self.stop()
