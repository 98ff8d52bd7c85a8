"""Failed logins in the audit."""

import time

import pytest

from normweave.serve import audit
from normweave.serve.audit import FailedLogins


@pytest.fixture
def failed(service):
    failed = FailedLogins(service.store)
    yield failed
    failed.close()


def entries(service):
    """Return (attempts, addresses) of each entry, oldest first."""
    found = service.store.audit(event="login_failed", limit=100)[::-1]
    return [(one.detail["attempts"], one.detail["addresses"]) for one in found]


def test_the_first_is_recorded_at_once_and_the_others_together(service, failed):
    for number in range(1000):
        failed.add(f"10.0.{number // 256}.{number % 256}")
    assert entries(service) == [(1, ["10.0.0.0"])]
    failed.close()
    _, (attempts, addresses) = entries(service)
    assert (attempts, len(addresses)) == (999, audit.MOST_ADDRESSES)
    failed.close()
    assert len(entries(service)) == 2


def test_a_flood_adds_few_entries(service, failed, monkeypatch):
    monkeypatch.setattr(audit, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(audit, "MOST_SECONDS", 0.2)
    added, end = 0, time.monotonic() + 0.6
    while time.monotonic() < end:
        failed.add("10.0.0.1")
        added += 1
    assert 3 <= len(entries(service)) <= 5  # after 0, 0.05, 0.15, 0.35 and 0.55 s
    time.sleep(0.3)
    assert sum(attempts for attempts, _ in entries(service)) == added


def test_after_a_pause_it_starts_anew(service, failed, monkeypatch):
    monkeypatch.setattr(audit, "FIRST_SECONDS", 0.02)
    failed.add("10.0.0.1")
    time.sleep(0.1)
    failed.add("10.0.0.2")
    assert entries(service) == [(1, ["10.0.0.1"]), (1, ["10.0.0.2"])]


def test_what_cannot_be_written_is_counted_later(service, failed, monkeypatch):
    def fail(*_, **__):
        raise audit.StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(service.store, "add_audit", fail)
        failed.add("10.0.0.1")
    failed.add("10.0.0.2")
    failed.close()
    assert entries(service) == [(2, ["10.0.0.1", "10.0.0.2"])]
