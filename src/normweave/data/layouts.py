"""How data sets lie on disk: a row each, or a function. Everything becomes samples, in a stable order."""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from normweave.config import DataConfig
from normweave.data.manifest import ENDINGS, read_manifest
from normweave.errors import ConfigError, DataError, unknown
from normweave.types import Sample, Split

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
GOOD = ("good", "ok", "normal")
HOWTO = "To read another data set, write a manifest (normweave data manifest) or add a row to data/layouts.py."


@dataclass(frozen=True)
class Folders:
    """`category[/subclass]/{train,test}/{good,DEFECT}/STEM.*`, masks in `ground_truth/DEFECT/` beside train and test."""

    masks: tuple[str, ...]
    """Names a mask may have, tried in this order; {stem} is the image's name without its ending."""
    masks_required: bool
    source: str
