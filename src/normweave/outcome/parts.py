"""Parts of which several images are taken: one verdict from the verdicts of the views, with its reasons.

A part is anomalous if a view is anomalous, and unknown if a view is unknown and none is anomalous. It is incomplete if
neither holds and a view is missing or could not be read. It is normal only if all expected views came and are normal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from normweave.errors import ConfigError, unknown
from normweave.types import PartReason, PartVerdict, Verdict
from normweave.validation import PositiveFloat, check, checked

ID_LENGTH = 500
"""Maximum number of characters of the id of a part and of the name of a view."""
RANKS: dict[PartVerdict, int] = {"normal": 0, "incomplete": 1, "unknown": 2, "anomalous": 3}
"""Verdicts from good to bad. A correction never goes back."""
MAX_IMAGES = 100
"""Images of a part; a server closes it with this number."""
_INVISIBLE = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and the bytes of a name that is no UTF-8."""
REASONS = ("anomalous", "unknown", "unreadable", "missing")
"""Reasons why a part is not normal, worst first."""
Views = int | tuple[str, ...] | None
"""Expected views of a part: their number or their names. None: any."""


class PartView(NamedTuple):
    """An image of a part."""

    view: str
    verdict: Verdict | None
    """None: the image could not be read."""
    inspection: int | None = None
    """Id of the stored inspection, if it is stored."""


class PartResult(NamedTuple):
    """The verdict on a part and why it is not normal; worst reasons first."""

    verdict: PartVerdict
    reasons: tuple[PartReason, ...]


@checked
class PartRule:
    """Which images belong to a part, and when it is closed; section `parts` of `line.yaml`.

    Raises:
        ConfigError: a value is out of range, or the pattern is no regular expression or has no group.
    """

    part: str = ""
    """Regular expression on names of images: the first group is the id of the part, a second group the name of the
    view. Empty: only images that are sent with the id of a part show one."""
    views: Views = None
    """Expected views of a part: their number or their names. None: any."""
    seconds: PositiveFloat = 10.0
    """A part is closed when all expected views came, or this time after its last view."""
    late_seconds: PositiveFloat = 3600.0
    """An image of a closed part belongs to it for this time; then a new part with the same id begins."""

    def __post_init__(self) -> None:
        views = self.views
        names = views if isinstance(views, tuple) else ()
        right = views is None or (views > 0 if isinstance(views, int) else bool(names) and all(names))
        given = list(views) if isinstance(views, tuple) else views
        count = views if isinstance(views, int) else len(names)
        check(
            (right and len(set(names)) == len(names), f"views must be at least 1, or different names, got {given!r}"),
            (
                count <= MAX_IMAGES,
                f"views must be at most {MAX_IMAGES}, which is the most images of a part, got {count}",
            ),
            *((False, f"views: {wrong}") for name in names if name and (wrong := wrong_name(name))),
            *((False, f"part: {reason}") for reason in _wrong_pattern(self.part)),
        )

    def identify(self, name: str, *, part: str | None = None, view: str | None = None) -> tuple[str | None, str | None]:
        """Return the id of the part and the name of the view of an image; None: of no part, or without a name.

        Args:
            name: file name of the image.
            part: id that was sent with the image; it goes before the pattern.
            view: name of the view that was sent; without one it is the second group, or the file name without suffix.

        Raises:
            ConfigError: a view was sent, and the image shows no part: it may be meant for the bundle of this view.
        """
        pattern = compile_pattern(self.part or None)
        part = _plain(part) or _plain(part_of(name, pattern))
        if not part:
            if _plain(view):
                raise ConfigError(
                    f"The image {name!r:.100} has the view {view!r:.100}, but no part. Give the id of its part too, or "
                    "leave out the view."
                )
            return None, None
        match = None if pattern is None or pattern.groups < 2 else pattern.search(name)
        stem = PurePosixPath(name.replace("\\", "/")).stem
        named = _plain(view) or _plain(match and match[2]) or _plain(stem)
        return part[:ID_LENGTH], named[:ID_LENGTH] or None

    def is_complete(self, views: Iterable[PartView]) -> bool:
        """Return whether all expected views came; without expected views never."""
        seen = {one.view for one in views}
        if self.views is None:
            return False
        return len(seen) >= self.views if isinstance(self.views, int) else seen.issuperset(self.views)


def _plain(text: str | None) -> str:
    r"""Return an id or a name without white space around it, and with invisible characters as escapes such as \x07.

    So it is the same however it came, different ones stay different, and every store and page can hold it.
    """
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), (text or "").strip())


def wrong_name(view: str) -> str | None:
    """Return why no image can have a view of this name; None: one can."""
    if view and view == _plain(view):
        return None
    return f"the name of a view has no white space around it and no invisible characters, got {view!r:.80}"


def check_view_bundles(names: Iterable[str], views: Views, *, what: str, of: str) -> list[str]:
    """Return why bundles cannot belong to views of these names.

    Args:
        views: the expected views of a part.
        what: the setting that has the bundles.
        of: the setting that has the views.
    """
    found = list[str]()
    for name in names:
        if wrong := wrong_name(name):
            found.append(f"{what}: {wrong}. Correct the name")
        elif isinstance(views, tuple) and name not in views:
            found.append(str(unknown(f"view of {what}", name, views, f"{of} has these.")))
    return found


def check_named(views: Views, *, what: str, of: str) -> list[str]:
    """Return that the names of the views are not given, so that a misspelled one would not be found."""
    if isinstance(views, tuple):
        return []
    return [
        f"{what} needs the names of all views in {of}, got {'none' if views is None else views}: without them a "
        "misspelled view would be judged by the other bundle. For example: parts: {views: [front, back]}"
    ]


def compile_pattern(text: str | None) -> re.Pattern[str] | None:
    """Return the regular expression of an option; None if it was not given.

    Raises:
        ConfigError: it is no regular expression.
    """
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ConfigError(
            f"The pattern {text!r} is no regular expression: {error}. For example: '^(.+)_camera[0-9]'"
        ) from error


def _wrong_pattern(text: str) -> list[str]:
    """Return why a pattern of parts cannot be used; empty: it can."""
    try:
        part_of("", compile_pattern(text or None))
    except ConfigError as error:
        return [str(error)]
    return []


def parse_views(text: str | None) -> Views:
    """Return the expected views of an option: a number, or names separated by commas."""
    if text is None:
        return None
    return int(text) if text.isdecimal() else tuple(name.strip() for name in text.split(","))


def part_of(name: str, part: re.Pattern[str] | None) -> str | None:
    """Return the name of the part in a file name; None: the pattern does not match, or there is none.

    Raises:
        ConfigError: the pattern has no group.
    """
    if part is None:
        return None
    if not part.groups:
        raise ConfigError(
            f"The pattern {part.pattern!r} has no group in brackets, which would match the name of the part. "
            r"For example: '^(.+)_camera\d'"
        )
    match = part.search(name)
    return match and match[1]


def judge(views: Iterable[PartView], expected: Views) -> PartResult:
    """Return the verdict on a part. Of several images of a view the worst counts.

    Args:
        views: the images that came, in any order.
        expected: as `PartRule.views`. Views that are not expected count too.
    """
    worst: dict[str, PartView] = {}
    for one in views:
        if one.view not in worst or _order(one) < _order(worst[one.view]):
            worst[one.view] = one
    reasons = [
        PartReason(one.verdict or "unreadable", one.view, one.inspection)
        for one in worst.values()
        if one.verdict != "normal"
    ]
    if isinstance(expected, int):
        reasons += [PartReason("missing", None, None)] * max(0, expected - len(worst))
    elif expected is not None:
        reasons += [PartReason("missing", name, None) for name in expected if name not in worst]
    reasons.sort(key=lambda one: (REASONS.index(one.reason), one.view or "", one.inspection or 0))
    present = {one.reason for one in reasons}
    verdict: PartVerdict = "normal" if worst and not reasons else "incomplete"
    if "anomalous" in present:
        verdict = "anomalous"
    elif "unknown" in present:
        verdict = "unknown"
    return PartResult(verdict, tuple(reasons))


def is_worse(late: PartView, before: PartVerdict) -> bool:
    """Return whether an image that came late makes the recorded verdict on its part worse."""
    return RANKS[late.verdict or "incomplete"] > RANKS[before]


def _order(one: PartView) -> tuple[int, int]:
    """Return a key that is lower for images that count more: the worst, of equal ones the first."""
    rank = {"anomalous": 0, "unknown": 1, None: 2, "normal": 3}[one.verdict]
    return rank, one.inspection or 0
