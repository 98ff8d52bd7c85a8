"""The page Line has the state of each output as text, and its dead letters."""

from dataclasses import replace

from inspections import NOON
from normweave.serve.delivery import OutputState
from normweave.serve.delivery_store import DeadLetter
from normweave.serve.pages.line import sections
from normweave.serve.pages.live import follower
from normweave.serve.records import Token
from normweave.serve.replicas import Leader

ENGINEER = Token(name="Ada", role="engineer", digest="", created_at=NOON)
STATE = OutputState(
    name="mes",
    type="webhook",
    status="working",
    behind=0,
    attempts=0,
    last_error=None,
    last_success_at=NOON,
    dead_letters=0,
    removed=0,
)


def test_the_state_is_a_word_and_a_colour():
    for status, colour in (("working", "green"), ("behind", "amber"), ("failing", "red")):
        html = sections([replace(STATE, status=status)], {}, token=ENGINEER)
        assert f'class="light {colour}"' in html
        assert f">{status}</span>" in html
        assert "Send again" not in html


def test_what_is_wrong_is_shown():
    state = replace(STATE, status="failing", behind=1234, attempts=3, last_error="<b>no answer", removed=5)
    html = sections([state], {}, token=ENGINEER)
    for words in (
        "<dd>1,234</dd>",
        "<dd>3</dd>",
        "&lt;b&gt;no answer",
        "removed 5 messages before delivery",
        'data-id="-1"',
    ):
        assert words in html
    assert "Acknowledge" not in sections([state], {}, token=replace(ENGINEER, role="operator"))


def test_only_engineers_send_dead_letters_again():
    letter, *others = [
        DeadLetter(
            id=1, output="mes", at=NOON, reason="status 410", message={"type": type, "data": {"id": 7}}, again=False
        )
        for type in ("inspection.stored", "part.closed", "drift.alarm")
    ]
    state = replace(STATE, status="behind", dead_letters=3)
    html = sections([state], {"mes": [letter]}, token=ENGINEER)
    for words in ("Inspection 7", "status 410", "and 2 more", 'data-id="1"', "Send again"):
        assert words in html
    html = sections([state], {"mes": others}, token=ENGINEER)
    assert 'href="/parts?id=7">Part verdict 7' in html
    assert 'href="/drift">Alarm of drift 7' in html
    assert "Send again" not in sections([state], {"mes": [letter]}, token=replace(ENGINEER, role="operator"))


def test_without_outputs():
    assert "no outputs" in sections([], {}, token=ENGINEER)


def test_the_server_that_leads_is_named_on_the_others():
    html = follower(Leader("<press-5>:8080", NOON))
    assert "<b>&lt;press-5&gt;:8080</b> leads since 2026-03-05" in html
    assert "This server does not lead the line" in html
    assert "No server of the line leads at this moment" in follower(None)
