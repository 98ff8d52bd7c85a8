"""The page of the tokens."""

from datetime import timedelta

import cv2
import numpy as np
import pytest
import segno

from inspections import NOON
from normweave.serve.access import NewToken
from normweave.serve.pages.tokens import TokensPage, address, card, notes, table
from normweave.serve.records import Token
from normweave.serve.templating import render_macro

HOSTILE = "<img src=x onerror=alert(1)>"
SECRET = "nw_" + "s" * 43
ORIGIN = "https://press-pc.example:8443"


def token(id=1, **given):
    return Token(**{"id": id, "name": "press 4", "role": "operator", "digest": "1" * 64, "created_at": NOON} | given)


def test_valid_tokens_come_first_and_only_they_can_be_revoked():
    tokens = [
        token(1, expires_at=NOON - timedelta(days=1)),
        token(2),
        token(3, revoked_at=NOON - timedelta(days=2)),
        token(4, role="engineer", expires_at=NOON + timedelta(days=1)),
    ]
    html = table(tokens, now=NOON)
    assert [int(part.split("<")[0]) for part in html.split("<small>token ")[1:]] == [4, 2, 3, 1]
    assert [part[0] for part in html.split('data-id="')[1:]] == ["4", "2"]
    assert html.count(">expired<") == 1
    assert "1" * 64 not in html


@pytest.mark.parametrize("days", [None, 30])
def test_the_card_has_line_name_role_and_expiry_but_no_readable_token(days):
    expires = None if days is None else NOON + timedelta(days=days)
    html = card(NewToken(token(expires_at=expires), SECRET), origin=ORIGIN, line="Press 4")
    for words in ("<b>Press 4</b>", "press 4", "operator", "token 1", "press-pc.example:8443"):
        assert words in html
    assert ("does not expire" in html) == (days is None)
    assert (f"until {(NOON + timedelta(days=30)).astimezone():%Y-%m-%d}" in html) == (days == 30)
    assert SECRET not in html


def test_the_address_is_that_of_the_form_and_the_token_is_not_sent():
    where = address(NewToken(token(), SECRET), origin=ORIGIN)
    assert where == f"{ORIGIN}/login#{SECRET}"
    code = np.array(list(segno.make(where, error="m").matrix_iter(scale=4, border=4)), dtype=np.uint8)
    assert cv2.QRCodeDetector().detectAndDecode(255 * (1 - code))[0] == where


def test_text_is_escaped():
    new = NewToken(token(name=HOSTILE), SECRET)
    shown = [
        card(new, origin=f"http://{HOSTILE}", line=HOSTILE),
        notes(new, origin=HOSTILE),
        table([new.token], now=NOON),
        render_macro("tokens.html", "question", token=new.token, own=False),
    ]
    for html in shown:
        assert "<img" not in html
        assert "&lt;img" in html


@pytest.mark.parametrize(
    ("origin", "here"), [("http://127.0.0.1:8080", True), ("http://localhost", True), (ORIGIN, False)]
)
def test_a_card_that_works_on_this_pc_only_is_marked(origin, here):
    html = notes(NewToken(token(), SECRET), origin=origin)
    assert SECRET in html
    assert ("works on this PC only" in html) == here


def test_it_is_for_engineers():
    for role in ("engineer", "operator"):
        assert TokensPage.is_open_to(token(role=role)) == (role == "engineer")
