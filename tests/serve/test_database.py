"""SQLite and PostgreSQL: migrations, durability, and failures."""

import shutil
import sqlite3
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from inspections import ALL, inspection, many
from normweave.errors import ConfigError, DataError, MissingError
from normweave.serve import database, tables
from normweave.serve.database import StoreError
from normweave.serve.delivery_store import Delivery, DeliveryStore
from normweave.serve.store import Store


def test_sqlite_settings_are_durable(tmp_path):
    with (
        closing(Store.open(f"sqlite:///{tmp_path}/store.db")) as store,
        store.database.reading() as connection,
    ):
        settings_ = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert settings_ == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def differs(context, *types):
    """Compare types as alembic does, but not the length of text in SQLite, which does not enforce it."""
    found, wanted = types[-2:]
    if context.dialect.name == "sqlite" and isinstance(found, sa.String) and isinstance(wanted.impl, sa.String):
        return False
    return None


def test_the_migrations_create_the_tables_of_the_store(store):
    with store.database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": differs})
        assert compare_metadata(context, tables.METADATA) == []


NEXT_REVISION = """
import sqlalchemy as sa
from alembic import op

revision = "0099"
down_revision = "0013"


def upgrade():
    op.add_column("inspections", sa.Column("lamp", sa.String(20)))
"""


def test_an_older_database_is_migrated_and_a_newer_one_is_refused(database_url, tmp_path, monkeypatch):
    with closing(Store.open(database_url)) as store:
        kept = store.add(many())
    newer = tmp_path / "100% newer" / "migrations"  # a % has a meaning in alembic's settings
    shutil.copytree(database.MIGRATIONS, newer)
    (newer / "versions" / "0099_lamp.py").write_text(NEXT_REVISION)
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", newer)
        with closing(Store.open(database_url)) as store:
            assert list(store.iter_inspections(ALL)) == kept
            with store.database.reading() as connection:
                assert connection.exec_driver_sql("SELECT count(*) FROM inspections WHERE lamp IS NULL").scalar() == 80
    with pytest.raises(DataError, match=r"is at revision 0099, and this normweave knows up to 0013. Upgrade with"):
        Store.open(database_url)


def test_a_reader_does_not_migrate(database_url):
    """A server of another version may use the tables."""
    if database_url.startswith("sqlite:///"):
        Path(database_url.removeprefix("sqlite:///")).touch()  # a file that is not there is refused for this reason
    with pytest.raises(DataError, match=r"is at revision none, and this normweave reads 0013. Start the server"):
        Store.open(database_url, migrate=False)
    with closing(Store.open(database_url)) as store:
        kept = store.add([inspection()])
    with closing(Store.open(database_url, migrate=False)) as store:
        assert list(store.iter_inspections(ALL)) == kept


def test_a_failed_migration_is_rolled_back(database_url, tmp_path, monkeypatch):
    Store.open(database_url).close()
    newer = tmp_path / "migrations"
    shutil.copytree(database.MIGRATIONS, newer)
    (newer / "versions" / "0099_lamp.py").write_text(NEXT_REVISION + "    op.drop_table('nothing')\n")
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", newer)
        with pytest.raises(StoreError, match="nothing"):
            Store.open(database_url)
    with closing(Store.open(database_url)) as store:
        assert store.add([inspection()])[0].id == 1
        with store.database.reading() as connection:
            assert "lamp" not in {column["name"] for column in sa.inspect(connection).get_columns("inspections")}


OPENS_AFTER_INPUT = """
import sys
from normweave.serve.store import Store
import alembic.command

print("ready", flush=True)
sys.stdin.readline()
Store.open(sys.argv[1]).close()
"""


def test_concurrent_processes_migrate_once(database_url):
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", OPENS_AFTER_INPUT, database_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    assert [server.stdout.readline() for server in servers] == ["ready\n"] * 4
    for server in servers:
        server.stdin.write("go\n")
        server.stdin.flush()
    assert [(server.communicate()[1], server.returncode) for server in servers] == [("", 0)] * 4
    with closing(Store.open(database_url)) as store:
        assert store.add([inspection()])[0].id == 1


def test_concurrent_connections_to_a_new_file(tmp_path):
    # SQLite refuses one of two that turn a new file to WAL there and then; twenty rounds meet that.
    start = threading.Barrier(4)

    def connect(number):
        engine = database.make_engine(sa.make_url(f"sqlite:///{tmp_path / str(number)}.db"))
        start.wait()
        with closing(engine.raw_connection()) as connection:
            mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        engine.dispose()
        return mode

    with ThreadPoolExecutor(4) as pool:
        for number in range(20):
            assert list(pool.map(connect, [number] * 4)) == ["wal"] * 4


def test_concurrent_migrations_in_one_process(tmp_path):
    start = threading.Barrier(4)

    def serve(number):
        start.wait()
        with closing(Store.open(tmp_path / f"{number}.db")) as store:
            return store.add([inspection()])[0].id

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(serve, range(4))) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:pass%40word@127.0.0.1:1/parts",
        "postgresql+psycopg://ada@127.0.0.1:1/parts?password=pass%40word",
    ],
)
def test_the_error_of_an_unreachable_database_has_no_password(url):
    with pytest.raises(StoreError, match=r"postgresql\+psycopg://ada.* failed: .*Check that it runs") as caught:
        Store.open(url)
    message = str(caught.value)
    assert "127.0.0.1:1/parts" in message
    assert "pass" not in message.replace("password", "")
    assert "word@" not in message


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("parts.db", "cannot be read"),
        ("postgresql://ada:word@127.0.0.1:port/parts", "cannot be read"),
        ("sqlite://", "in memory loses everything"),
        ("sqlite:///:memory:", "in memory loses everything"),
        ("mysql://ada:word@host/parts", "of type 'mysql' are not supported"),
        ("postgresql://ada:wo@rd@host/parts", "has no database name, or its host contains an @"),
        ("postgresql://ada:word@host", "has no database name, or its host contains an @"),
    ],
)
def test_the_error_of_an_invalid_url_has_no_password(url, why):
    with pytest.raises(ConfigError, match=why) as caught:
        Store.open(url)
    assert "Write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE" in str(caught.value)
    assert "word@h" not in str(caught.value)
    assert "rd@" not in str(caught.value)


def test_without_psycopg_the_error_has_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingError, match=r'pip install "normweave\[postgres\]"'):
        Store.open("postgresql://ada@host/parts")


def test_a_missing_folder(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere/store.db failed: unable to open.*Check that its folder exists"):
        Store.open(f"sqlite:///{tmp_path}/nowhere/store.db")


def test_a_locked_file_is_an_error_after_the_timeout(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "TIMEOUT_SECONDS", 0.5)
    path = tmp_path / "store.db"
    with closing(Store.open(f"sqlite:///{path}")) as store, closing(sqlite3.connect(path)) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"database is locked. Check .* that no other program holds it"):
            store.add([inspection()])
        assert store.count(ALL) == 0  # reading goes on


def test_a_shortly_locked_file_is_waited_for(tmp_path):
    path = tmp_path / "store.db"
    with closing(Store.open(path)) as store, closing(sqlite3.connect(path, check_same_thread=False)) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.3, other.execute, ["COMMIT"])
        timer.start()
        assert store.add([inspection()])[0].id == 1
        timer.join()


def test_a_lost_connection_is_replaced(postgres):
    url = postgres.database()
    with closing(Store.open(url)) as store:
        store.add([inspection()])
        postgres.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test_%'")
        store.check_writable()
        assert store.count(ALL) == 1


def test_a_connection_lost_inside_a_transaction_rolls_back(postgres):
    def add_and_lose(store):
        with store.database.writing() as connection:
            connection.execute(sa.insert(tables.INSPECTIONS), [tables.to_row(inspection())])
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            postgres.sql(f"SELECT pg_terminate_backend({pid})")
            connection.execute(sa.select(1))

    with closing(Store.open(postgres.database())) as store:
        with pytest.raises(StoreError, match="failed: terminating connection"):
            add_and_lose(store)
        assert store.count(ALL) == 0


def test_file_names_with_special_characters(tmp_path):
    folder = tmp_path / "50% of what? #1"
    folder.mkdir()
    for _ in range(2):
        with closing(Store.open(folder / "store.db")) as store:
            store.add([inspection()])
    assert store.count(ALL) == 2
    store.close()
    assert "store.db" in {path.name for path in folder.iterdir()}


def test_an_encoding_other_than_utf8_is_refused(postgres):
    url = postgres.database(encoding="LATIN1")
    with pytest.raises(DataError, match=r"is in LATIN1, which cannot hold every name. Make one in UTF-8: createdb"):
        Store.open(url)


def test_a_backup_of_an_earlier_version_is_the_same_database(database_url, tmp_path, monkeypatch):
    older = tmp_path / "migrations"
    shutil.copytree(database.MIGRATIONS, older)
    (older / "versions" / "0013_identity.py").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", older)
        with closing(Store.open(database_url)) as store, store.database.writing() as connection:
            first = {"name": "e", "role": "engineer", "digest": "5" * 64, "created_at": datetime.now(UTC)}
            connection.execute(sa.insert(tables.TOKENS), [first, first | {"digest": "4" * 64}])
    identities = []
    for _ in range(2):  # restored and migrated again
        with closing(Store.open(database_url)) as store, store.database.writing() as connection:
            identities.append(store.identity())
            connection.exec_driver_sql("DROP TABLE identity")
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0012'")
    assert identities == [uuid.uuid5(uuid.NAMESPACE_OID, "5" * 64).hex] * 2


def test_a_new_database_has_an_identity_of_its_own(tmp_path):
    identities = []
    for name in "ab":
        for _ in range(2):
            with closing(Store.open(tmp_path / name)) as store:
                identities.append(store.identity())
    assert identities[0] == identities[1] != identities[2] == identities[3]


def test_how_far_the_outputs_are_is_kept_by_the_migration_of_their_tables(database_url, tmp_path, monkeypatch):
    """They knew inspections only."""
    older = tmp_path / "migrations"
    shutil.copytree(database.MIGRATIONS, older)
    (older / "versions" / "0011_subjects.py").unlink()
    (older / "versions" / "0012_alignment.py").unlink()
    (older / "versions" / "0013_identity.py").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", older)
        with closing(Store.open(database_url)) as store, store.database.writing() as connection:
            row = "'Press 5', 'mes', 7, 2, 'no answer', NULL, 3"
            connection.exec_driver_sql(f"INSERT INTO deliveries VALUES ({row})")
    with closing(Store.open(database_url)) as store:
        deliveries = DeliveryStore(store.database, line="Press 5")
        assert deliveries.begin("mes", oldest=False) == Delivery(
            name="mes", last_ids={"inspections": 7}, attempts=2, last_error="no answer"
        )
        assert deliveries.removed("mes") == 3
