"""Replicas: two server processes of one line with a real PostgreSQL, and the locks that they hold."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest

from bundles import wait_for
from counterparts import Receiver, answers, until
from inspections import ALL
from normweave.errors import DataError
from normweave.serve.database import Database
from normweave.serve.replicas import Replica, SoleServer
from normweave.serve.store import Store
from ports import free_port
from required import absent
from serving import Server

LINE = "Press 5"
NGINX = Path(__file__).parents[2] / "deploy" / "nginx.conf"


# ── the locks ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Member:
    """A replica in this process.

    Attributes:
        events: what it was told.
    """

    def __init__(self, url, *, images="a", line=LINE, **given):
        self.database = Database.open(url)
        self.events = []
        try:
            self.replica = Replica(self.database, line=line, images=images, server=f"{id(self)}", **given)
        except BaseException:
            self.database.close()
            raise

    def start(self):
        tell = {name: (lambda name=name: self.events.append(name)) for name in ("leads", "follows", "news")}
        self.replica.start(follow=lambda: None, **tell)
        return self

    def close(self):
        self.replica.stop()
        self.replica.close()
        self.database.close()


def test_one_leads_and_another_one_when_it_has_closed(postgres):
    url = postgres.database()
    first = Member(url, address="one:8080").start()
    wait_for(lambda: first.replica.leads)
    with closing(Member(url, address="two:8080").start()) as second:
        time.sleep(1)
        assert (second.replica.leads, second.events) == (False, [])
        assert second.replica.leader() == first.replica.leader()
        assert second.replica.leader().address == "one:8080"
        first.close()
        assert not first.replica.leads
        wait_for(lambda: second.replica.leads, seconds=3)
        assert second.replica.leader().address == "two:8080"
    assert (first.events, second.events) == (["leads"], ["leads"])


def test_the_leader_stops_when_its_connection_is_lost_and_competes_again(postgres):
    with closing(Member(postgres.database()).start()) as member:
        wait_for(lambda: member.replica.leads)
        postgres.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test_%'")
        wait_for(lambda: member.events.count("leads") == 2, seconds=5)
    assert member.events == ["leads", "follows", "news", "leads"]


def test_lines_have_leaders_of_their_own(postgres):
    url = postgres.database()
    with closing(Member(url).start()) as one, closing(Member(url, line="Press 6", images="b").start()) as other:
        wait_for(lambda: one.replica.leads and other.replica.leads)


def test_servers_of_a_line_with_other_images_are_refused(postgres):
    url = postgres.database()
    stated = r"of the line 'Press 5' uses this database and stores its images elsewhere than in b. Start all"
    with closing(Member(url)), closing(Member(url)), pytest.raises(DataError, match=stated):
        Member(url, images="b")
    with closing(Member(url, images="b")):  # the others have left
        pass


def test_one_server_of_a_line_watches_a_folder(postgres):
    url = postgres.database()
    with (
        closing(Member(url, watches=True)),
        closing(Member(url)),
        pytest.raises(DataError, match=r"'Press 5' watches a folder. .*: leave out --watch here."),
    ):
        Member(url, watches=True)


def test_an_sqlite_file_and_a_data_folder_have_one_server(tmp_path):
    for path in (tmp_path / "store.db", tmp_path):
        with closing(SoleServer(path)), pytest.raises(DataError, match=f"Another server uses {path}. Stop that"):
            SoleServer(path)
        SoleServer(path).close()


# ── two processes ────────────────────────────────────────────────────────────────────────────────────────────────────


class Pair:
    """Two servers of a line, with an output that the leader delivers to.

    Attributes:
        answered: id of each answered inspection.
        images: folder of the images of both.
    """

    def __init__(self, library_folder, url, folder):
        self.receiver = Receiver(folder)
        self.receiver.listen()
        line = folder / "line.yaml"
        output = dataclasses.asdict(self.receiver.output(start="oldest").config)
        source = {"type": "http", "name": "top", "url": "http://127.0.0.1:1/"}
        line.write_text(json.dumps({"name": LINE, "parts": {"views": 2}, "sources": [source], "outputs": [output]}))
        library = shutil.copytree(library_folder, folder / "bundles")
        self.images = folder / "images"
        shared = ("--library", library, "--active", "old", "--database", url, "--images", self.images, "-c", line)
        self.url = url
        self.answered = []
        with ThreadPoolExecutor(2) as pool:  # which of them makes the tokens is open
            first, second = pool.map(lambda name: Server(None, folder / name, *shared), ("first", "second"))
        first.tokens = second.tokens = first.tokens | second.tokens
        self.servers = (first, second)

    def leader(self):
        """Return the server that leads, and the other one."""
        for one, other in (self.servers, self.servers[::-1]):
            if "normweave_leader 1.0" in self.get(one, "/metrics").text:
                return one, other
        return None

    def get(self, server, path, role="engineer"):
        with server.client(role) as client:
            return client.get(path)

    def post(self, server, path, role="engineer", **given):
        with server.client(role) as client:
            answer = client.post(path, **given)
            assert answer.status_code == 200, answer.text
            return answer.json()

    def inspect(self, server, content, key=None):
        headers = {} if key is None else {"Idempotency-Key": key}
        given = {"files": {"images": ("part.png", content)}, "headers": headers}
        (one,) = self.post(server, "/v1/inspect", role="operator", **given)["inspections"]
        self.answered.append(one["id"])
        return one

    def close(self):
        for server in self.servers:
            server.kill()
        self.receiver.close()


class Nginx:
    """nginx before two servers, with the configuration of the folder deploy.

    Attributes:
        url: its address.
    """

    def __init__(self, program, folder, servers):
        port = free_port()
        text = NGINX.read_text().replace("listen 8080;", f"listen 127.0.0.1:{port};")
        for example, server in zip(("8081", "8082"), servers, strict=True):
            text = text.replace(f"127.0.0.1:{example}", server.url.removeprefix("http://"))
        names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = " ".join(f"{name}_temp_path {folder}/{name};" for name in names)
        main = f"daemon off; pid {folder}/pid; error_log stderr; events {{}} http {{ access_log off; {paths} {text} }}"
        user = "" if os.geteuid() else "user root; "
        (folder / "nginx.conf").write_text(user + main)
        command = [program, "-p", folder, "-c", folder / "nginx.conf"]
        subprocess.run([*command, "-t"], check=True, capture_output=True)
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        until(lambda: answers(port), "the start of nginx")

    def close(self):
        self._process.terminate()
        self._process.wait(20)


@pytest.fixture(scope="module")
def pair(library_folder, postgres, tmp_path_factory):
    pair = Pair(library_folder, postgres.database(), tmp_path_factory.mktemp("pair"))
    with closing(pair):
        yield pair


@pytest.fixture(scope="module")
def nginx(pair, tmp_path_factory):
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        absent("nginx", "nginx was not found: apt-get install nginx-light")
    with closing(Nginx(program, tmp_path_factory.mktemp("nginx"), pair.servers)) as made:
        yield made


@pytest.fixture(scope="module")
def contents(photos):
    return [Path(path).read_bytes() for path in photos]


def test_a_login_and_a_new_token_are_valid_on_both(pair):
    first, second = pair.servers
    with first.client(role=None) as browser:
        assert browser.post("/login", data={"token": first.tokens["operator"]}).status_code == 303
        (cookie,) = browser.cookies.jar
    # As behind a proxy, where both have the same name and port.
    headers = {"Cookie": f"{cookie.name}={cookie.value}", "Host": first.url.removeprefix("http://")}
    assert httpx2.get(f"{second.url}/history.csv", headers=headers, trust_env=False).status_code == 200
    with first.client("engineer") as client:
        made = client.post("/v1/tokens", json={"name": "guest", "role": "operator"}).json()
    headers = {"Authorization": f"Bearer {made['token']}"}
    # The other server has it after half a second at the latest.
    wait_for(lambda: httpx2.get(f"{second.url}/v1/model", headers=headers, trust_env=False).status_code == 200, 10)


def test_an_inspection_of_one_is_shown_by_the_other(pair, contents):
    first, second = pair.servers
    with first.client() as client, client.stream("GET", "/v1/inspections/events") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "retry: 1000"
        one = pair.inspect(second, contents[0])
        begun = time.monotonic()
        assert next(line for line in lines if line.startswith("id:")) == f"id: {one['id']}"
        assert time.monotonic() - begun < 1
    assert pair.get(first, one["image_url"], role="operator").content == contents[0]


def test_a_server_of_another_database_is_refused_their_images(pair, library_folder, postgres, tmp_path):
    """It would remove them."""
    given = ("--library", library_folder, "--active", "old", "--images", pair.images)
    with pytest.raises(AssertionError, match=r"The images in .* belong to another database, whose servers would"):
        Server(None, tmp_path, *given, "--database", postgres.database(purpose="other"))


def test_a_server_that_is_refused_claims_no_images(pair, library_folder, tmp_path):
    given = ("--library", library_folder, "--active", "old", "--images", tmp_path / "own", "--name", LINE)
    with pytest.raises(AssertionError, match=r"stores its images elsewhere than in"):
        Server(None, tmp_path, *given, "--database", pair.url)
    assert not (tmp_path / "own" / ".database").exists()


def test_a_key_that_comes_to_both_at_once_gives_one_inspection(pair, contents):
    with ThreadPoolExecutor(2) as pool:
        for number in range(5):
            content, key = contents[1] + b"key" + bytes([number]), f"same {number}"
            one, other = pool.map(
                lambda server, *given: pair.inspect(server, *given), pair.servers, [content] * 2, [key] * 2
            )
            assert one == other
            pair.answered.pop()
    with closing(Store.open(pair.url, migrate=False)) as store:
        assert store.count(ALL) == len(pair.answered)


def test_a_promotion_and_a_rate_are_taken_over_within_two_seconds(pair, contents):
    first, second = pair.servers
    old = pair.get(first, "/v1/model").json()["bundle_hash"]
    new = next(one["bundle_hash"] for one in pair.get(first, "/v1/models").json()["models"] if one["name"] == "new")
    pair.post(first, f"/v1/models/{new}/shadow")
    pair.post(second, f"/v1/models/{new}/promote")
    wait_for(lambda: pair.get(first, "/v1/model").json()["bundle_hash"] == new, seconds=2)
    assert pair.inspect(first, contents[2])["bundle_hash"] == pair.inspect(second, contents[2])["bundle_hash"] == new
    with second.client("engineer") as client:
        assert client.put("/v1/model/false-alarm-rate", json={"false_alarm_rate": 0.3}).status_code == 200
    wait_for(lambda: pair.get(first, "/v1/model").json()["false_alarm_rate"] == 0.3, seconds=2)
    pair.post(first, "/v1/models/rollback")
    wait_for(lambda: pair.get(second, "/v1/model").json()["bundle_hash"] == old, seconds=2)


def test_programs_and_people_come_through_nginx(pair, nginx, contents):
    with httpx2.Client(base_url=nginx.url, trust_env=False) as browser:
        assert browser.get("/", headers={"Accept": "text/html"}).status_code == 401
        assert browser.post("/login", data={"token": pair.servers[0].tokens["operator"]}).status_code == 303
        page = browser.get("/")
        assert (page.status_code, "normweave" in page.text) == (200, True)
    token = {"Authorization": f"Bearer {pair.servers[0].tokens['operator']}"}
    with httpx2.Client(base_url=nginx.url, headers=token, trust_env=False) as client:
        with client.stream("GET", "/v1/inspections/events") as stream:
            lines = stream.iter_lines()
            assert next(lines) == "retry: 1000"
            sent = []
            for headers in ({}, {"Idempotency-Key": "by nginx"}, {"Idempotency-Key": "by nginx"}):
                answer = client.post("/v1/inspect", files={"images": contents[3]}, headers=headers)
                sent += [one["id"] for one in answer.json()["inspections"]]
            assert sent[1] == sent[2]
            for id in sent[:2]:
                assert next(line for line in lines if line.startswith("id:")) == f"id: {id}"
        large = client.post("/v1/inspect", files={"images": bytes(5_000_000)})
        assert (large.status_code, large.json()["inspections"][0]["error"] is None) == (200, False)


def test_images_of_a_request_to_the_server_that_does_not_lead_count_together(pair, contents):
    """They are scored in several batches, and the part is complete with two of them."""
    _, other = wait_for(pair.leader)
    files = [("images", ("part.png", content + b"part")) for content in (contents * 20)[:20]]
    sent = pair.post(other, "/v1/inspect", role="operator", files=files, data={"part": "17", "view": list("ab" * 10)})
    pair.answered += [one["id"] for one in sent["inspections"]]
    found = wait_for(lambda: pair.get(other, "/v1/parts?part_id=17").json()["parts"])
    assert [(one["images"], one["corrects"]) for one in found] == [(20, None)]


def test_each_server_names_the_one_that_leads(pair):
    leader, other = wait_for(pair.leader)
    lines = [pair.get(one, "/v1/line").json() for one in (leader, other)]
    assert [line["leads"] for line in lines] == [True, False]
    assert lines[0]["leader"] == lines[1]["leader"]
    assert lines[0]["leader"]["address"].endswith(leader.url.removeprefix("http://127.0.0.1"))
    since = datetime.now(UTC) - datetime.fromisoformat(lines[0]["leader"]["since"])
    assert timedelta(0) <= since < timedelta(hours=1)
    assert [line["sources"][0]["status"] for line in lines] == ["no images", "idle"]


def test_what_both_inspect_is_delivered_once_by_the_leader(pair, contents):
    for server in (*pair.servers, *pair.servers):
        pair.inspect(server, contents[4])
    with closing(Store.open(pair.url, migrate=False)) as store:
        ids = [one.id for one in store.iter_inspections(ALL)]
    until(lambda: len(pair.receiver.ids()) >= len(ids), "the delivery of all")
    time.sleep(0.5)  # a second delivery would come
    assert pair.receiver.ids() == ids
    assert sum("normweave_leader 1.0" in pair.get(one, "/metrics").text for one in pair.servers) == 1


def test_what_both_inspect_under_kills_is_stored_once_and_delivered_in_order(pair, nginx, contents):
    """The leader is killed while clients send; they send again, with the key, to the other one, or nginx does this."""
    leader, other = wait_for(pair.leader)
    numbers, stop, answered, statuses = itertools.count(), threading.Event(), {}, set()

    def send(*urls):
        while not stop.is_set():
            number = next(numbers)
            content = contents[number % len(contents)] + number.to_bytes(8, "big")
            headers = {"Idempotency-Key": f"load {number}", "Authorization": f"Bearer {leader.tokens['operator']}"}
            for url in itertools.cycle(urls):
                with contextlib.suppress(httpx2.HTTPError):
                    files = {"images": ("load.png", content)}
                    answer = httpx2.post(f"{url}/v1/inspect", files=files, headers=headers, timeout=60, trust_env=False)
                    statuses.add((url, answer.status_code))
                    if answer.status_code == 200:
                        (answered[number],) = answer.json()["inspections"]
                        break
                time.sleep(0.05)

    ways = ([leader.url, other.url], [other.url, leader.url], [nginx.url], [nginx.url])
    clients = [threading.Thread(target=send, args=way) for way in ways]
    for client in clients:
        client.start()
    wait_for(lambda: len(answered) > 20)
    leader.kill()
    wait_for(lambda: "normweave_leader 1.0" in pair.get(other, "/metrics").text, seconds=5)
    count = len(answered)
    leader.start()
    wait_for(lambda: len(answered) > count + 20)
    stop.set()
    for client in clients:
        client.join()
    assert {status for url, status in statuses if url == nginx.url} == {200}
    with closing(Store.open(pair.url, migrate=False)) as store:
        stored = list(store.iter_inspections(ALL))
    ids = [one.id for one in stored]
    loaded = {one.request.key: one for one in stored if one.request is not None and one.request.key.startswith("load")}
    assert len(loaded) == len(answered) == sum(one.name == "load.png" for one in stored)
    for number, answer in answered.items():
        assert loaded[f"load {number}"].id == answer["id"]
        assert loaded[f"load {number}"].image.image_hash == answer["image_hash"]
    until(lambda: set(ids) <= set(pair.receiver.ids()), "the delivery of all")
    assert list(dict.fromkeys(pair.receiver.ids())) == ids
    # The one that was killed leads no longer, and shows what the leader has stored.
    wait_for(lambda: pair.get(leader, "/v1/line").json()["outputs"][0]["behind"] == 0)
