"""All caches are below one folder."""

from pathlib import Path

import pytest

from normweave.caches import cache_folder


@pytest.mark.parametrize(("home", "expected"), [("/large", "/large"), ("", "/user/.cache"), (None, "/user/.cache")])
def test_the_folder_is_that_of_the_system_unless_it_is_not_set(monkeypatch, home, expected):
    monkeypatch.setenv("HOME", "/user")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert cache_folder("features") == Path(expected, "normweave", "features")
