"""What a machine may lack: its tests are skipped there, but not where the gate says that it must not."""

import os

import pytest


def absent(what, reason):
    """Skip, or fail where NORMWEAVE_REQUIRE names it."""
    if what in os.environ.get("NORMWEAVE_REQUIRE", "").split():
        pytest.fail(reason)
    pytest.skip(reason)
