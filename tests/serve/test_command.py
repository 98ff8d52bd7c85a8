"""The command `normweave serve`."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from normweave.cli import app
from normweave.detector import Detector
from serving import Server


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    with Server(bundle, tmp_path_factory.mktemp("serve") / "data") as server:
        yield server


def test_only_the_first_start_shows_the_tokens(bundle, tmp_path):
    with Server(bundle, tmp_path / "data") as first:
        assert set(first.tokens) == {"engineer", "operator"}
    with Server(bundle, tmp_path / "data", tokens=dict(first.tokens)) as again:
        assert again.tokens == first.tokens
        with again.client("engineer") as client:
            assert client.get("/v1/tokens").status_code == 200
    with Server(bundle, tmp_path / "data", "--new-token", "operator", tokens=dict(first.tokens)) as more:
        assert more.tokens["operator"] != first.tokens["operator"]
        for tokens in (first.tokens, more.tokens):  # the old tokens stay valid
            more.tokens = tokens
            with more.client("operator") as client:
                assert client.get("/v1/model").status_code == 200


def test_it_gives_the_results_of_predict(server, bundle, photos):
    with server.client() as client:
        for path, expected in zip(photos[:4], Detector.load(bundle).score(photos[:4]), strict=True):
            answer = client.post("/v1/inspect", files={"images": Path(path).read_bytes()})
            (one,) = answer.json()["inspections"]
            assert one["verdict"] == expected.verdict
            assert one["pred_score"] == pytest.approx(expected.pred_score, rel=1e-4)


def test_it_listens_on_this_machine_only(server):
    assert server.url.startswith("http://127.0.0.1:")


def test_a_person_logs_in_and_gets_the_page(server):
    with server.client(role=None, follow_redirects=True) as browser:
        page = browser.get("/", headers={"Accept": "text/html"})
        assert (page.status_code, "Log in" in page.text) == (401, True)
        page = browser.post("/login", data={"token": server.tokens["operator"]})
        assert (page.status_code, "normweave" in page.text) == (200, True)
        assert browser.get("/history.csv").status_code == 200
    with server.client(role=None) as browser:
        for path in ("/history.csv", "/review", "/_nicegui/client/x/upload/1"):
            assert browser.get(path).status_code == 401, path


def test_it_has_no_torch(server, bundle, tmp_path):
    code = (
        "import sys, threading, time, os, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "def stop():\n"
        "    while signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:\n"  # until the server runs
        "        time.sleep(0.2)\n"
        "    time.sleep(3)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread(target=stop, daemon=True).start()\n"
        "import atexit; atexit.register(lambda: print('torch' in sys.modules, 'pandas' in sys.modules))\n"
        "from normweave.cli import main\n"
        f"sys.argv = ['normweave', 'serve', {str(bundle)!r}, '--port', '0', '--data', {str(tmp_path / 'd')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip().endswith("False False"), done.stderr


def test_stopping_answers_open_requests(bundle, photos, tmp_path):
    server = Server(bundle, tmp_path / "data")
    with server.client() as client:
        content = Path(photos[0]).read_bytes()
        files = [("images", (str(number), content)) for number in range(32)]
        request = client.build_request("POST", "/v1/inspect", files=files)
        answers = []
        sending = threading.Thread(target=lambda: answers.append(client.send(request)))
        sending.start()
        with server.client() as other:
            while not other.get("/v1/model").json()["waiting"]:
                time.sleep(0.005)
        os.kill(server.pid, signal.SIGTERM)
        sending.join()
        assert [one["error"] for one in answers[0].json()["inspections"]] == [None] * 32
    assert server.ended() == 0


def test_two_servers_do_not_share_a_folder(server, bundle):
    result = run("serve", bundle, "--port", "0", "--data", server.data)
    assert result.exit_code == 2
    assert "Another server stores its images in" in result.output


def test_a_taken_port(server, bundle, tmp_path):
    result = run("serve", bundle, "--port", server.url.rpartition(":")[2], "--data", tmp_path)
    assert result.exit_code == 2
    assert "Choose another --port" in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--no-token", "--host", "0.0.0.0"),
            "--no-token gives everyone who can connect to 0.0.0.0 all rights",
        ),
        (("--tls-key", "x.pem"), "TLS needs both"),
        (("--watch", "nowhere"), "The folder nowhere does not exist"),
        (("--new-token", "boss"), "Unknown role 'boss'"),
        (("--name", "x" * 61), "--name must have at most 60 printable characters"),
        (("--name", "a\nb"), "--name must have at most 60 printable characters"),
        (("--host", "256.1.1.1"), "Cannot listen on 256.1.1.1"),
        (("--database", "mysql://x"), "mysql"),
        (("--images", "s3://line"), "which need --database postgresql://…; got no --database. One server"),
        (("--images", "images", "--database", "sqlite:///x.db"), "got another database"),
        (("--view-bundle", "back"), "--view-bundle must be VIEW=BUNDLE, each view once, got 'back'"),
        (("--max-megapixels", "0"), "max_pixels must be above 0"),
    ],
)
def test_invalid_options(bundle, tmp_path, options, words):
    result = run("serve", bundle, "--port", "0", "--data", tmp_path / "data", *options)
    assert (result.exit_code, words in result.output) == (2, True), result.output


def test_the_name_of_the_line(bundle, photos, tmp_path):
    with Server(bundle, tmp_path / "data", "--name", " Press <4> ") as server:
        with server.client() as client:
            sent = client.post("/v1/inspect", files={"images": Path(photos[0]).read_bytes()}).json()
            assert sent["inspections"][0]["line"] == "Press <4>"
            assert len(client.get("/v1/inspections", params={"line": "Press <4>"}).json()["inspections"]) == 1
            assert client.get("/v1/inspections", params={"line": "Press 5"}).json()["inspections"] == []
            assert client.get("/v1/model").json()["line"] == "Press <4>"
            assert 'line="Press <4>"' in client.get("/metrics").text
        with server.client("engineer") as client:
            assert {one["line"] for one in client.get("/v1/audit").json()["entries"]} == {"Press <4>"}
        with server.client(role=None, follow_redirects=True) as browser:
            page = browser.post("/login", data={"token": server.tokens["operator"]})
            assert [name.startswith("normweave_Press_4_") for name in browser.cookies] == [True]
            for path in ("/", "/review", "/model", "/history"):
                page = browser.get(path).text
                assert "Press &lt;4&gt; · normweave</title>" in page
                assert page.count("Press") > 1


def test_without_tokens_and_with_bundles_of_views(bundle, library_folder, photos, tmp_path):
    line, new = tmp_path / "line.yaml", library_folder / "new"
    line.write_text(f"parts: {{views: [front, back, top]}}\nview_bundles: {{back: {new}, top: nowhere}}")
    options = ("--no-token", "-c", line, "--view-bundle", f"top={new}")
    with Server(bundle, tmp_path / "data", *options) as server, server.client(role=None) as client:
        files = [("images", Path(photo).read_bytes()) for photo in photos[:3]]
        sent = client.post("/v1/inspect", files=files, data={"part": "17", "view": ["front", "back", "top"]}).json()
        model = client.get("/v1/model").json()
        own = model["view_bundles"]
        assert [one["bundle_hash"] for one in sent["inspections"]] == [model["bundle_hash"], own["back"], own["top"]]
        assert own["back"] == own["top"] != model["bundle_hash"]
        assert server.tokens == {}
        assert client.get("/v1/model/rates").status_code == 200


def test_a_folder_of_a_camera(bundle, photos, tmp_path):
    camera = tmp_path / "camera"
    camera.mkdir()
    (camera / "part.png").write_bytes(Path(photos[0]).read_bytes())
    with Server(bundle, tmp_path / "data", "--watch", camera) as server, server.client() as client:
        end = time.monotonic() + 30
        while not (found := client.get("/v1/inspections").json()["inspections"]):
            assert time.monotonic() < end
            time.sleep(0.1)
    assert (found[0]["name"], found[0]["source"]) == ("part.png", "folder")


def test_over_tls(bundle, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 1 -subj /CN=localhost "
        "-addext subjectAltName=IP:127.0.0.1",
        shell=True,
        check=True,
        capture_output=True,
    )
    options = ("--tls-certificate", certificate, "--tls-key", key)
    with Server(bundle, tmp_path / "data", *options) as server:
        assert server.url.startswith("https://")
        trust = ssl.create_default_context(cafile=certificate)
        with httpx2.Client(base_url=server.url, verify=trust, trust_env=False) as client:
            assert client.get("/healthz").status_code == 200
            cookie = client.post("/login", data={"token": server.tokens["operator"]}).headers["set-cookie"]
            assert "; Secure" in cookie


def test_slow_and_incomplete_requests_do_not_block_others(server):
    host, port = server.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(50)]
    for number, one in enumerate(idle):
        one.sendall(b"POST /v1/inspect HTTP/1.1\r\nHost: x\r\n"[: 5 + number])
    with server.client() as client:
        assert client.get("/readyz").json() == {"status": "ok"}
    for one in idle:
        one.close()
