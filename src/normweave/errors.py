"""The exceptions of normweave. A message states what is wrong, what was given, what is allowed and what to do.

NormweaveError
├── ConfigError
├── DataError
│   └── ImageError
├── BundleError
├── MissingError
└── CheckError
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class NormweaveError(Exception):
    """The base class of all errors that normweave raises on purpose."""

    exit_code = 2
    """Exit code of the command line."""


class ConfigError(NormweaveError):
    """A setting is unknown, has the wrong type or is out of range."""


class DataError(NormweaveError):
    """Images, masks or tables cannot be used."""


class ImageError(DataError):
    """One image file cannot be read. A run continues with the other images."""


class BundleError(NormweaveError):
    """A saved detector is damaged, was not written by normweave, or has a newer format."""


class MissingError(NormweaveError):
    """Weights, a package or a device are missing on this machine."""


class CheckError(NormweaveError):
    """A false-alarm rate cannot be guaranteed, or a parity or accuracy check failed."""

    exit_code = 3


def unknown(what: str, value: str, known: Iterable[str], howto: str) -> ConfigError:
    """Return the error for an unknown name, with the most similar known name, all known names, and what to do."""
    known = sorted(known)
    similar = get_close_matches(value, known, n=1)
    hint = f" Did you mean {similar[0]!r}?" if similar else ""
    return ConfigError(f"Unknown {what} {value!r}.{hint} Known: {', '.join(known) or 'none'}. {howto}")


def with_path(path: str, reason: str) -> str:
    """Return the reason with the path, once."""
    return reason if path in reason else f"{path}: {reason}"


def reason(error: BaseException) -> str:
    """Return the text of an error of a library for people: without the number of a system error, its type if empty."""
    inner = getattr(error, "reason", None)
    if isinstance(inner, BaseException):
        return reason(inner)
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return re.sub(r"^\[Errno -?[0-9]+\] ", "", str(text)).rstrip(".")
