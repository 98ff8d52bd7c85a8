"""Memory of a server over many inspections, with parts, reviews, an output and a reader of events: it levels off.

    python perf/server_memory.py BUNDLE IMAGE [COUNT] [BUNDLE_OF_A_VIEW]

Two clients send two views of a part in each request, review the first one of them, and read the events; a webhook takes
all results. Prints the memory of the server process after each tenth of the images. With a second bundle, it inspects
the second view.
"""

import contextlib
import http.server
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil

COUNT = 4000
STEPS = 10
CLIENTS = 2
LIMIT_MIB = 20
"""Growth of the memory in the second half that is refused."""
SECRET = "whsec_" + "A" * 32


class Receiver(http.server.BaseHTTPRequestHandler):
    """Takes each message."""

    taken = 0

    def do_POST(self):
        """Answer 204."""
        self.rfile.read(int(self.headers["content-length"]))
        Receiver.taken += 1
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        """Print nothing."""


def main(bundle: str, image: str, count: int = COUNT, of_view: str = "") -> None:
    receiver = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        line = Path(folder) / "line.yaml"
        url = f"http://127.0.0.1:{receiver.server_port}/"
        output = {
            "type": "webhook",
            "name": "mes",
            "url": url,
            "secret_env": "MES",
            "deliver": ["inspections", "parts"],
        }
        bundles = {"back": os.path.abspath(of_view)} if of_view else {}
        line.write_text(json.dumps({"parts": {"views": 2}, "view_bundles": bundles, "outputs": [output]}))
        options = ["--data", f"{folder}/data", "--port", "0", "--json", "--threads", "1", "-c", str(line)]
        command = [sys.executable, "-m", "normweave", "serve", bundle, *options]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "MES": SECRET})
        try:
            assert server.stdout is not None
            started = json.loads(server.stdout.readline())
            memory = measure(started, Path(image).read_bytes(), psutil.Process(server.pid), count)
        finally:
            server.terminate()
            server.wait(60)
    print(f"{count:,} images, {Receiver.taken:,} messages delivered")
    assert Receiver.taken == count * 3 // 2, "a message was lost, or came twice"
    assert memory[-1] - memory[len(memory) // 2] < LIMIT_MIB, f"memory grows: {memory}"


def measure(started: dict, image: bytes, process: psutil.Process, count: int) -> list[float]:
    """Send the images, and return the memory after each part of them in MiB."""
    tokens = {one["role"]: one["token"] for one in started["tokens"]}
    headers = {"Authorization": f"Bearer {tokens['engineer']}"}
    numbers, memory = itertools.count(), list[float]()
    with httpx2.Client(base_url=started["url"], headers=headers, timeout=120, trust_env=False) as client:

        def send(_: int) -> None:
            number = next(numbers)
            files = [("images", ("part.png", image + number.to_bytes(8, "big") + view)) for view in (b"f", b"b")]
            given = {"part": str(number), "view": ["front", "back"]}
            answer = client.post("/v1/inspect", files=files, data=given)
            assert answer.status_code == 200, answer.text
            first = answer.json()["inspections"][0]["id"]
            decision = {"decision": "accept", "comment": "seen"}
            assert client.post(f"/v1/inspections/{first}/review", json=decision).status_code == 200

        def follow() -> None:
            with contextlib.suppress(httpx2.HTTPError), client.stream("GET", "/v1/inspections/events") as stream:
                for _ in stream.iter_lines():  # until the client is closed
                    pass

        threading.Thread(target=follow, daemon=True).start()
        with ThreadPoolExecutor(CLIENTS) as pool:
            for step in range(1, STEPS + 1):
                list(pool.map(send, range(count // 2 // STEPS)))
                memory.append(process.memory_info().rss / 2**20)
                print(f"{step * count // STEPS:,} images: {memory[-1]:.0f} MiB", flush=True)
    return memory


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]), *sys.argv[4:5])
