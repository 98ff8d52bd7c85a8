"""Records of the store."""

from dataclasses import replace
from datetime import timedelta

from inspections import NOON
from normweave.serve.records import Token


def test_a_token_is_valid_until_it_expires_or_is_revoked():
    token = Token(name="camera 1", role="operator", digest="1" * 64, created_at=NOON)
    later = NOON + timedelta(days=1)
    assert token.is_valid(later)
    assert replace(token, expires_at=later).is_valid(NOON)
    assert not replace(token, expires_at=later).is_valid(later)
    assert not replace(token, revoked_at=NOON).is_valid(NOON)
