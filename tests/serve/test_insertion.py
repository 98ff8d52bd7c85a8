"""Insertion by several servers with one PostgreSQL: each place of a request once, ids visible in their order."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest

from inspections import ALL, inspection
from normweave.serve.insertion import CHANNEL
from normweave.serve.records import RequestPart
from normweave.serve.store import Store

SERVERS, ROUNDS = 3, 25


@pytest.fixture
def servers(postgres):
    url = postgres.database()
    made = [Store.open(url, line="Press 5") for _ in range(SERVERS)]
    yield made
    for one in made:
        one.close()


def keyed(key, *, place=0, token=1, digest="c"):
    return replace(inspection(), token=token, request=RequestPart(key, digest * 64, place))


def test_who_reads_on_from_the_last_id_misses_nothing(servers):
    """Without the lock, a server that draws its ids first and commits last is overtaken."""
    done, seen = threading.Event(), []

    def write(store):
        for number in range(ROUNDS):
            store.add([inspection()] * (1 + number % 3))

    def read():
        last = 0
        while True:
            ended = done.is_set()
            for one in servers[0].inspections(ALL, after=last, limit=1000):
                last = one.id
                seen.append(one.id)
            if ended:
                return

    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(SERVERS) as pool:
        list(pool.map(write, servers))
    done.set()
    reader.join()
    assert seen == sorted(one.id for one in servers[0].iter_inspections(ALL))


def test_a_request_that_comes_to_several_servers_at_once_is_stored_once(servers):
    start = threading.Barrier(SERVERS)

    def send(store):
        start.wait()
        return [store.add([keyed(f"key {number}", place=place) for place in range(2)]) for number in range(10)]

    with ThreadPoolExecutor(SERVERS) as pool:
        answers = list(pool.map(send, servers))
    for same in zip(*answers, strict=True):
        assert all(one == same[0] for one in same)
    assert servers[0].count(ALL) == 20


def test_a_batch_may_have_stored_and_new_images_in_any_order(store):
    first = store.add([keyed("a", place=0)])
    mixed = store.add([keyed("a", place=1), inspection(), keyed("a", place=0), keyed("a", place=0, token=None)])
    assert mixed[2] == first[0]
    assert [one.id for one in mixed] == [2, 3, 1, 4]
    assert mixed[3].token is None
    assert store.count(ALL) == 4


def test_other_servers_are_notified_after_the_commit(servers):
    with closing(servers[0].database.dedicated()) as connection:
        connection.execute(f"LISTEN {CHANNEL}")
        servers[1].add([inspection()])
        (note,) = connection.notifies(timeout=5, stop_after=1)
        assert note.payload == servers[1].server
        servers[1].add([keyed("a")])
        servers[1].add([keyed("a")])  # nothing new
        assert len(list(connection.notifies(timeout=0.3))) == 1


def test_a_file_that_is_being_stored_is_not_removed_by_another_server(servers):
    order = []

    def remove():
        with servers[1].removing():
            order.append("removed")

    with ThreadPoolExecutor(1) as pool:
        with servers[0].adding() as add:
            removing = pool.submit(remove)
            with pytest.raises(TimeoutError):
                removing.result(0.2)
            order.append("stored")
            add([inspection()])
        removing.result(5)
    assert order == ["stored", "removed"]
