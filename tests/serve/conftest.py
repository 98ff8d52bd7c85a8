"""Fixtures: stores in SQLite and in a private PostgreSQL, and running services."""

import getpass
import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import psycopg
import pytest
import uvicorn
from starlette.testclient import TestClient

from bundles import make_library
from normweave.detector import Detector
from normweave.serve import create_app
from normweave.serve.access import Access
from normweave.serve.config import ServeConfig
from normweave.serve.files import Files
from normweave.serve.library import Library
from normweave.serve.models import Models, choose_active
from normweave.serve.process import listen, protocol_with_limits
from normweave.serve.service import InspectionService
from normweave.serve.store import Store
from required import absent


class Postgres:
    """A private cluster that listens on a socket in its own folder only."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder = programs, folder
        self._made: set[str] = set()
        # PostgreSQL refuses to run as root.
        user = getpass.getuser() if os.geteuid() else "nobody"
        group = pwd.getpwnam(user).pw_gid
        self._as = {} if os.geteuid() else {"user": user, "group": group, "extra_groups": []}
        shutil.chown(folder, user, group)
        self._run("initdb", "--username=tests", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
        self.start()

    def _run(self, program, *arguments):
        subprocess.run(
            [self._programs / program, f"--pgdata={self._folder}/data", *arguments],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the server would hold a pipe open
            cwd=self._folder,
            **self._as,
        )

    def sql(self, text, *, database="postgres"):
        """Run a statement as the administrator."""
        with psycopg.connect(f"host={self._folder} user=tests dbname={database}", autocommit=True) as connection:
            connection.execute(text)

    def database(self, *, encoding="UTF8", purpose="test"):
        """Return the URL of an empty database. Tests share it, since creating one takes most of their time."""
        name = f"{purpose}_{encoding}".lower()
        if name not in self._made:
            self._made.add(name)
            self.sql(f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0")
        self.sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public", database=name)
        return f"postgresql://tests@/{name}?host={self._folder}"

    def start(self):
        """Start it."""
        options = f"-F -c listen_addresses= -c unix_socket_directories={self._folder}"
        self._run("pg_ctl", "start", "--wait", f"--log={self._folder}/log", f"--options={options}")

    def stop(self):
        """Stop it without a checkpoint."""
        self._run("pg_ctl", "stop", "--wait", "--mode=immediate")


def find_programs():
    """Return the folder of the newest initdb, on the PATH or in the folder of Debian."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    on_path = shutil.which("initdb")
    folders += [Path(on_path).resolve().parent] if on_path else []
    return next((folder for folder in reversed(folders) if (folder / "pg_ctl").exists()), None)


@pytest.fixture(scope="session")
def postgres():
    programs = find_programs()
    if programs is None:
        absent("postgres", "PostgreSQL's initdb and pg_ctl were not found: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="normweave-postgres-"))  # a short path, as sockets need
    try:
        cluster = Postgres(programs, folder)
        yield cluster
        cluster.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request, tmp_path):
    """URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.db"
    return request.getfixturevalue("postgres").database()


@pytest.fixture
def store(database_url, empty_store):
    if database_url.startswith("sqlite:///"):
        shutil.copy(empty_store, database_url.removeprefix("sqlite:///"))
    store = Store.open(database_url)
    yield store
    store.close()


# ── a running service ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def loaded(bundle):
    return Detector.load(bundle, threads=1, device="cpu")


@pytest.fixture
def start(loaded, empty_store, tmp_path):
    """Function that starts a service in a folder of its own; all services are stopped at the end."""
    started = []

    def start(**limits):
        folder = tmp_path / f"service-{len(started)}"
        files = Files(folder / "files")
        store = Store.open(Path(shutil.copy(empty_store, folder)))
        service = InspectionService(loaded, store=store, files=files, config=ServeConfig(**limits))
        started.append(service)
        return service

    yield start
    for service in started:
        service.stop()
        service.store.close()
        service.files.close()


@pytest.fixture(scope="session")
def library_folder(bundle, tmp_path_factory):
    """A library of two bundles with other scores and of a damaged one; tests copy it before they change it."""
    return make_library(bundle, tmp_path_factory.mktemp("library") / "bundles")


@pytest.fixture
def library(library_folder, tmp_path):
    return Library(shutil.copytree(library_folder, tmp_path / "bundles"))


@pytest.fixture
def hashes(library):
    """Hash of each bundle of the library by its name."""
    return {one.name: one.bundle_hash for one in library.scan()}


def load(path):
    return Detector.load(path, threads=1, device="cpu")


@pytest.fixture
def library_service(start, library):
    """A service with a library, of which `old` is active, and whose candidate may take a whole processor."""
    service = start(shadow_share=1.0)
    choose_active(library, service.store, name="old")
    service.models = Models(library, service=service, load=load, device="cpu")
    return service


@pytest.fixture
def models(library_service):
    return library_service.models


@pytest.fixture
def service(start):
    return start()


@pytest.fixture
def access(service):
    return Access(service.store, session_hours=12)


@pytest.fixture
def keys(access):
    """Secret of each role."""
    return {made.token.role: made.secret for made in access.create_first_tokens()}


@pytest.fixture
def client(service, access, keys):
    """Client with the token of an engineer."""
    app = create_app(service, access=access, pages=False)
    headers = {"Authorization": f"Bearer {keys['engineer']}"}
    with TestClient(app, headers=headers, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def app(service, access, keys):
    return create_app(service, access=access, pages=False)


@pytest.fixture
def live(app):
    """URL of the application in a real server, in a thread."""
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(app, http=protocol_with_limits(30, send_seconds=30), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        app.state.streams.end()
        server.should_exit = True
        thread.join()


@pytest.fixture
def browser(app):
    """A browser without a login."""
    with TestClient(app, base_url="http://line:8080", follow_redirects=False) as client:
        yield client


@pytest.fixture
def log_in():
    """Function that sends a token with the login form."""
    return lambda client, secret: client.post("/login", data={"token": secret})


@pytest.fixture
def receiver(tmp_path):
    """A server that takes webhooks and verifies their signatures."""
    from counterparts import Receiver  # its libraries are slow to import

    made = Receiver(tmp_path)
    made.listen()
    yield made
    made.close()
