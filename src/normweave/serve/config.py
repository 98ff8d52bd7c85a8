"""Limits of a server."""

from __future__ import annotations

from dataclasses import dataclass

from normweave.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Limits of request sizes, memory, time and storage."""

    max_images: int = 32
    """Maximum number of images in one request."""
    max_image_bytes: int = 32 * 2**20
    max_request_bytes: int = 128 * 2**20
    max_pixels: int = 50_000_000
    """Larger images are refused by their header, before decoding. Two images are decoded at a time."""
    score_seconds: float = 30.0
    """Time limit for scoring an image that is cut into tiles. Beyond it the image is stored as not inspected, with the
    reason, and the next one is scored."""
    max_waiting: int = 64
    """Maximum number of images accepted and not yet answered; beyond it the answer is 429."""
    max_arriving_bytes: int = 512 * 2**20
    """Maximum size of all requests being received or answered; beyond it the answer is 429."""
    max_held_bytes: int = 256 * 2**20
    """Maximum size of all images and maps that clients are reading; beyond it the answer is 429."""
    max_clients: int = 1024
    """Maximum number of open connections."""
    receive_seconds: float = 30.0
    """Time limit for receiving the body of a request."""
    send_seconds: float = 30.0
    """Time limit for a client to read 256 KiB of an answer; then the connection is closed."""
    answer_seconds: float = 60.0
    """Time limit from the last byte of a request to its answer."""
    shadow_share: float = 0.25
    """Highest share of the time of one processor that the model in the shadow takes."""
    shadow_waiting: int = 64
    """Maximum number of images that wait for the model in the shadow; further ones are skipped and counted."""
    session_hours: float = 12.0
    """Lifetime of a login after its last use."""
    session_max_hours: float = 168.0
    """Lifetime of a login, however often it is used."""
    keep_days: float = 0.0
    """Age at which inspections and their images are removed; 0: never."""
    keep_gib: float = 0.0
    """Size of all images beyond which the oldest are removed; their inspections remain. 0: no limit."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and not name.startswith("keep_")):
                raise ConfigError(f"serve: {name} must be above 0, got {value}.")
        if self.shadow_share > 1:
            raise ConfigError(f"serve: shadow_share must be above 0 and at most 1, got {self.shadow_share}.")
        if self.max_images > self.max_waiting:
            raise ConfigError(
                f"serve: max_waiting must be at least max_images ({self.max_images}), got {self.max_waiting}. "
                "Raise it, or lower max_images."
            )
