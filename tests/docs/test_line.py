"""The pages on the line PC are correct: unit and container start a server, and the requests get a response."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.main import get_command

from normweave.cli import app
from normweave.serve.config import ServeConfig
from normweave.serve.metrics import Metrics
from normweave.textiles import Textile, render

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "normweave.service"
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text("utf-8")
DEPLOY = (ROOT / "docs" / "how-to" / "deploy-on-a-line-pc.md").read_text("utf-8")
CALLED = ["deploy-on-a-line-pc", "call-from-a-plc-or-a-script", "serve-and-review"]


def options(arguments):
    """Return the parameters of a `normweave serve` command."""
    name, command, *rest = arguments
    assert Path(name).name == "normweave"
    assert command == "serve"
    return get_command(app).commands["serve"].make_context("serve", rest).params


def service():
    """Return the section [Service] of the unit; of a repeated name, the last value."""
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    unit.optionxform = str
    unit.read(UNIT, "utf-8")
    return unit["Service"]


def instruction(name):
    """Return the arguments of the Dockerfile's ENTRYPOINT or CMD."""
    return json.loads(re.search(rf"^ *{name} (\[.*\])$", DOCKERFILE, flags=re.MULTILINE)[1])


# ── the unit ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_unit_starts_a_server_in_a_writable_folder():
    started = options(shlex.split(service()["ExecStart"]))
    assert started["data"] == Path("/var/lib") / service()["StateDirectory"]
    assert started["host"] == "127.0.0.1"
    assert not started["no_token"]


def test_the_unit_waits_longer_than_the_server():
    assert int(service()["TimeoutStopSec"]) >= 2 * ServeConfig().answer_seconds
    assert int(service()["LimitNOFILE"]) > 2 * ServeConfig().max_clients


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path):
    unit = tmp_path / "normweave.service"
    text = UNIT.read_text("utf-8")
    unit.write_text(re.sub(r"(?<=ExecStart=)\S+", sys.executable, text), "utf-8")
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "normweave" in line] == []


def test_every_start_by_hand_is_a_valid_command():
    calls = re.findall(r"^.*\S/(normweave serve .*)$", DEPLOY, flags=re.MULTILINE)
    assert calls
    for call in calls:
        assert options(shlex.split(call))


# ── the container ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_container_starts_a_server_and_checks_its_health():
    run = re.search(r"docker run .*?\n(?=docker|```)", DEPLOY, flags=re.DOTALL)[0]
    arguments = shlex.split(run.replace("\\\n", " "))
    image = arguments.index("normweave", arguments.index("--publish"))
    started = options(instruction("ENTRYPOINT") + arguments[image + 1 :])
    assert started["data"] == Path("/data")
    assert (str(started["bundle"]), started["host"]) == ("/bundle", "0.0.0.0")
    assert started["keep_days"]
    assert not started["no_token"]
    assert f"127.0.0.1:{started['port']}/readyz" in instruction("CMD")[-1]


def test_hadolint_accepts_every_dockerfile(tmp_path):
    found = [path for pattern in ("*Dockerfile*", "*Containerfile*") for path in ROOT.rglob(pattern)]
    found = [path for path in found if path.is_file() and not {".venv", ".git"} & set(path.relative_to(ROOT).parts)]
    assert ROOT / "deploy" / "Dockerfile" in found
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", *found], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM python\n")
    done = subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert "DL3006" in done.stdout  # what it refuses is noticed here


def test_the_health_check_fails_without_a_server(served):
    program, flag, code = instruction("CMD")
    assert program == "python"
    for url, code_of in ((served["NORMWEAVE_URL"], 0), ("http://127.0.0.1:9", 1)):
        call = [sys.executable, flag, code.replace("http://127.0.0.1:8080", url)]
        assert subprocess.run(call, capture_output=True, check=False).returncode == code_of


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("name", [*CALLED, "../threat-model"])
def test_requests_get_a_response(name, served, tmp_path):
    """Run the blocks that begin with a request in their order; `part.png` is an image."""
    text = (ROOT / "docs" / "how-to" / f"{name}.md").read_text("utf-8")
    blocks = [
        block for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) if block.startswith(("curl", "printf"))
    ]
    assert blocks
    Image.fromarray(render(Textile("plain", "ecru", "diffuse"), seed=7, size=(64, 64)).image).save(
        tmp_path / "part.png"
    )
    script = "\n".join(blocks).replace("http://127.0.0.1:8080", served["NORMWEAVE_URL"])
    # An event stream goes on for ten minutes: two seconds of it are enough, and 28 is the code of curl for this end.
    script = re.sub(
        r"^(curl --no-buffer .*)$", r"{ \1 --max-time 2 && exit 1; } || test $? = 28", script, flags=re.MULTILINE
    )
    environment = {**os.environ, **served, "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if name == "../threat-model":
        assert done.stdout.strip() == "401"


def test_the_prometheus_configuration_is_yaml():
    (job,) = yaml.safe_load(re.search(r"```yaml\n(.*?)```", DEPLOY, flags=re.DOTALL)[1])["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8080"]}]


@pytest.mark.parametrize(
    "counter",
    sorted(set(re.findall(r"`(normweave_\w+)`", DEPLOY))),
)
def test_named_counters_exist(counter, served):
    request = urllib.request.Request(
        f"{served['NORMWEAVE_URL']}/metrics",
        headers={"Authorization": f"Bearer {served['NORMWEAVE_TOKEN']}"},
    )
    with urllib.request.urlopen(request) as response:
        assert f"# TYPE {counter} " in response.read().decode()


# ── the alert rules ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_alert_rule_uses_a_metric_of_the_server():
    (group,) = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text("utf-8"))["groups"]
    exported = Metrics().text().decode()
    for rule in group["rules"]:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
        (name,) = re.findall(r"\b(up\b|normweave_\w+)", rule["expr"])
        assert name == "up" or f"# HELP {name} " in exported, name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_accepts_the_alert_rules():
    subprocess.run(["promtool", "check", "rules", ROOT / "deploy" / "alerts.yml"], check=True)
