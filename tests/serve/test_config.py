"""Limits of a server."""

import pytest

from normweave.errors import ConfigError
from normweave.serve.config import ServeConfig


def test_limits_are_checked():
    with pytest.raises(ConfigError, match="max_pixels must be above 0, got 0"):
        ServeConfig(max_pixels=0)
    with pytest.raises(ConfigError, match=r"max_waiting must be at least max_images \(32\), got 4"):
        ServeConfig(max_waiting=4)
    assert ServeConfig(keep_days=0, keep_gib=0) == ServeConfig()
