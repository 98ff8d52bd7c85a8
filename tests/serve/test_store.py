"""What was added is there, as it was, on both databases; and what was forgotten is nowhere."""

import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normweave.errors import ConfigError, DataError, MissingError
from normweave.serve import database, tables
from normweave.serve import store as module
from normweave.serve.database import StoreError
from normweave.serve.files import Files
from normweave.serve.records import (
    Count,
    Filter,
    Inspection,
    RateChange,
    Review,
    ScoredImage,
    StoredImage,
    Token,
)
from normweave.serve.store import Store
from normweave.types import DefectBox, Outcome, Tile

NOON = datetime(2026, 3, 5, 12, 0, 0, 123456, tzinfo=UTC)  # a Thursday
ALL = Filter()


def picture(image="a", grids="b", *, image_bytes=1000, grids_bytes=100):
    return StoredImage(
        image_hash=image * 64,
        image_type="image/png",
        image_bytes=image_bytes,
        grids_hash=grids * 64,
        grids_bytes=grids_bytes,
        tiles=(Tile(0, 0, 300, 400), Tile(0, 380, 300, 400)),
        smoothing=0.1 + 0.2,
        map_threshold=0.7 + 0.1,
    )


def inspection(number=0, **changes):
    """A judged image with every field set."""
    outcome = Outcome(
        image_path=None,
        verdict="anomalous",
        pred_score=0.1 + 0.2,
        p_value=1 / 3,
        threshold=5e-324,
        false_alarm_rate=0.01,
        category="cloth",
        subclass="twill",
        subclass_distance=1.7976931348623157e308,
        subclass_p_value=2 / 3,
        unseen=True,
        experts=(("cloth/twill", 0.1 + 0.7), ("cloth/päni\0\ud800", 0.2)),
        adapted=True,
        boxes=(DefectBox(1, 2, 3, 4, 0.1), DefectBox(5, 6, 7, 8, 1e-17)),
        height=300,
        width=780,
        latency_ms=12.3,
        model="adapted-moe",
        bundle_hash="c" * 64,
    )
    made = Inspection(
        received_at=NOON + timedelta(seconds=number),
        name=f"part {number}.png",
        source="api",
        actor="line 1",
        outcome=outcome,
        routed=3,
        image=picture(),
    )
    said = {name: changes.pop(name) for name in tuple(changes) if hasattr(outcome, name)}
    return replace(made, outcome=replace(outcome, **said), **changes)


def unreadable(**changes):
    outcome = Outcome(image_path="torn.png", error="The file ends in the middle.")
    return replace(inspection(), outcome=outcome, routed=None, image=None, **changes)


def accept(**changes):
    return replace(Review(at=NOON, decision="accept", reviewer="Ada", comment="a shadow"), **changes)


# ── what was added comes back ────────────────────────────────────────────────────────────────────────────────────────


def test_comes_back_as_it_was(store):
    given_ = [inspection(), unreadable(), inspection(routed=None, subclass=None, experts=(), boxes=())]
    kept = store.add(given_)
    assert [replace(one, id=0) for one in kept] == given_
    assert [store.inspection(one.id) for one in kept] == kept
    assert type(kept[0].image.tiles[0]) is Tile
    assert type(kept[0].outcome.boxes[0]) is DefectBox


def test_what_it_takes_to_judge_anew(store):
    scores = [0.1 + 0.7, 2.5, 1e-17]
    store.add(
        [
            inspection(pred_score=scores[0]),
            inspection(pred_score=9.0, bundle_hash="d" * 64),
            unreadable(),
            inspection(
                pred_score=scores[1], verdict="normal", unseen=False, subclass_distance=None, routed=None
            ),
            inspection(pred_score=scores[2]),
        ]
    )
    judged = store.scored_images("c" * 64, newest=10)
    assert [one.score for one in judged] == scores[::-1]  # the newest first
    assert judged[1] == ScoredImage("normal", scores[1], None, None, False)
    first = inspection().outcome
    assert judged[2] == ScoredImage(first.verdict, scores[0], first.subclass_distance, 3, True)
    assert store.scored_images("c" * 64, newest=2) == judged[:2]
    assert store.scored_images("e" * 64, newest=2) == []


def test_ids_rise_in_the_order_of_arrival_and_are_never_given_again(store):
    first = store.add([inspection(number) for number in range(2000)])
    assert [one.id for one in first] == list(range(1, 2001))
    assert [one.name for one in first] == [f"part {number}.png" for number in range(2000)]
    assert len(list(store.expire(before=NOON + timedelta(days=1)))) == 2
    assert store.count(ALL) == 0
    assert store.add([inspection()])[0].id == 2001
    assert store.add([]) == []


def test_all_or_none(store):
    with pytest.raises(sa.exc.StatementError):
        store.add([inspection(), inspection(received_at=datetime(2026, 1, 1))])  # no time zone
    assert store.count(ALL) == 0
    with pytest.raises(ValueError, match="stored once and reviewed afterwards"):
        store.add([inspection(id=3)])


def test_what_is_not_there_is_not_found(store):
    for number in (0, 1, -1, 2**63, -(2**70), 2**70):
        assert store.inspection(number) is None
        assert store.reviews(number) == []
        assert store.revoke(number, NOON) is None
        with pytest.raises(
            LookupError, match=f"There is no inspection {number}, or retention has removed it"
        ):
            store.review(number, accept())


ODD = st.text(st.characters(codec=None), max_size=300) | st.sampled_from(
    [
        "\0",
        "\ud800",
        "\udcff.png",
        "../../etc/passwd",
        "x" * 10_000,
        "'; DROP TABLE inspections; --",
        "%s :name {}",
    ]
)
ZONES = st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-9))])
NUMBERS = st.floats(allow_nan=False)


def kept_text(text, length=255):
    """What the store promises to keep of a text."""
    refused = {"\0", *map(chr, range(0xD800, 0xE000))}
    return "".join("\N{REPLACEMENT CHARACTER}" if one in refused else one for one in text[:length])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(name=ODD, reviewer=ODD, moment=st.datetimes(timezones=ZONES), score=NUMBERS, peak=NUMBERS)
def test_odd_text_moments_and_numbers_come_back(store, name, reviewer, moment, score, peak):
    box = DefectBox(0, 0, 1, 1, peak)
    made = inspection(name=name, received_at=moment, pred_score=score, boxes=(box,), error=name)
    (kept,) = store.add([made])
    assert kept.name == kept_text(name)
    assert kept.outcome.error == kept_text(name, 4000)
    assert (kept.received_at, kept.received_at.tzinfo) == (moment, UTC)
    assert (kept.outcome.pred_score, kept.outcome.boxes) == (score, (box,))
    assert kept in store.inspections(Filter(name=name), limit=1000)
    review = Review(at=moment, decision="accept", reviewer=reviewer, comment=name)
    as_kept = replace(review, reviewer=kept_text(reviewer), comment=kept_text(name, 4000))
    assert store.review(kept.id, review).review == as_kept
    assert store.reviews(kept.id) == [as_kept]


# ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def many(count=80):
    """Inspections of every sort over some weeks, not in the order of their moments."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        moment = NOON + timedelta(minutes=draw.randrange(-30_000, 30_000))
        some = {"received_at": moment, "source": draw.choice(["api", "page"]), "name": f"{number % 9}.png"}
        if draw.random() < 0.2:
            made.append(unreadable(**some))
            continue
        verdict = draw.choice(["normal", "anomalous", "unknown"])
        subclass = draw.choice(["twill", "Plain", None])
        bundle = draw.choice("cd") * 64
        p = draw.choice([0.01, 0.02, 0.5])
        category = draw.choice(["cloth", "wood"])
        some |= {
            "verdict": verdict,
            "subclass": subclass,
            "bundle_hash": bundle,
            "p_value": p,
            "category": category,
        }
        made.append(inspection(**some))
    return made


@pytest.fixture
def filled(store):
    """The store, and what it should hold, oldest first."""
    kept = store.add(many())
    for number, decision in enumerate(["accept", "reject", "undo"] * 8):
        kept[number] = store.review(kept[number].id, accept(decision=decision))
    return store, kept


ASKED = {
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
    "p": (Filter(p_value_below=0.02), lambda one: (one.outcome.p_value or 1) <= 0.02),
    "two": (
        Filter(since=NOON, category="cloth"),
        lambda one: one.received_at >= NOON and one.outcome.category == "cloth",
    ),
    "none": (Filter(name="nobody"), lambda one: False),
}


@pytest.mark.parametrize("chunk", [3, 500])
def test_a_filter_finds_what_it_asks_for_and_nothing_else(filled, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    store, kept = filled
    for name, (chosen, belongs) in ASKED.items():
        expected = [one for one in kept if belongs(one)]
        assert list(store.iter_inspections(chosen)) == expected, name
        assert store.inspections(chosen, limit=1000) == expected[::-1], name
        assert store.count(chosen) == len(expected), name


def test_pages_follow_each_other_without_gap(filled):
    store, kept = filled
    found = store.inspections(ALL, limit=7)
    while page := store.inspections(ALL, before=found[-1].id, limit=7):
        found += page
    assert found == kept[::-1]
    assert store.inspections(ALL, before=2**80, limit=1) == kept[-1:]
    assert store.inspections(ALL, before=-(2**80), limit=1) == []


def test_each_reads_a_few_at_a_time_and_ends_where_it_began(store, monkeypatch):
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

    for chosen, belongs in ASKED.values():
        expected = Counter()
        for one in filter(belongs, kept):
            place = (begins(one.received_at), one.outcome.category, one.outcome.subclass)
            expected[*place, one.outcome.verdict or "unreadable"] += 1
            if one.review:
                expected[*place, one.review.decision + "ed"] += 1
        found = store.counts(chosen, bucket=bucket)
        places = [(one.start, one.category, one.subclass) for one in found]
        assert places == sorted(places, key=lambda place: (place[0], place[1] or "", place[2] or ""))
        assert len(set(places)) == len(places)
        names = ("normal", "anomalous", "unknown", "unreadable", "accepted", "rejected")
        assert +expected == +Counter(
            {
                (*place, name): getattr(one, name)
                for place, one in zip(places, found, strict=True)
                for name in names
            }
        )


def test_counts_by_hand(store):
    sunday, monday = datetime(2026, 3, 8, 23, 59, 59, 999_999, tzinfo=UTC), datetime(2026, 3, 9, tzinfo=UTC)
    early = datetime(1969, 12, 31, 23, 30, tzinfo=UTC)  # a clock that lost its battery, west of Greenwich
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
        for start in (
            datetime(1969, 12, 29, tzinfo=UTC),
            datetime(2026, 3, 2, tzinfo=UTC),
            monday,
        )
    ]


def test_what_pages_ask_for_goes_through_an_index(tmp_path):
    """SQLite says how it would go about it; with few rows PostgreSQL rightly reads them all."""
    with (
        closing(Store.open(f"sqlite:///{tmp_path}/store.db")) as store,
        store._engine.connect() as connection,
    ):
        connection = connection.execution_options(normweave_writes=False)

        def plan(chosen):
            query = sa.select(tables.INSPECTIONS).where(*module._clauses(chosen))
            query = query.order_by(tables.INSPECTIONS.c.id.desc()).limit(50)
            text = query.compile(connection, compile_kwargs={"literal_binds": True})
            return " ".join(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}"))

        assert plan(ALL) == "SCAN inspections"  # from the end, by id
        for index, chosen in {
            "received_at": Filter(since=NOON, until=NOON + timedelta(hours=1)),
            "verdict": Filter(verdicts=("unknown",)),
            "name": Filter(name="3.png"),
            "bundle_hash": Filter(bundle_hash="d" * 64),
            "decision": Filter(reviewed=False),
        }.items():
            assert f"SEARCH inspections USING INDEX inspections_{index} " in plan(chosen)


# ── reviews, rates, tokens ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_last_review_stands_and_all_are_kept(store):
    other, kept = store.add([inspection(), inspection()])
    said = [
        accept(),
        accept(decision="reject", comment="a hole", at=NOON - timedelta(days=1)),  # by a clock that is behind
        accept(decision="undo", reviewer="Bo"),
    ]
    assert store.review(kept.id, said[0]) == replace(kept, review=said[0])
    assert store.review(kept.id, said[1]) == replace(kept, review=said[1])
    assert store.inspection(kept.id) == replace(kept, review=said[1])
    assert store.review(kept.id, said[2]) == kept  # brings the first one not back
    assert store.review(kept.id, said[2]) == kept
    assert store.count(Filter(reviewed=False)) == 2
    assert store.reviews(kept.id) == [*said, said[2]]
    assert store.reviews(other.id) == []


def test_of_many_at_once_the_last_that_was_kept_stands(store):
    (kept,) = store.add([inspection()])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.review(kept.id, accept(comment=str(number))), range(40)))
    said = store.reviews(kept.id)
    assert sorted(int(review.comment) for review in said) == list(range(40))
    assert store.inspection(kept.id).review == said[-1]


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
    revoked = replace(kept[0], revoked_at=NOON)
    assert store.revoke(1, NOON) == revoked
    assert store.revoke(1, NOON + timedelta(hours=1)) == revoked  # ended already
    assert store.tokens() == [revoked, kept[1]]
    with pytest.raises(DataError, match=r"'again' is that of another token. Draw a new one"):
        store.add_token(replace(made[0], name="again"))


# ── retention ────────────────────────────────────────────────────────────────────────────────────────────────────────


def shared_pictures(draw, count=40):
    """Inspections some of which share an image, some the scores, and some have none."""
    sizes = {digest: draw.randrange(1, 1000) for digest in "0123456789abcdef"}
    made = []
    for _ in range(count):
        image, grids = draw.choice("01234567"), draw.choice("789abcde")  # 7 may be either
        some = picture(image, grids, image_bytes=sizes[image], grids_bytes=sizes[grids])
        moment = NOON + timedelta(hours=draw.randrange(100))
        made.append(inspection(image=some if draw.random() < 0.8 else None, received_at=moment))
    return made


def contents(inspections):
    """The sizes of what these refer to, by hash."""
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
def test_expires_what_is_old_and_names_what_nothing_refers_to(store, monkeypatch, chunk, seed):
    monkeypatch.setattr(module, "CHUNK", chunk)
    kept = store.add(shared_pictures(random.Random(seed)))
    store.review(kept[0].id, accept())
    for hours in (0, 20, 21, 70, 200):
        before = NOON + timedelta(hours=hours)
        left = [one for one in kept if one.received_at >= before]
        gone = contents(kept).keys() - contents(left).keys()
        freed = list(store.expire(before=before))
        assert sorted(freed) == sorted(gone)
        assert [replace(one, review=None) for one in store.iter_inspections(ALL)] == left
        assert store.bytes_used() == sum(contents(left).values())
        assert not any(store.is_referenced(digest) for digest in gone)
        assert all(store.is_referenced(digest) for digest in contents(left))
        kept = left
    assert store.reviews(1) == []


@pytest.mark.parametrize(("chunk", "seed"), [(3, 0), (3, 1), (500, 2)])
def test_shrinks_to_a_size_and_no_further(store, monkeypatch, chunk, seed):
    monkeypatch.setattr(module, "CHUNK", chunk)
    kept = store.add(shared_pictures(random.Random(seed)))
    store.review(kept[0].id, accept())
    exactly = sum(contents(kept[-6:]).values())
    for max_bytes in (10**9, exactly, exactly - 1, 100, 0):
        left = list(kept)
        oldest = iter(range(len(left)))
        while sum(contents(left).values()) > max_bytes:  # the slow way: one after the other
            place = next(oldest)
            left[place] = replace(left[place], image=None)
        freed = list(store.shrink(max_bytes=max_bytes))
        assert sorted(freed) == sorted(contents(kept).keys() - contents(left).keys())
        assert [replace(one, review=None) for one in store.iter_inspections(ALL)] == left
        assert store.bytes_used() == sum(contents(left).values()) <= max_bytes
        kept = left
    assert len(store.reviews(1)) == 1


def test_many_keep_while_others_read_and_retention_removes(store, tmp_path):
    """Few contents that many refer to come and go all the time; none that is referred to may be missing."""
    files = Files(tmp_path / "files")
    ended = threading.Event()

    def keep(seed):
        draw = random.Random(seed)
        ids = []
        for number in range(40):
            image, grids = (bytes([draw.randrange(5)]) * 50 for _ in range(2))
            with files.write_lock:
                some = replace(
                    picture(),
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
                removed += files.remove_unless(store.is_referenced, digest)
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


KEEPS_ALL_THE_TIME = """
import os, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_store import inspection, picture
from normweave.serve.files import Files
from normweave.serve.store import Store

folder = Path(sys.argv[2])
files, store = Files(folder / "files"), Store.open(f"sqlite:///{folder}/store.db")
while True:
    made = []
    for _ in range(3):
        image, grids = os.urandom(20_000), os.urandom(5_000)
        with files.write_lock:
            some = replace(picture(), image_hash=files.put(image), grids_hash=files.put(grids))
            made.append(inspection(name=some.image_hash, image=some))
    for one in store.add(made):
        print(one.id, one.name, flush=True)
"""


def test_everything_answered_survives_kill_9(tmp_path, request):
    answered = {}
    for kill in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KEEPS_ALL_THE_TIME, str(request.path.parent), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            lines = [process.stdout.readline() for _ in range(5 + kill * 7)]
            process.send_signal(signal.SIGKILL)
            lines += [line for line in process.stdout if line.endswith("\n")]
        assert process.returncode == -signal.SIGKILL
        said = dict(line.split() for line in lines)
        assert not said.keys() & answered.keys()
        answered |= said
    with (
        closing(Store.open(f"sqlite:///{tmp_path}/store.db")) as store,
        closing(Files(tmp_path / "files")) as files,
    ):
        kept = {str(one.id): one for one in store.iter_inspections(ALL)}
        assert answered.items() <= {id: one.name for id, one in kept.items()}.items()
        for one in kept.values():  # what was kept and not answered has its files, too
            assert len(files.read(one.image.image_hash) + files.read(one.image.grids_hash)) == 25_000
        with store.database.reading() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"


def test_sqlite_writes_through_to_the_disk(tmp_path):
    with (
        closing(Store.open(f"sqlite:///{tmp_path}/store.db")) as store,
        store.database.reading() as connection,
    ):
        said = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert said == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


# ── the tables over time ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_migrations_make_the_tables_that_the_store_uses(store):
    with store.database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.METADATA) == []


NEXT_STEP = """
import sqlalchemy as sa
from alembic import op

revision = "0099"
down_revision = "0001"


def upgrade():
    op.add_column("inspections", sa.Column("lamp", sa.String(20)))
"""


def test_an_older_database_comes_to_head_and_a_newer_one_is_refused(database_url, tmp_path, monkeypatch):
    with closing(Store.open(database_url)) as store:
        kept = store.add(many())
    newer = tmp_path / "100% newer" / "migrations"  # a % has a meaning in alembic's settings
    shutil.copytree(database.MIGRATIONS, newer)
    (newer / "versions" / "0099_lamp.py").write_text(NEXT_STEP)
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", newer)
        with closing(Store.open(database_url)) as store:
            assert list(store.iter_inspections(ALL)) == kept
            with store.database.reading() as connection:
                assert (
                    connection.exec_driver_sql("SELECT count(*) FROM inspections WHERE lamp IS NULL").scalar()
                    == 80
                )
    with pytest.raises(
        DataError, match=r"is at revision 0099, and this normweave knows up to 0001. Upgrade with"
    ):
        Store.open(database_url)


def test_a_step_that_fails_leaves_the_database_as_it_was(database_url, tmp_path, monkeypatch):
    Store.open(database_url).close()
    newer = tmp_path / "migrations"
    shutil.copytree(database.MIGRATIONS, newer)
    (newer / "versions" / "0099_lamp.py").write_text(NEXT_STEP + "    op.drop_table('nothing')\n")
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", newer)
        with pytest.raises(StoreError, match="nothing"):
            Store.open(database_url)
    with closing(Store.open(database_url)) as store:
        assert store.add([inspection()])[0].id == 1
        with store.database.reading() as connection:
            assert "lamp" not in {
                column["name"] for column in sa.inspect(connection).get_columns("inspections")
            }


OPENS_WHEN_TOLD = """
import sys
from normweave.serve.store import Store
import alembic.command

print("ready", flush=True)
sys.stdin.readline()
Store.open(sys.argv[1]).close()
"""


def test_servers_that_start_at_once_migrate_once(database_url):
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", OPENS_WHEN_TOLD, database_url],
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


def test_connections_that_make_one_file_at_once_all_get_it(tmp_path):
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


def test_stores_of_one_process_are_made_at_once(tmp_path):
    start = threading.Barrier(4)

    def serve(number):
        start.wait()
        with closing(Store.open(tmp_path / f"{number}.db")) as store:
            return store.add([inspection()])[0].id

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(serve, range(4))) == [1, 1, 1, 1]


# ── databases that fail ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:pass%40word@127.0.0.1:1/parts",
        "postgresql+psycopg://ada@127.0.0.1:1/parts?password=pass%40word",
    ],
)
def test_a_database_that_cannot_be_reached_is_named_without_its_password(url):
    with pytest.raises(
        StoreError, match=r"postgresql\+psycopg://ada.* failed: .*Check that it runs"
    ) as caught:
        Store.open(url)
    said = str(caught.value)
    assert "127.0.0.1:1/parts" in said
    assert "pass" not in said.replace("password", "")
    assert "word@" not in said


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
def test_a_url_that_is_none_is_refused_without_its_password(url, why):
    with pytest.raises(ConfigError, match=why) as caught:
        Store.open(url)
    assert "Write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE" in str(caught.value)
    assert "word@h" not in str(caught.value)
    assert "rd@" not in str(caught.value)


def test_without_psycopg_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingError, match=r'pip install "normweave\[postgres\]"'):
        Store.open("postgresql://ada@host/parts")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        StoreError, match=r"nowhere/store.db failed: unable to open.*Check that its folder exists"
    ):
        Store.open(f"sqlite:///{tmp_path}/nowhere/store.db")


def test_a_file_that_another_program_holds_is_waited_for_and_then_named(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "TIMEOUT_SECONDS", 0.5)
    path = tmp_path / "store.db"
    with closing(Store.open(f"sqlite:///{path}")) as store, closing(sqlite3.connect(path)) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"database is locked. Check .* that no other program holds it"):
            store.add([inspection()])
        assert store.count(ALL) == 0  # reading goes on


def test_a_file_that_another_program_holds_for_a_moment_is_waited_for(tmp_path):
    path = tmp_path / "store.db"
    with closing(Store.open(path)) as store, closing(sqlite3.connect(path, check_same_thread=False)) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.3, other.execute, ["COMMIT"])
        timer.start()
        assert store.add([inspection()])[0].id == 1
        timer.join()


def test_a_lost_connection_fails_no_call_that_comes_after(postgres):
    url = postgres.database()
    with closing(Store.open(url)) as store:
        store.add([inspection()])
        postgres.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test_%'")
        store.ping()
        assert store.count(ALL) == 1


def test_a_connection_lost_in_the_middle_keeps_nothing_and_says_so(postgres):
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


def test_a_file_may_lie_anywhere(tmp_path):
    folder = tmp_path / "50% of what? #1"
    folder.mkdir()
    for _ in range(2):
        with closing(Store.open(folder / "store.db")) as store:
            store.add([inspection()])
    assert store.count(ALL) == 2
    store.close()
    assert "store.db" in {path.name for path in folder.iterdir()}


def test_a_database_of_few_characters_is_refused(postgres):
    url = postgres.database(encoding="LATIN1")
    with pytest.raises(
        DataError, match=r"is in LATIN1, which cannot hold every name. Make one in UTF-8: createdb"
    ):
        Store.open(url)
