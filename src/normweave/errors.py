"""What can go wrong, said so that it can be put right: what, got, allowed, cure."""

from collections.abc import Iterable
from difflib import get_close_matches


class NormweaveError(Exception):
    """Anything normweave refuses. The exit code is what the command line answers with."""

    exit_code = 2


class ConfigError(NormweaveError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(NormweaveError):
    """Images, masks or tables that cannot be used as they are."""


class ImageError(DataError):
    """One image file that cannot be read; a batch goes on without it."""


class BundleError(NormweaveError):
    """A saved detector that is damaged, foreign, or of a newer format."""


class MissingError(NormweaveError):
    """Weights, a package or a device that this machine does not have."""


class CheckError(NormweaveError):
    """A promise cannot be kept: a false-alarm rate, or the parity of an export."""

    exit_code = 3


def unknown(kind: str, got: str, known: Iterable[str], howto: str) -> ConfigError:
    """Say what was wrong, what would be right, and where a new one is added."""
    known = sorted(known)
    near = get_close_matches(got, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"Unknown {kind} {got!r}.{hint} Known: {', '.join(known)}. {howto}")
