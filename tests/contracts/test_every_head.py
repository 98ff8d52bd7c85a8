"""Contract of every head, which covers `normweave.heads.base` and `normweave.testing`.

The heads are those of `HeadConfig`.
"""

from typing import get_args

import pytest

from normweave.config import HeadConfig
from normweave.testing import HeadContract


class TestEveryHead(HeadContract):
    @pytest.fixture(scope="class", params=get_args(HeadConfig), ids=lambda head: head.kind)
    @classmethod
    def config(cls, request):
        return request.param()
