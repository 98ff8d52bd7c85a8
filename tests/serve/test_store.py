"""Queries and updates of the store, on both databases."""

import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from inspections import ALL, NOON, accept, inspection, many, stored_image, unreadable
from normweave.errors import DataError
from normweave.serve import store as module
from normweave.serve.database import StoreError
from normweave.serve.files import Files
from normweave.serve.records import Count, Filter, LastTokenError, RateChange, ScoredImage, Token
from normweave.serve.store import Store


def test_scored_images(store):
    scores = [0.1 + 0.7, 2.5, 1e-17]
    store.add(
        [
            inspection(pred_score=scores[0]),
            inspection(pred_score=9.0, bundle_hash="d" * 64),
            unreadable(),
            inspection(pred_score=scores[1], verdict="normal", unseen=False, subclass_distance=None, routed=None),
            inspection(pred_score=scores[2]),
        ]
    )
    images = store.scored_images("c" * 64, newest=10)
    assert [one.score for one in images] == scores[::-1]  # newest first
    assert images[1] == ScoredImage("normal", scores[1], None, None, False)
    first = inspection().outcome
    assert images[2] == ScoredImage(first.verdict, scores[0], first.subclass_distance, 3, True)
    assert store.scored_images("c" * 64, newest=2) == images[:2]
    assert store.scored_images("e" * 64, newest=2) == []


def test_ids_ascend_and_are_never_reused(store):
    first = store.add([inspection(number) for number in range(2000)])
    assert [one.id for one in first] == list(range(1, 2001))
    assert [one.name for one in first] == [f"part {number}.png" for number in range(2000)]
    assert len(list(store.expire(before=NOON + timedelta(days=1)))) == 2
    assert store.count(ALL) == 0
    assert store.add([inspection()])[0].id == 2001
    assert store.add([]) == []


def test_add_stores_all_or_none(store):
    with pytest.raises(sa.exc.StatementError):
        store.add([inspection(), inspection(received_at=datetime(2026, 1, 1))])  # no time zone
    assert store.count(ALL) == 0
    with pytest.raises(ValueError, match="stored once and reviewed afterwards"):
        store.add([inspection(id=3)])


def test_not_found_is_not_found(store):
    for number in (0, 1, -1, 2**63, -(2**70), 2**70):
        assert store.inspection(number) is None
        assert store.reviews(number) == []
        assert store.revoke(number, NOON) is None
        with pytest.raises(LookupError, match=f"There is no inspection {number}, or retention has removed it"):
            store.review(number, accept())


@pytest.fixture
def filled(store):
    """A store and its inspections, oldest first."""
    kept = store.add(many())
    for number, decision in enumerate(["accept", "reject", "undo"] * 8):
        kept[number] = store.review(kept[number].id, accept(decision=decision))
    return store, kept


FILTERS = {
    "all": (ALL, lambda one: True),
    "since": (Filter(since=NOON), lambda one: one.received_at >= NOON),
    "until": (Filter(until=NOON), lambda one: one.received_at < NOON),
    "verdicts": (
        Filter(verdicts=("anomalous", "unknown")),
        lambda one: one.outcome.verdict in ("anomalous", "unknown"),
    ),
    "unreadable": (Filter(unreadable=True), lambda one: one.outcome.error is not None),
    "readable": (Filter(unreadable=False), lambda one: one.outcome.error is None),
    "category": (Filter(category="wood"), lambda one: one.outcome.category == "wood"),
    "subclass": (Filter(subclass="twill"), lambda one: one.outcome.subclass == "twill"),
    "name": (Filter(name="3.png"), lambda one: one.name == "3.png"),
    "source": (Filter(source="page"), lambda one: one.source == "page"),
    "bundle": (Filter(bundle_hash="d" * 64), lambda one: one.outcome.bundle_hash == "d" * 64),
    "reviewed": (Filter(reviewed=True), lambda one: one.review is not None),
    "not reviewed": (Filter(reviewed=False), lambda one: one.review is None),
    "decision": (Filter(decision="reject"), lambda one: one.review and one.review.decision == "reject"),
    "p": (Filter(p_value_within=2.0), lambda one: (one.outcome.p_value or 1) <= 0.02),  # at the rate 0.01
    "two": (
        Filter(since=NOON, category="cloth"),
        lambda one: one.received_at >= NOON and one.outcome.category == "cloth",
    ),
    "none": (Filter(name="absent.png"), lambda one: False),
}


@pytest.mark.parametrize("chunk", [3, 500])
def test_filters(filled, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    store, kept = filled
    for name, (chosen, belongs) in FILTERS.items():
        expected = [one for one in kept if belongs(one)]
        assert list(store.iter_inspections(chosen)) == expected, name
        assert store.inspections(chosen, limit=1000) == expected[::-1], name
        assert store.count(chosen) == len(expected), name


def test_pages_are_contiguous(filled):
    store, kept = filled
    found = store.inspections(ALL, limit=7)
    while page := store.inspections(ALL, before=found[-1].id, limit=7):
        found += page
    assert found == kept[::-1]
    assert store.inspections(ALL, before=2**80, limit=1) == kept[-1:]
    assert store.inspections(ALL, before=-(2**80), limit=1) == []


def test_iter_inspections_reads_chunks_up_to_the_newest_at_its_start(store, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3)
    kept = store.add([inspection(number) for number in range(8)])
    walk = store.iter_inspections(ALL)
    found = [next(walk)]
    store.review(kept[1].id, accept())  # read already
    changed = store.review(kept[4].id, accept())
    store.add([inspection(100)])
    assert [*found, *walk] == [*kept[:4], changed, *kept[5:]]


@pytest.mark.parametrize("bucket", ["hour", "day", "week"])
def test_counts_agree_with_a_calendar(filled, bucket):
    store, kept = filled

    def begins(moment):
        day = moment.replace(hour=0, minute=0, second=0, microsecond=0)
        return {
            "hour": moment.replace(minute=0, second=0, microsecond=0),
            "day": day,
            "week": day - timedelta(days=day.weekday()),
        }[bucket]

    for chosen, belongs in FILTERS.values():
        expected = Counter()
        for one in filter(belongs, kept):
            key = (begins(one.received_at), one.outcome.category, one.outcome.subclass)
            expected[*key, one.outcome.verdict or "unreadable"] += 1
            if one.review:
                expected[*key, one.review.decision + "ed"] += 1
        found = store.counts(chosen, bucket=bucket)
        keys = [(one.start, one.category, one.subclass) for one in found]
        assert keys == sorted(keys, key=lambda key: (key[0], key[1] or "", key[2] or ""))
        assert len(set(keys)) == len(keys)
        names = ("normal", "anomalous", "unknown", "unreadable", "accepted", "rejected")
        assert +expected == +Counter(
            {(*key, name): getattr(one, name) for key, one in zip(keys, found, strict=True) for name in names}
        )


def test_counts_by_hand(store):
    sunday, monday = datetime(2026, 3, 8, 23, 59, 59, 999_999, tzinfo=UTC), datetime(2026, 3, 9, tzinfo=UTC)
    early = datetime(1969, 12, 31, 23, 30, tzinfo=UTC)  # before 1970
    store.add([inspection(received_at=moment, verdict="normal") for moment in (early, sunday, monday)])
    some = {
        "category": "cloth",
        "subclass": "twill",
        "normal": 1,
        "anomalous": 0,
        "unknown": 0,
        "unreadable": 0,
    }
    assert store.counts(ALL, bucket="week") == [
        Count(start=start, **some, accepted=0, rejected=0)
        for start in (datetime(1969, 12, 29, tzinfo=UTC), datetime(2026, 3, 2, tzinfo=UTC), monday)
    ]


def test_queries_of_the_pages_use_an_index(tmp_path):
    """Only for SQLite: with few rows PostgreSQL scans the table."""
    path = tmp_path / "store.db"
    sent = []

    def record(connection, cursor, statement, parameters, context, executemany):
        sent.append((statement, parameters))

    def plan(store, chosen):
        store.inspections(chosen, limit=50)
        statement, parameters = sent[-1]
        with closing(sqlite3.connect(path)) as connection:
            rows = connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
        return " ".join(row[3] for row in rows)

    sa.event.listen(sa.Engine, "before_cursor_execute", record)
    try:
        with closing(Store.open(path)) as store:
            assert plan(store, ALL) == "SCAN inspections"  # from the end, by id
            for index, chosen in {
                "received_at": Filter(since=NOON, until=NOON + timedelta(hours=1)),
                "verdict": Filter(verdicts=("unknown",)),
                "name": Filter(name="3.png"),
                "bundle_hash": Filter(bundle_hash="d" * 64),
                "decision": Filter(reviewed=False),
            }.items():
                assert f"SEARCH inspections USING INDEX inspections_{index} " in plan(store, chosen)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", record)


def test_the_last_review_counts_and_all_are_stored(store):
    other, kept = store.add([inspection(), inspection()])
    reviews = [
        accept(),
        accept(decision="reject", comment="a hole", at=NOON - timedelta(days=1)),  # by a clock that is slow
        accept(decision="undo", reviewer="Bo"),
    ]
    assert store.review(kept.id, reviews[0]) == replace(kept, review=reviews[0])
    assert store.review(kept.id, reviews[1]) == replace(kept, review=reviews[1])
    assert store.inspection(kept.id) == replace(kept, review=reviews[1])
    assert store.review(kept.id, reviews[2]) == kept  # the first review stays withdrawn
    assert store.review(kept.id, reviews[2]) == kept
    assert store.count(Filter(reviewed=False)) == 2
    assert store.reviews(kept.id) == [*reviews, reviews[2]]
    assert store.reviews(other.id) == []


def test_a_part_of_a_name(store):
    names = ["lot 7/Part-12.png", "lot 8/part-12.png", "100%.png", "1000.png", "a_b.png", "acb.png", "\0.png"]
    store.add([inspection(name=name) for name in names])

    def found(text):
        return [one.name for one in reversed(store.inspections(Filter(name_contains=text), limit=99))]

    assert found("part-12") == names[:2]
    assert found("LOT 8") == [names[1]]
    assert found("0%") == ["100%.png"]
    assert found("a_b") == ["a_b.png"]
    assert found("\0") == ["\ufffd.png"]
    assert store.count(Filter(name_contains=".png")) == len(names)


def test_decisions_of_a_reviewer_that_still_count(store):
    first, second, third, fourth = (one.id for one in store.add([inspection() for _ in range(4)]))
    for id, review in (
        (first, accept(at=NOON - timedelta(days=2))),
        (second, accept()),
        (third, accept(at=NOON + timedelta(seconds=1))),
        (third, accept(decision="undo", at=NOON + timedelta(seconds=2))),
        (fourth, accept(reviewer="Bo")),
        (first, accept(at=NOON + timedelta(seconds=3))),
    ):
        store.review(id, review)
    assert store.decided("Ada", since=NOON - timedelta(days=1), limit=9) == [first, second]
    assert store.decided("Ada", since=NOON - timedelta(days=1), limit=1) == [first]
    store.review(second, accept(reviewer="Bo", at=NOON + timedelta(seconds=4)))
    assert store.decided("Ada", since=NOON - timedelta(days=1), limit=9) == [first]


def test_of_concurrent_reviews_the_last_stored_one_counts(store):
    (kept,) = store.add([inspection()])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.review(kept.id, accept(comment=str(number))), range(40)))
    reviews = store.reviews(kept.id)
    assert sorted(int(review.comment) for review in reviews) == list(range(40))
    assert store.inspection(kept.id).review == reviews[-1]


def test_the_last_rate_counts(store):
    assert store.rate("c" * 64) is None
    changes = [
        RateChange(at=NOON, bundle_hash=bundle * 64, false_alarm_rate=rate, actor="Ada")
        for bundle, rate in (("c", 0.01), ("c", 0.1 + 0.2), ("d", 0.05))
    ]
    for change in changes:
        store.add_rate(change)
    assert store.rates() == changes
    assert store.rate("c" * 64) == changes[1]


def test_tokens(store):
    expires = NOON + timedelta(days=30)
    made = [
        Token(name="line 1", role="operator", digest="1" * 64, created_at=NOON),
        Token(name="Ada", role="engineer", digest="2" * 64, created_at=NOON, expires_at=expires),
    ]
    kept = [store.add_token(token) for token in made]
    assert kept == store.tokens() == [replace(token, id=number) for number, token in enumerate(made, start=1)]
    assert store.token("2" * 64) == kept[1]
    assert store.token("\0") is None
    assert [(one.event, one.actor, one.detail["name"]) for one in store.audit(limit=9)] == [
        ("token_created", "server", "Ada"),
        ("token_created", "server", "line 1"),
    ]
    revoked = replace(kept[0], revoked_at=NOON)
    assert store.revoke(1, NOON) == revoked
    assert store.revoke(1, NOON + timedelta(hours=1)) == revoked  # revoked before
    assert store.tokens() == [revoked, kept[1]]
    with pytest.raises(DataError, match=r"'again' is that of another token. Draw a new one"):
        store.add_token(replace(made[0], name="again"))


def test_one_valid_token_of_an_engineer_remains(store):
    """Also if several are revoked at the same time, and an expired one does not count."""
    expired = Token(name="x", role="engineer", digest="9" * 64, created_at=NOON, expires_at=NOON - timedelta(hours=1))
    store.add_token(expired)
    for number in range(4):
        store.add_token(replace(expired, digest=str(number) * 64, expires_at=None))

    def revoke(id):
        try:
            return store.revoke(id, NOON, actor="Ada", by=id)
        except LastTokenError:
            return None

    with ThreadPoolExecutor(4) as pool:
        revoked = list(pool.map(revoke, (2, 3, 4, 5)))
    assert revoked.count(None) == 1
    assert [one.is_valid(NOON) for one in store.tokens()].count(True) == 1
    assert store.revoke(1, NOON) is not None  # it has expired
    entries = store.audit(event="token_revoked", limit=9)
    assert sorted((one.actor, one.token) for one in entries) == [
        *(("Ada", one.id) for one in revoked if one is not None),
        ("server", None),
    ]


def test_a_rate_change_is_in_the_audit(store):
    change = RateChange(at=NOON, bundle_hash="c" * 64, false_alarm_rate=0.01, actor="Ada")
    store.add_rate(change, token=3)
    (entry,) = store.audit(limit=2)
    assert (entry.event, entry.actor, entry.token) == ("rate_changed", "Ada", 3)
    assert entry.detail == {"bundle_hash": "c" * 64, "false_alarm_rate": 0.01}


def test_pages_of_the_audit(store):
    for number in range(7):
        store.add_audit("login" if number % 2 else "logout", actor=str(number), address="10.0.0.7")
    found = store.audit(limit=3)
    assert store.audit(limit=9) == [
        *found,
        *store.audit(before=found[-1].id, limit=3),
        *store.audit(before=found[-1].id - 3, limit=3),
    ]
    assert [one.actor for one in store.audit(event="login", limit=9)] == ["5", "3", "1"]
    assert store.audit(line="press 4", limit=9) == []


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET actor = 'Eve'",
        "UPDATE audit SET at = 0 WHERE id = 1",
        "DELETE FROM audit",
        "DELETE FROM audit WHERE id = 2",
        "INSERT OR REPLACE INTO audit SELECT id, at, event, 'Eve', token, address, detail, line FROM audit",
        "REPLACE INTO audit SELECT id, at, event, 'Eve', token, address, detail, line FROM audit",
        "TRUNCATE audit",
    ],
)
def test_the_database_keeps_the_audit_as_it_is(store, statement):
    for actor in ("Ada", "Bo"):
        store.add_audit("login", actor=actor)
    before = store.audit(limit=9)
    with pytest.raises((StoreError, sa.exc.IntegrityError)), store.database.writing() as connection:
        connection.exec_driver_sql(statement)
    assert store.audit(limit=9) == before
    store.add_audit("login", actor="Cy")
    assert len(store.audit(limit=9)) == 3


def inspections_with_shared_files(draw, count=40):
    """Return inspections of which some share files and some have none."""
    sizes = {digest: draw.randrange(1, 1000) for digest in "0123456789abcdef"}
    made = []
    for _ in range(count):
        image, grids = draw.choice("01234567"), draw.choice("789abcde")  # 7 may be either
        some = stored_image(image, grids, image_bytes=sizes[image], grids_bytes=sizes[grids])
        moment = NOON + timedelta(hours=draw.randrange(100))
        made.append(inspection(image=some if draw.random() < 0.8 else None, received_at=moment))
    return made


def contents(inspections):
    """Return the size of each referenced file by its hash."""
    return {
        digest: size
        for one in inspections
        if one.image
        for digest, size in (
            (one.image.image_hash, one.image.image_bytes),
            (one.image.grids_hash, one.image.grids_bytes),
        )
    }


@pytest.mark.parametrize(("chunk", "seed"), [(3, 0), (3, 1), (500, 2)])
def test_expire_removes_old_inspections_and_returns_unreferenced_files(store, monkeypatch, chunk, seed):
    monkeypatch.setattr(module, "CHUNK", chunk)
    kept = store.add(inspections_with_shared_files(random.Random(seed)))
    store.review(kept[0].id, accept())
    for hours in (0, 20, 21, 70, 200):
        before = NOON + timedelta(hours=hours)
        left = [one for one in kept if one.received_at >= before]
        gone = contents(kept).keys() - contents(left).keys()
        freed = list(store.expire(before=before))
        assert sorted(freed) == sorted(gone)
        assert [replace(one, review=None) for one in store.iter_inspections(ALL)] == left
        assert store.bytes_used() == sum(contents(left).values())
        assert store.unreferenced(set(gone) | contents(left).keys()) == set(gone)
        kept = left
    assert store.reviews(1) == []


@pytest.mark.parametrize(("chunk", "seed"), [(3, 0), (3, 1), (500, 2)])
def test_shrink_removes_no_more_images_than_needed(store, monkeypatch, chunk, seed):
    monkeypatch.setattr(module, "CHUNK", chunk)
    kept = store.add(inspections_with_shared_files(random.Random(seed)))
    store.review(kept[0].id, accept())
    exactly = sum(contents(kept[-6:]).values())
    for max_bytes in (10**9, exactly, exactly - 1, 100, 0):
        left = list(kept)
        oldest = iter(range(len(left)))
        while sum(contents(left).values()) > max_bytes:  # one at a time
            index = next(oldest)
            left[index] = replace(left[index], image=None)
        freed = list(store.shrink(max_bytes=max_bytes))
        assert sorted(freed) == sorted(contents(kept).keys() - contents(left).keys())
        assert [replace(one, review=None) for one in store.iter_inspections(ALL)] == left
        assert store.bytes_used() == sum(contents(left).values()) <= max_bytes
        kept = left
    assert len(store.reviews(1)) == 1


def test_concurrent_writers_readers_and_retention(store, tmp_path):
    """A few files with many references are written and removed; no referenced file may be missing."""
    files = Files(tmp_path / "files")
    ended = threading.Event()

    def keep(seed):
        draw = random.Random(seed)
        ids = []
        for number in range(40):
            image, grids = (bytes([draw.randrange(5)]) * 50 for _ in range(2))
            with files.write_lock:
                some = replace(
                    stored_image(),
                    image_hash=files.put(image),
                    grids_hash=files.put(grids),
                    image_bytes=50,
                    grids_bytes=50,
                )
                moment = NOON + timedelta(seconds=draw.randrange(100))
                made = [inspection(number, name=f"{seed}", received_at=moment, image=some) for _ in range(3)]
                kept = store.add(made)
            assert [one.name for one in kept] == [f"{seed}"] * 3
            ids += [one.id for one in kept]
        return ids

    def read():
        rounds = 0
        while not ended.is_set():
            ids = [one.id for one in store.iter_inspections(ALL)]
            assert ids == sorted(set(ids))
            assert sum(one.anomalous for one in store.counts(ALL, bucket="hour")) <= 3 * 40 * 3
            rounds += 1
        return rounds

    def retain():
        draw = random.Random(9)
        removed = 0
        while not ended.is_set():
            for digest in [
                *store.expire(before=NOON + timedelta(seconds=draw.randrange(90))),
                *store.shrink(max_bytes=draw.randrange(400)),
            ]:
                removed += files.remove_unreferenced(store.unreferenced, digest)
        return removed

    with ThreadPoolExecutor(5) as pool:
        others = [pool.submit(read), pool.submit(retain)]
        try:
            ids = [id for some in pool.map(keep, range(3)) for id in some]
        finally:
            ended.set()
        assert all(other.result() > 0 for other in others)
    assert len(set(ids)) == 3 * 40 * 3
    left = list(store.iter_inspections(ALL))
    assert {one.id for one in left} <= set(ids)
    assert sorted(files.all_hashes()) == sorted(contents(left))
    for one in left:
        if one.image:
            assert len(files.read(one.image.image_hash) + files.read(one.image.grids_hash)) == 100
    files.close()


STORES_UNTIL_KILLED = """
import os, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from inspections import inspection, stored_image
from normweave.serve.files import Files
from normweave.serve.store import Store

folder = Path(sys.argv[2])
files, store = Files(folder / "files"), Store.open(f"sqlite:///{folder}/store.db")
while True:
    made = []
    for _ in range(3):
        image, grids = os.urandom(20_000), os.urandom(5_000)
        with files.write_lock:
            some = replace(stored_image(), image_hash=files.put(image), grids_hash=files.put(grids))
            made.append(inspection(name=some.image_hash, image=some))
    for one in store.add(made):
        print(one.id, one.name, flush=True)
"""


def test_every_stored_inspection_survives_kill_9(tmp_path, request):
    answered = {}
    for kill in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", STORES_UNTIL_KILLED, str(request.path.parents[1]), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            lines = [process.stdout.readline() for _ in range(5 + kill * 7)]
            process.send_signal(signal.SIGKILL)
            lines += [line for line in process.stdout if line.endswith("\n")]
        assert process.returncode == -signal.SIGKILL
        stored = dict(line.split() for line in lines)
        assert not stored.keys() & answered.keys()
        answered |= stored
    with (
        closing(Store.open(f"sqlite:///{tmp_path}/store.db")) as store,
        closing(Files(tmp_path / "files")) as files,
    ):
        kept = {str(one.id): one for one in store.iter_inspections(ALL)}
        assert answered.items() <= {id: one.name for id, one in kept.items()}.items()
        for one in kept.values():  # inspections that were stored but not answered also have their files
            assert len(files.read(one.image.image_hash) + files.read(one.image.grids_hash)) == 25_000
        with store.database.reading() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
