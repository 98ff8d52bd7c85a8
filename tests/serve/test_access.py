"""Tokens and sessions."""

import time
from datetime import UTC, datetime

import pytest

from normweave.errors import DataError
from normweave.serve.access import Access
from normweave.serve.records import NotFoundError


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


def test_a_session_cannot_be_forged_or_extended(access):
    made = access.create(name="Ada", role="operator")
    other = access.create(name="Eve", role="engineer")
    good = access.create_session(made.token)
    assert access.authenticate_session(good) == made.token
    number, until, proof = good.split(".")
    for forged in (
        f"{other.token.id}.{until}.{proof}",
        f"{number}.{int(until) + 1}.{proof}",
        f"{number}.{until}.{proof[:-1]}0" if proof[-1] != "0" else f"{number}.{until}.{proof[:-1]}1",
        f"{number}.{until}.",
        f"{number}.{until}",
        f"{number}..{proof}",
        f"²{number}.{until}.{proof}",
        "",
        "..",
        f"{number}.{'9' * 400}.{proof}",
    ):
        assert access.authenticate_session(forged) is None, forged


def test_a_session_ends_with_its_lifetime_or_its_token(service, tmp_path):
    access = Access(service.store, folder=tmp_path, session_hours=0)
    made = access.create(name="Ada", role="operator")
    assert access.authenticate_session(access.create_session(made.token, expires_at=time.time() - 1)) is None
    lasting = Access(service.store, folder=tmp_path, session_hours=1)
    cookie = lasting.create_session(made.token)
    assert lasting.authenticate_session(cookie) == made.token
    lasting.revoke(made.token.id)
    assert lasting.authenticate_session(cookie) is None


def test_a_session_survives_a_restart_but_not_a_new_key(service, access, tmp_path):
    made = access.create(name="Ada", role="operator")
    cookie = access.create_session(made.token)
    assert Access(service.store, folder=tmp_path, session_hours=1).authenticate_session(cookie) == made.token
    key = tmp_path / "session.key"
    assert key.stat().st_mode & 0o077 == 0
    key.unlink()
    assert Access(service.store, folder=tmp_path, session_hours=1).authenticate_session(cookie) is None
    key.write_bytes(b"short")
    with pytest.raises(DataError, match=r"session\.key has 5 bytes, but a key has 32\. Remove the file"):
        Access(service.store, folder=tmp_path, session_hours=1)
