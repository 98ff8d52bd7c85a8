"""Requests with an Idempotency-Key: sent again, they are answered from the store and not inspected again.

The key is stored with each inspection, in the same transaction. So it survives a restart, and of a request that a crash
interrupted only the images that were not stored are inspected. Of a request that comes to two servers at the same time,
each image is stored once, see `insertion`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

from normweave.serve.problems import ProblemError
from normweave.serve.records import Inspection, RequestPart
from normweave.serve.service import InspectionService, Upload

_Running = tuple[str, "asyncio.Task[list[Inspection]]"]


class KeyedRequests:
    """The requests with a key of one server. Call it from one event loop."""

    def __init__(self, service: InspectionService) -> None:
        self._service = service
        self._running: dict[tuple[int | None, str], _Running] = {}  # hash and task of each token and key

    async def inspect(self, uploads: Sequence[Upload], *, key: str, actor: str, token: int | None) -> list[Inspection]:
        """Return the inspections of a request in the order of its images; those of an earlier one if it was equal.

        Cancelling the call does not stop the inspection of its images. Keys of different tokens are independent.

        Raises:
            ProblemError: the key came before with other names or images.
            NormweaveError: as `InspectionService.inspect`.
        """
        digest = await asyncio.to_thread(_hash, uploads)
        if (token, key) not in self._running:
            task = asyncio.create_task(self._inspect(uploads, RequestPart(key, digest, 0), actor=actor, token=token))
            self._running[token, key] = digest, task

            def ended(task: asyncio.Task[list[Inspection]]) -> None:
                del self._running[token, key]
                if not task.cancelled():
                    task.exception()  # it was raised in the call that waited, if any still did

            task.add_done_callback(ended)
        earlier, task = self._running[token, key]
        _check(earlier, digest, key)
        return list(await asyncio.shield(task))

    async def _inspect(
        self, uploads: Sequence[Upload], part: RequestPart, *, actor: str, token: int | None
    ) -> list[Inspection]:
        kept = await asyncio.to_thread(self._service.store.of_request, part.key, token=token)
        done: dict[int, Inspection] = {}
        for one in kept:
            assert one.request is not None
            _check(one.request.hash, part.hash, part.key)
            done[one.request.place] = one
        missing = [place for place in range(len(uploads)) if place not in done]
        if missing:
            new = await self._service.inspect(
                [uploads[place] for place in missing],
                source="api",
                actor=actor,
                token=token,
                parts=[part._replace(place=place) for place in missing],
            )
            for one in new:  # another server may have stored it in the meantime
                assert one.request is not None
                _check(one.request.hash, part.hash, part.key)
            done |= dict(zip(missing, new, strict=True))
        return [done[place] for place in range(len(uploads))]


def _check(earlier: str, digest: str, key: str) -> None:
    if earlier != digest:
        raise ProblemError(
            422,
            f"The Idempotency-Key {key!r:.100} was sent before with other names or images. Use a new key for each "
            "request, and the same only to send it again.",
            code="key_reused",
        )


def _hash(uploads: Sequence[Upload]) -> str:
    """Return the SHA-256 of all names and images, and of the parts that were sent with them."""
    digest = hashlib.sha256()
    for upload in uploads:
        for part in (upload.name.encode("utf-8", "surrogatepass"), upload.content):
            digest.update(hashlib.sha256(part).digest())
        if upload.part is not None or upload.view is not None:
            digest.update(repr((upload.part, upload.view)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
