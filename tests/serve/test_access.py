"""Tokens and sessions."""

import time
from datetime import UTC, datetime

import pytest

from normweave.serve.access import UNKNOWN_SECONDS, Access
from normweave.serve.records import NotFoundError
from normweave.serve.store import Store


def test_only_the_first_start_creates_a_token_for_each_role(access):
    made = access.create_first_tokens()
    assert [one.token.role for one in made] == ["engineer", "operator"]
    assert access.create_first_tokens() == []
    for one in made:
        assert len(one.secret) > 40
        assert access.authenticate(one.secret) == one.token


def test_secrets_are_not_stored(access, tmp_path):
    made = access.create_first_tokens()
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert content
    assert not any(one.secret.encode() in content for one in made)


def test_expired_revoked_and_unknown_tokens_are_refused(access):
    gone = access.create(name="guest", role="operator", days=1e-9)
    time.sleep(0.01)
    assert access.authenticate(gone.secret) is None
    made = access.create(name="guest", role="operator", days=1)
    assert access.authenticate(made.secret) == made.token
    access.revoke(made.token.id)
    assert access.authenticate(made.secret) is None
    assert access.authenticate("nw_unknown") is None
    assert access.authenticate("\udce9") is None
    with pytest.raises(NotFoundError, match="no token 99"):
        access.revoke(99)


def test_a_token_revoked_by_another_process_is_refused_after_the_cache_expires(service, access, tmp_path, monkeypatch):
    made = access.create(name="guest", role="operator")
    assert access.authenticate(made.secret) is not None
    service.store.revoke(made.token.id, datetime.now(UTC))
    monkeypatch.setattr("normweave.serve.access.CACHE_SECONDS", 0.0)
    assert access.authenticate(made.secret) is None


def test_a_session_cannot_be_guessed(access):
    made = access.create(name="Ada", role="operator")
    cookie = access.log_in(made.token, address="10.0.0.7")
    assert access.authenticate_session(cookie) == made.token
    assert len(cookie) > 40
    assert access.log_in(made.token, address="10.0.0.7") != cookie
    for forged in (cookie[:-1], f"{cookie}x", "", "\udce9", f"{made.token.id}.9999999999.{'a' * 64}"):
        assert access.authenticate_session(forged) is None, forged


def test_log_out_ends_the_session_for_everyone_who_has_its_cookie(access, service):
    made = access.create(name="Ada", role="operator")
    cookie, other = (access.log_in(made.token, address="10.0.0.7") for _ in range(2))
    access.log_out(cookie, address="10.0.0.7")
    assert access.authenticate_session(cookie) is None
    assert Access(service.store, session_hours=1).authenticate_session(cookie) is None  # also after a restart
    assert access.authenticate_session(other) == made.token
    access.log_out(cookie, address="10.0.0.7")
    assert len(service.store.audit(event="logout", limit=9)) == 1


def test_a_session_ends_after_its_last_use_and_after_its_longest_time(service, monkeypatch):
    monkeypatch.setattr("normweave.serve.access.CACHE_SECONDS", 0.0)
    second = 1 / 3600
    access = Access(service.store, session_hours=0.4 * second, session_max_hours=second)
    made = access.create(name="Ada", role="operator")
    unused, used = (access.log_in(made.token, address="") for _ in range(2))
    begin, ends = time.monotonic(), {}
    while len(ends) < 2:
        for name, cookie, use in (("unused", unused, False), ("used", used, True)):
            if name not in ends and access.authenticate_session(cookie, use=use) is None:
                ends[name] = time.monotonic() - begin
        time.sleep(0.02)
    assert 0.3 < ends["unused"] < 0.8
    assert 0.9 < ends["used"] < 1.5
    access.log_in(made.token, address="")  # removes the sessions that have ended
    with service.store.database.reading() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM sessions").scalar() == 1


def test_a_session_ends_with_its_token_and_survives_a_restart(service, access):
    made = access.create(name="Ada", role="operator")
    cookie = access.log_in(made.token, address="")
    again = Access(service.store, session_hours=1)
    assert again.authenticate_session(cookie) == made.token
    again.revoke(made.token.id)
    assert again.authenticate_session(cookie) is None


def test_secrets_of_sessions_are_not_stored(access, tmp_path):
    made = access.create(name="Ada", role="operator")
    cookie = access.log_in(made.token, address="")
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"sessions" in content
    assert cookie.encode() not in content


def test_a_token_that_another_server_has_just_made_is_valid(service, access):
    made = access.create(name="Ada", role="operator")
    other = Access(service.store, session_hours=12)
    assert other.authenticate(made.secret) == made.token  # its cache is filled
    time.sleep(UNKNOWN_SECONDS)
    new = access.create(name="Bob", role="operator")
    assert other.authenticate(new.secret) == new.token


def test_unknown_tokens_are_looked_for_in_the_store_twice_a_second_at_most(access, monkeypatch):
    reads = []
    read = Store.tokens
    access.create(name="Ada", role="operator")
    monkeypatch.setattr(Store, "tokens", lambda store: (reads.append(1), read(store))[1])
    for number in range(100):
        assert access.authenticate(f"nw_{number}") is None
    assert len(reads) <= 2
