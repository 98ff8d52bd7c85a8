"""Send images to the inspection server and act on the verdicts. The client needs only Python's standard library.

So that the example runs by itself, it also trains a small bundle and starts a server on this machine, in under a minute
on a CPU. To run a server in production: docs/how-to/deploy-on-a-line-pc.md.

python examples/02_send_an_image.py
"""

import io
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from PIL import Image

from normweave import Detector
from normweave.config import Config, PrepareConfig
from normweave.textiles import Textile, make_textures, render

CLOTH = Textile("plain", "ecru", "diffuse")
SIZE = (128, 128)
TIMEOUT_SECONDS = 30.0
"""How long to wait for a verdict. A part without a verdict is not good."""


def main() -> None:
    """Send a good image of cloth and one with a knot, both new."""
    with TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder))
        with served(bundle) as (url, token):
            for defect in (None, "knot"):
                name = f"{defect or 'good'}.png"
                answer = inspect(camera(defect), name=name, url=url, token=token)
                verdict = "no answer" if answer is None else answer["verdict"]
                # Only `normal` passes. A person checks the others: anomalous, unknown, unreadable or no answer.
                action = "pass" if verdict == "normal" else "stop"
                number = "-" if answer is None else answer["id"]
                print(f"{defect or 'good'}: {verdict} -> {action} (inspection {number})")


def inspect(image: bytes, *, name: str, url: str, token: str) -> dict | None:
    """Return the inspection of an image, or None after the timeout."""
    request = urllib.request.Request(
        f"{url}/v1/inspect?name={quote(name)}",
        data=image,
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/octet-stream"},
    )
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        try:
            with urllib.request.urlopen(request, timeout=left) as answer:
                return json.load(answer)["inspections"][0]
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:  # the request is wrong: sending it again does not help
                raise
            time.sleep(min(left, float(error.headers.get("Retry-After", 1))))
        except OSError:  # no connection
            time.sleep(min(left, 1.0))
    return None


def camera(defect: str | None) -> bytes:
    """Return an image of cloth as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(render(CLOTH, seed=12345, size=SIZE, defect=defect).image).save(content, "PNG")
    return content.getvalue()


def make_bundle(folder: Path) -> Path:
    """Train a bundle as in 01_first_detector.py."""
    config = replace(Config(), prepare=PrepareConfig(height=128, width=128))
    cloth = folder / "cloth"
    make_textures(cloth, size=SIZE, train_images=60, test_images=0, defect_images=0, seen=[CLOTH], unseen=[])
    return Detector.fit(cloth, config=config, cache=folder / "features").save(folder / "cloth.bundle")


@contextmanager
def served(bundle: Path) -> Iterator[tuple[str, str]]:
    """Start a server for a bundle and yield its URL and an operator's token, printed only at its first start."""
    call = [sys.executable, "-m", "normweave", "serve", str(bundle), "--port", "0", "--json"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as server:
        try:
            started = json.loads(server.stdout.readline())
            tokens = {token["role"]: token["token"] for token in started["tokens"]}
            yield started["url"], tokens["operator"]
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
