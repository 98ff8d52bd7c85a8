"""Features on disk, so that no image goes through the network twice.

Layout of the folder:

    FINGERPRINT/SEGMENT.f16   rows of D*h*w little-endian float16, one after another
    FINGERPRINT/SEGMENT.keys  one line a row: what identifies it

A segment is written by one process in one go and never again, so no locks are needed. A row's bytes are on disk before
its line is written: after a kill or a power cut at any moment, the whole lines say which rows are whole.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import batched
from pathlib import Path
from typing import NamedTuple
