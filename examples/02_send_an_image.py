"""A program that shows parts to a server and acts on what it says; it needs nothing but Python's standard library.

What comes before, a small bundle and a server on this machine, is there so that this runs by itself, in under a minute
on a processor. On a line both run already: docs/how-to/deploy-on-a-line-pc.md.

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
PATIENCE_SECONDS = 30.0
"""What the line can wait for a word on a part; without one the part is not good."""


def main() -> None:
    """Show a good piece of cloth and one with a knot; neither was in the training."""
    with TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder))
        with served(bundle) as (url, token):
            for defect in (None, "knot"):
                name = f"{defect or 'good'}.png"
                answer = inspect(camera(defect), name=name, url=url, token=token)
                verdict = "no answer" if answer is None else answer["verdict"]
                # Only normal passes: what is unknown, could not be read or had no answer is for a person to see.
                gate = "pass" if verdict == "normal" else "stop"
                number = "-" if answer is None else answer["id"]
                print(f"{defect or 'good'}: {verdict}, so {gate}; kept as inspection {number}")


def inspect(image: bytes, *, name: str, url: str, token: str) -> dict | None:
    """What the server says of an image; None: nothing in time."""
    request = urllib.request.Request(
        f"{url}/v1/inspect?name={quote(name)}",
        data=image,
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/octet-stream"},
    )
    until = time.monotonic() + PATIENCE_SECONDS
    while (left := until - time.monotonic()) > 0:
        try:
            with urllib.request.urlopen(request, timeout=left) as answer:
                return json.load(answer)["inspections"][0]
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:  # this call is wrong and stays wrong
                raise
            time.sleep(min(left, float(error.headers.get("Retry-After", 1))))
        except OSError:  # no connection, or it was lost
            time.sleep(min(left, 1.0))
    return None


def camera(defect: str | None) -> bytes:
    """A picture of a piece of cloth, as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(render(CLOTH, seed=12345, size=SIZE, defect=defect).image).save(content, "PNG")
    return content.getvalue()


def make_bundle(folder: Path) -> Path:
    """What training leaves; see 01_first_detector.py."""
    config = replace(Config(), prepare=PrepareConfig(height=128, width=128))
    cloth = folder / "cloth"
    make_textures(cloth, size=SIZE, train_images=60, test_images=0, defect_images=0, seen=[CLOTH], unseen=[])
    return Detector.fit(cloth, config=config, use_cache=False).save(folder / "cloth.bundle")


@contextmanager
def served(bundle: Path) -> Iterator[tuple[str, str]]:
    """A server of this bundle: its address, and an operator's token, which it shows at its first start only."""
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
