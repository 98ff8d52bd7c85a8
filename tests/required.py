"""Tests that need a program are skipped where it is absent, unless NORMWEAVE_REQUIRE names it, as in `.ci/run`."""

import os

import pytest


def absent(what, reason):
    """Skip the test, or fail if NORMWEAVE_REQUIRE names the program."""
    if what in os.environ.get("NORMWEAVE_REQUIRE", "").split():
        pytest.fail(reason)
    pytest.skip(reason)
