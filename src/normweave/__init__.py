"""Visual inspection that learns from good parts only: one model for many categories and subclasses."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Detector", "__version__"]

if TYPE_CHECKING:
    from normweave.detector import Detector


def __getattr__(name: str) -> object:
    """Import `Detector` on its first use, so that `import normweave` is fast."""
    if name == "Detector":
        from normweave.detector import Detector

        return Detector
    raise AttributeError(f"module 'normweave' has no attribute {name!r}")
