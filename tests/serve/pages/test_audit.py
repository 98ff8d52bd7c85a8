"""The page of the audit."""

import pytest

from inspections import NOON
from normweave.serve.pages.audit import EVENTS, AuditPage, described, table
from normweave.serve.records import AuditEntry, Token

HOSTILE = "<img src=x onerror=alert(1)>"
TOKEN = {"id": 3, "name": HOSTILE, "role": "operator", "expires_at": None}
BUNDLE = {"bundle_hash": "c" * 64, "before": None, "false_alarm_rate": 0.01}


def entry(event, **given):
    return AuditEntry(at=NOON, event=event, **given)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (entry("login"), ""),
        (entry("login_failed", detail={"attempts": 1, "addresses": ["10.0.0.7"]}), "once, from 10.0.0.7"),
        (entry("login_failed", detail={"attempts": 7, "addresses": ["10.0.0.7"]}), "7 times, from 10.0.0.7"),
        (entry("token_revoked", detail=TOKEN), f"{HOSTILE} (token 3), operator"),
        (entry("rate_changed", detail=BUNDLE), "1 % for bundle cccccccccccc"),
        (entry("bundle_loaded", detail=BUNDLE), "bundle cccccccccccc"),
        (entry("bundle_loaded", detail=BUNDLE | {"before": "c" * 64}), "bundle cccccccccccc"),
        (entry("bundle_loaded", detail=BUNDLE | {"before": "d" * 64}), "bundle cccccccccccc, before dddddddddddd"),
        (
            entry("bundle_loaded", detail=BUNDLE | {"before": None, "views": {"back": "e" * 64}}),
            "bundle cccccccccccc, view back: eeeeeeeeeeee",
        ),
        (entry("shadow_started", detail=BUNDLE), "bundle cccccccccccc"),
        (entry("shadow_failed", detail=BUNDLE | {"reason": "No memory."}), "bundle cccccccccccc: No memory."),
        (entry("model_promoted", detail=BUNDLE | {"before": "d" * 64}), "bundle cccccccccccc, before dddddddddddd"),
    ],
)
def test_events_in_words(one, words):
    assert described(one) == words
    assert one.event in EVENTS


@pytest.mark.parametrize(
    ("event", "made", "expected"),
    [
        ("teach_started", None, "training of a product started"),
        ("teach_discarded", None, "training thrown away"),
        ("teach_discarded", "c" * 64, "new bundle thrown away"),
    ],
)
def test_trainings_in_words(event, made, expected):
    detail = {"category": "cloth", "subclass": "a", "images": 10, "base": "b" * 64, "bundle_hash": made}
    assert f'<td class="text">{expected}</td>' in table([entry(event, detail=detail)])


def test_names_are_escaped():
    html = table([entry("token_created", actor=HOSTILE, token=1, address=HOSTILE, detail=TOKEN, line=HOSTILE)])
    assert "<img" not in html
    assert html.count("&lt;img") == 4
    assert "No entries" in table([])


def test_it_is_for_engineers():
    for role in ("engineer", "operator"):
        token = Token(name="Ada", role=role, digest="1" * 64, created_at=NOON)
        assert AuditPage.is_open_to(token) == (role == "engineer")
