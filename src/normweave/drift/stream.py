"""The images of a line in the order of their time, from results of `normweave predict` or from a store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any, Literal

from normweave.drift.monitor import Image, cell_at
from normweave.drift.reference import numbers_of
from normweave.errors import ConfigError, DataError

By = Literal["hour", "shift", "camera"]
RANGE = 100
"""Images of a window, where the results have no time."""
SHIFTS = ("early", "late", "night")
"""Eight hours each; the first begins at 6 in the time zone of this machine."""


def window_of(by: By, at: datetime, camera: str) -> str:
    """Return the name of the hour, the shift or the camera of an image."""
    if by == "camera":
        return camera or "no name"
    local = at.astimezone()
    if by == "hour":
        return f"{local:%Y-%m-%d %H}:00"
    start = local - timedelta(hours=6)
    return f"{start:%Y-%m-%d} {SHIFTS[start.hour // 8]}"


def image_of(outcome: Mapping[str, Any] | Callable[[str], Any], *, name: str, at: str, window: str) -> Image | None:
    """Return an outcome as an image of the line; None if it could not be read, or has no statistics.

    Args:
        outcome: its fields by name, or a function that returns a field.
    """
    get = outcome if callable(outcome) else outcome.get
    numbers = None if get("error") is not None else numbers_of(get)
    if numbers is None:
        return None
    product = get("category"), get("subclass")
    verdict, unseen = str(get("verdict")), bool(get("unseen"))
    return Image(name, product, verdict, unseen, numbers, at, window, _fields(get))


def _fields(get: Callable[[str], Any]) -> tuple[int, ...]:
    """Return the fields of the image in which its boxes have their middles, each once."""
    boxes: Any = get("boxes") or ()
    corners = [
        (one["x"], one["y"], one["width"], one["height"]) if isinstance(one, Mapping) else one[:4] for one in boxes
    ]
    height, width = (get("height"), get("width")) if corners else (1, 1)
    return tuple(sorted({cell_at((x + w / 2) / width, (y + h / 2) / height) for x, y, w, h in corners}))


def from_results(path: Path, *, bundle_hash: str, by: By | None = None) -> Iterator[Image]:
    """Yield the images of a .jsonl file of `normweave predict`.

    They come in the order of `received_at` if each line has this time, as the REST interface returns it (newest first);
    else in the order of the lines. Only to sort them, all are in memory at once.

    Args:
        bundle_hash: of the bundle; results of another one cannot be compared.
        by: hour and shift need `received_at` in each line; the camera is the folder. None: windows of `RANGE` images.

    Raises:
        DataError: it is not such a file, or its results are of another bundle or have no statistics.
        ConfigError: a line has no time, and `by` needs it.
    """
    timed = _timed(path, bundle_hash=bundle_hash, by=by)
    begin = list(islice(timed, 1))
    timed = chain(begin, timed)
    if begin and begin[0][0] is not None:
        timed = iter(_in_order(list(timed)))
    for count, (_, image) in enumerate(timed):
        ranges = f"images {count // RANGE * RANGE + 1} to {(count // RANGE + 1) * RANGE}"
        yield image if by is not None else image._replace(window=ranges)


def _in_order(found: list[tuple[datetime | None, Image]]) -> list[tuple[datetime | None, Image]]:
    """Return images in the order of their times, or as they are if one has none."""
    times = [moment.timestamp() for moment, _ in found if moment is not None]
    if len(times) < len(found):
        return found
    return [found[place] for place in sorted(range(len(found)), key=times.__getitem__)]


def _timed(path: Path, *, bundle_hash: str, by: By | None) -> Iterator[tuple[datetime | None, Image]]:
    """Yield time and image of each line; see `from_results`."""
    try:
        lines = path.open(encoding="utf-8-sig", errors="surrogatepass")
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error}. Give a .jsonl of normweave predict.") from error
    readable = count = 0
    with lines:
        for number, text in enumerate(_texts(path, lines), 1):
            if not text.strip():
                continue
            row = _row(path, number, text)
            if row.get("error") is not None:
                continue
            readable += 1
            if row.get("bundle_hash") != bundle_hash:
                raise DataError(
                    f"Line {number} of {path} is of another bundle ({row.get('bundle_hash')!s:.12}, this is "
                    f"{bundle_hash:.12}). Predict the images with this bundle."
                )
            name = str(row.get("image_path") or row.get("name") or number)
            at = row.get("received_at")
            if by in ("hour", "shift") and at is None:
                raise ConfigError(
                    f"--by {by} needs the time of each image, which line {number} of {path} lacks. Leave --by out, or "
                    "use --store."
                )
            moment = None if at is None else _moment(path, number, at)
            window = window_of(by, moment or datetime.now(), str(PurePath(name).parent)) if by is not None else ""
            try:
                image = image_of(row, name=name, at=str(at or ""), window=window)
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise DataError(
                    f"Line {number} of {path} has a value that is no number ({error}). Predict the images again."
                ) from error
            if image is not None:
                count += 1
                yield moment, image
    if readable and not count:
        raise DataError(
            f"No result of {path} has all statistics of its image: they were written by an earlier normweave, or a "
            "number is missing. Predict the images again."
        )


def _texts(path: Path, lines: Iterable[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}). Give a .jsonl of normweave predict.") from error


def _moment(path: Path, number: int, at: object) -> datetime:
    try:
        moment = datetime.fromisoformat(str(at)).astimezone()
        window_of("shift", moment, "")  # the first hours of the first year belong to no day
        return moment
    except (OverflowError, ValueError) as error:
        raise DataError(
            f"Line {number} of {path}: received_at must be a time as 2026-11-26T14:00:00+00:00, got {at!r:.80}."
        ) from error


def _row(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"Line {number} of {path} is not JSON ({error}). Give a .jsonl of normweave predict."
        ) from error
    if not isinstance(row, dict) or "verdict" not in row:
        raise DataError(f"Line {number} of {path} is not a result. Give a .jsonl of normweave predict.")
    for name in ("category", "subclass"):
        if not isinstance(row.get(name), str | None):
            raise DataError(f"Line {number} of {path}: {name} must be a text, got {row[name]!r:.80}.")
    return row
