"""The head passes the contract that all heads of normweave pass."""

import pytest
from normweave_example.settings import MeanImageConfig

from normweave.testing import HeadContract


class TestMeanImage(HeadContract):
    """The tests of `HeadContract`, with the settings of this head."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls):
        """Return the settings."""
        return MeanImageConfig()
