"""Image files and patch scores in an object store, such as S3, each named by the SHA-256 of its content.

The keys are those of `files.Files`: `ab/abcdef…` below the address. Several servers use them at the same time.
"""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from normweave.data.stored import limited, open_system
from normweave.errors import ConfigError, MissingError
from normweave.serve.database import StoreError
from normweave.serve.files import ContentError, ImageStore, MissingFileError, check_hash, is_hash

PROBE_SECONDS = 30.0
"""How long the result of a test whether an object can be written is used again, since each request costs money."""
SECONDS = 10
"""Longest wait of S3 for a connection or for the next bytes."""
ATTEMPTS = 2
"""Attempts of a request to S3: more would keep clients waiting for longer than they get an answer."""
NOT_DURABLE = ("file", "local", "memory", "http", "https", "data")
"""Protocols of fsspec that store nothing to last, or not in one step."""


class ObjectFiles(ImageStore):
    """An object store by fsspec. An object is written in one step, so there are no partial ones.

    Args:
        url: such as s3://bucket/folder. The credentials and the address of another S3 than Amazon's are those of the
            environment, such as AWS_PROFILE and AWS_ENDPOINT_URL.

    Raises:
        ConfigError: fsspec does not know the protocol, or it is of no object store.
        MissingError: fsspec, or its package for this protocol, is not installed.
    """

    parallel = 16
    cure = "Check its address, the credentials and their rights to write, read, list and remove objects."

    def __init__(self, url: str) -> None:
        super().__init__(url)
        protocol = url.partition("://")[0]
        try:
            import fsspec  # noqa: F401 - `open_system` imports it
        except ImportError as error:
            raise MissingError(f'{url} needs fsspec, which is not installed. pip install "normweave[s3]"') from error
        if protocol in NOT_DURABLE:
            raise ConfigError(
                f"--images cannot be of {protocol}://, got {url!r:.200}. Give a folder, or the address of an object "
                "store such as s3://BUCKET/FOLDER."
            )
        own = {"use_listings_cache": False, "skip_instance_cache": True}
        try:
            self._system, root = open_system(url, seconds=SECONDS, attempts=ATTEMPTS, **own)
        except ImportError as error:
            raise MissingError(f"{url} needs a package that is not installed: {error}.") from error
        except ValueError as error:
            raise ConfigError(f"--images {url!r:.200} cannot be used: {error}. Give s3://BUCKET/FOLDER.") from error
        if not (root := root.rstrip("/")):
            raise ConfigError(f"--images {url!r:.200} has no bucket. Give s3://BUCKET/FOLDER.")
        self._root = root
        self._probe_lock = threading.Lock()
        self._probed_at = -PROBE_SECONDS

    @property
    def identity(self) -> str:
        """The address, with or without a slash at its end."""
        return self.name.rstrip("/")

    def first(self, name: str, content: str) -> str:
        """Return the text of an object beside the images, after writing `content` if there is none.

        Two servers that write it at the same moment may each return what it has written itself.

        Raises:
            OSError: it cannot be read or written.
        """
        key = f"{self._root}/{name}"
        with self._as_os_error():
            try:
                found = bytes(self._limited("cat_file", key))
            except FileNotFoundError:
                self._limited("pipe_file", key, content.encode())
                found = bytes(self._limited("cat_file", key))
        return found.decode(errors="replace").strip()

    def put(self, content: bytes) -> str:
        """Write a content and return its hash.

        Raises:
            OSError: the object store has not taken it.
        """
        digest = hashlib.sha256(content).hexdigest()
        try:
            with self._as_os_error():
                self._limited("pipe_file", self._key(digest), content)
        except OSError:
            self._probed_at = -PROBE_SECONDS
            raise
        return digest

    def read(self, digest: str) -> bytes:
        """Return the content with this hash.

        Raises:
            ContentError: the object is missing or was changed, or the hash is malformed.
            StoreError: the object store does not answer.
        """
        key = self._key(digest)
        try:
            with self._as_os_error():
                content = bytes(self._limited("cat_file", key))
        except FileNotFoundError as error:
            raise MissingFileError(
                f"The file {digest} is not in {self.name}. It was removed by retention or by another program."
            ) from error
        except OSError as error:
            raise StoreError(
                f"The file {digest} cannot be read from {self.name}: {str(error).rstrip('.')}. {self.cure}"
            ) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise ContentError(f"The file {digest} in {self.name} was changed. Restore it from a backup.")
        return content

    def remove(self, digest: str) -> None:
        """Remove the object with this hash, if it exists.

        Raises:
            ContentError: the hash is malformed.
            OSError: the object store does not answer.
        """
        key = self._key(digest)
        try:
            with self._as_os_error():
                self._limited("rm_file", key)
        except FileNotFoundError:
            return

    def all_hashes(self) -> Iterator[str]:
        """Yield the hashes of all objects in order; one shard is listed at a time."""
        try:
            with self._as_os_error():
                shards = sorted(self._system.ls(self._root, detail=False))
        except FileNotFoundError:  # nothing is stored yet
            return
        for shard in shards:
            with self._as_os_error():
                keys = self._system.find(shard)
            yield from sorted(name for key in keys if is_hash(name := key.rpartition("/")[2]))

    def check_writable(self, *, free: int = 0) -> None:
        """Raise OSError if no object can be written now. The space is not limited."""
        with self._probe_lock:
            if time.monotonic() >= self._probed_at + PROBE_SECONDS:
                probe = f"{self._root}/.probe-{uuid.uuid4().hex}"
                with self._as_os_error():
                    self._limited("pipe_file", probe, b"x")
                    self._limited("cat_file", probe)
                    self._limited("rm_file", probe)
                self._probed_at = time.monotonic()

    def _limited(self, method: str, *arguments: Any) -> Any:
        """Call a method of the file system for one object, and end it after the time of all attempts."""
        return limited(self._system, method, *arguments, seconds=ATTEMPTS * SECONDS)

    def _key(self, digest: str) -> str:
        return f"{self._root}/{check_hash(digest)[:2]}/{digest}"

    @contextmanager
    def _as_os_error(self) -> Iterator[None]:
        """Turn the exceptions of the library of an object store, which have no common class, into OSError."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
