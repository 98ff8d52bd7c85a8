"""How much a server takes, keeps and waits."""

from __future__ import annotations

from dataclasses import dataclass

from normweave.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """LimitsMiddleware of a server."""

    max_images: int = 32
    """In one request."""
    max_image_bytes: int = 32 * 2**20
    max_request_bytes: int = 128 * 2**20
    max_pixels: int = 50_000_000
    """Larger images are refused from their header; two are decoded at a time."""
    max_waiting: int = 64
    """Images taken and not yet answered; with more the answer is 429."""
    max_arriving_bytes: int = 512 * 2**20
    """Of all requests that are being received or answered; with more the answer is 429."""
    max_clients: int = 1024
    """Connections at a time."""
    receive_seconds: float = 30.0
    """For the body of a request to arrive."""
    answer_seconds: float = 60.0
    """From the last byte of a request to its answer."""
    session_hours: float = 12.0
    """A login of the page, after its last use."""
    keep_days: float = 0.0
    """Older inspections are removed, with their images; 0 = never."""
    keep_gib: float = 0.0
    """The oldest images are removed beyond this, their records stay; 0 = never."""

    def __post_init__(self) -> None:
        wrong = [name for name, value in vars(self).items() if value < 0]
        wrong += [name for name, value in vars(self).items() if value == 0 and not name.startswith("keep_")]
        if wrong:
            raise ConfigError(
                f"serve: {', '.join(sorted(set(wrong)))} must be above 0, got "
                f"{', '.join(str(vars(self)[name]) for name in sorted(set(wrong)))}."
            )
        if self.max_images > self.max_waiting:
            raise ConfigError(
                f"serve: max_waiting must hold a whole request, got {self.max_waiting} for up to "
                f"{self.max_images} images. Raise it, or lower max_images."
            )
