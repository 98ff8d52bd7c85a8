"""Delivery of what is stored to the outputs of a line: at least once, in the order of the ids.

The store is the queue: each output has, for inspections, verdicts on parts and alarms of drift, the id up to which it
has delivered, so what is undelivered survives a restart and needs no memory. A verdict on a part comes after its
images. All outputs share one event loop in a thread of its own, so no counterpart delays an answer. Ids become visible
in their order, see `insertion`. Of several servers of a line, the leader delivers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from normweave.errors import NormweaveError, reason
from normweave.serve.delivery_store import DeadLetter, Delivery, DeliveryStore, Item
from normweave.serve.message import MESSAGES
from normweave.serve.outputs import DeliveryError, Output, RefusedError
from normweave.serve.records import NotFoundError, Subject
from normweave.serve.service import InspectionService

log = logging.getLogger(__name__)
T = TypeVar("T")

CHUNK = 50
"""Records that are read at a time."""
SAVE_SECONDS = 1.0
"""Time between two transactions that store how far the outputs are. After a crash, as much is delivered again."""
READY_SECONDS = 1.0
"""Time between two checks whether the server can inspect."""
STALE_SECONDS = 4.0
"""Age at which the result of such a check no longer counts: no heartbeat follows from it."""
STOP_SECONDS = 3.0
"""Time to deliver what remains when the server stops."""
BEHIND_SHARE = 0.05
"""Highest share of the time in which undelivered records are counted."""
FAR_BEHIND = 10
"""Undelivered messages from which a working output is shown as behind."""

READ_ORDER: tuple[Subject, ...] = ("parts", "drift", "inspections")
Status = Literal["working", "behind", "failing"]


@dataclass(frozen=True, kw_only=True)
class OutputState:
    """What an output does."""

    name: str
    type: str
    status: Status
    """behind: it works, but has much to deliver, has dead letters, or has lost messages to the retention."""
    behind: int
    """Messages that are not delivered yet."""
    attempts: int
    """Failed attempts since the last success."""
    last_error: str | None
    """Why the last attempt failed; None: it succeeded."""
    last_success_at: datetime | None
    dead_letters: int
    """Messages that the counterpart has refused for good."""
    removed: int
    """Messages that retention removed before they were delivered, since a person acknowledged it last."""


class Deliveries:
    """Delivers what a service stores to outputs.

    Args:
        outputs: with different names.
    """

    def __init__(self, service: InspectionService, outputs: Sequence[Output]) -> None:
        self.store = DeliveryStore(service.store.database, line=service.store.line)
        self._service = service
        self._outputs = outputs
        self._followers: list[_Follower] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop_seconds = STOP_SECONDS
        self._not_ready: str | None = "The server is starting."
        self._ready_at = time.monotonic()

    def start(self) -> None:
        """Start to deliver, if there are outputs; also again after `stop`.

        Raises:
            StoreError: the database failed.
        """
        if not self._outputs:
            return
        self._loop = asyncio.new_event_loop()
        # Libraries look up names in threads: one that waits must not keep another output from the database.
        self._loop.set_default_executor(ThreadPoolExecutor(4 * (1 + len(self._outputs)), thread_name_prefix="output"))
        self._followers = [
            _Follower(
                output,
                self.store.begin(
                    output.config.name, oldest=output.config.start == "oldest", subjects=output.config.deliver
                ),
                self.store,
                service=self._service,
                readiness=self.readiness,
            )
            for output in self._outputs
        ]
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name="outputs", daemon=True)
        self._service.listeners.add(self.notify)
        self._thread.start()

    def stop(self, *, seconds: float = STOP_SECONDS) -> None:
        """Deliver what remains for at most this time, and store how far the outputs are."""
        if self._thread is not None:
            self._stop_seconds = seconds
            self._service.listeners.discard(self.notify)
            self._call(self._stop)
            self._thread.join()
            self._thread, self._followers = None, []

    def readiness(self) -> str | None:
        """Return why the server cannot inspect now; None: it can."""
        if time.monotonic() - self._ready_at > STALE_SECONDS:
            return "The server does not answer whether it can inspect."
        return self._not_ready

    def send_again(self, name: str) -> int:
        """Send all dead letters of an output again, and return their number.

        Raises:
            NotFoundError: no output has this name.
        """
        count = self.store.mark_again(self._named(name))
        for follower in self._followers:
            follower.has_letters = True
        self.notify()
        return count

    def acknowledge_removed(self, name: str, *, actor: str, token: int | None = None) -> int:
        """Count what retention removes from zero again, and return the count until now.

        Args:
            actor: name of the token of the engineer.
            token: id of this token.

        Raises:
            NotFoundError: no output has this name.
        """
        return self.store.acknowledge_removed(self._named(name), actor=actor, token=token)

    def dead_letters(self, name: str, *, limit: int) -> list[DeadLetter]:
        """Return the dead letters of an output, oldest first.

        Raises:
            NotFoundError: no output has this name.
        """
        return self.store.dead_letters(self._named(name), limit=limit)

    def _named(self, name: str) -> str:
        if name in (output.config.name for output in self._outputs):
            return name
        raise NotFoundError(f"There is no output {name!r:.100}. GET /v1/line lists them.")

    def states(self) -> list[OutputState]:
        """Return the state of each output, in the order of line.yaml. Reads the database.

        On a server that does not deliver, it is what the one that does has stored.
        """
        followers = self._followers
        if self._thread is not None:
            return [one.state() for one in followers]
        return [
            _state(output, delivery, self.store, connected=True)
            for output in self._outputs
            if (delivery := self.store.read(output.config.name)) is not None
        ]

    def notify(self) -> None:
        """Look for new records soon; may be called from any thread."""
        self._call(self._wake)

    def _call(self, work: Callable[[], None]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(work)

    def _wake(self) -> None:
        for follower in self._followers:
            follower.news.set()

    def _stop(self) -> None:
        for follower in self._followers:
            follower.stopping.set()
            follower.news.set()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._main())
        finally:
            left = asyncio.all_tasks(loop)  # of the libraries
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    async def _main(self) -> None:
        helpers = [asyncio.create_task(work()) for work in (self._check_ready, self._save_often)]
        tasks = [asyncio.create_task(one.run(), name=one.name) for one in self._followers]
        await self._followers[0].stopping.wait()
        await asyncio.wait(tasks, timeout=self._stop_seconds)
        for task in (*tasks, *helpers):
            task.cancel()
        await asyncio.gather(*tasks, *helpers, return_exceptions=True)
        try:
            self._save()
        except NormweaveError as error:
            log.warning("How far the outputs are is not stored; some messages will be delivered again: %s", error)

    async def _check_ready(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._service.check_ready)
                self._not_ready = None
            except NormweaveError as error:
                self._not_ready = str(error)
            self._ready_at = time.monotonic()
            await asyncio.sleep(READY_SECONDS)

    async def _save_often(self) -> None:
        next_count = 0.0
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            try:
                await asyncio.to_thread(self._save)
                await self._find_letters()
                if (start := time.monotonic()) >= next_count:
                    await asyncio.to_thread(self._show)
                    next_count = time.monotonic() + (time.monotonic() - start) / BEHIND_SHARE
            except NormweaveError as error:
                log.warning("How far the outputs are is not stored for now: %s", error)

    async def _find_letters(self) -> None:
        """Find dead letters that are to be sent again, which another server may have marked."""
        for one in self._followers:
            if not one.has_letters:
                one.has_letters = bool(await asyncio.to_thread(self.store.dead_letters, one.name, limit=1, again=True))
                if one.has_letters:
                    one.news.set()

    def _save(self) -> None:
        changed = [one for one in self._followers if one.delivery != one.saved]
        if changed:
            deliveries = [replace(one.delivery) for one in changed]
            self.store.save(deliveries)
            for one, saved in zip(changed, deliveries, strict=True):
                one.saved = saved

    def _show(self) -> None:
        metrics = self._service.metrics
        for state in self.states():
            labels = state.name, state.type
            metrics.output_behind.labels(*labels).set(state.behind)
            metrics.output_up.labels(*labels).set(state.status != "failing")
            metrics.output_dead_letters.labels(*labels).set(state.dead_letters)


class _Follower:
    """Follows the stored records for one output. All but `state` runs in the loop."""

    def __init__(
        self,
        output: Output,
        delivery: Delivery,
        store: DeliveryStore,
        *,
        service: InspectionService,
        readiness: Callable[[], str | None],
    ) -> None:
        self.output, self.delivery, self.store = output, delivery, store
        self.saved = replace(delivery)
        self.name = delivery.name
        self.connected = False
        self.has_letters = True  # from before a restart
        self.news, self.stopping = asyncio.Event(), asyncio.Event()
        self._labels = self.name, output.config.type
        self._metrics = service.metrics
        self._readiness = readiness
        # Parts first: when one is read, its images can be read too.
        self._waiting: dict[Subject, deque[Item]] = {
            subject: deque() for subject in sorted(delivery.last_ids, key=READ_ORDER.index)
        }
        self._refusals = 0
        self._failures = 0  # since the last success; one that lasts is logged once
        self._wait = output.config.first_wait_seconds

    def state(self) -> OutputState:
        """Return what the output does. Reads the database."""
        return _state(self.output, replace(self.delivery), self.store, connected=self.connected)

    async def run(self) -> None:
        """Connect, deliver, and connect again after a wait, until the server stops."""
        seconds = self.output.config.timeout_seconds
        while True:
            try:
                await self._limited(self.output.connect_seconds, self.output.connect(), "connect")
                self.connected = True
                async with asyncio.TaskGroup() as group:
                    beating = group.create_task(self._beat())
                    await self._deliver_all()
                    beating.cancel()
                return
            except Exception as error:
                self._failed(error)
            finally:
                self.connected = False
                with contextlib.suppress(Exception):
                    await self._limited(seconds, self.output.close(), "close")
            if self.stopping.is_set():
                return
            await self._pause()

    async def _limited(self, seconds: float, work: Any, what: str) -> None:
        try:
            async with asyncio.timeout(seconds):
                await work
        except TimeoutError as error:
            raise TimeoutError(f"no answer within {seconds:g} s ({what})") from error

    def _failed(self, error: BaseException) -> None:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        known = isinstance(error, NormweaveError)
        text = str(error) if known else f"{reason(error)}. {self.output.cure}"
        self._failures += 1
        if self._failures == 1:
            log.warning("The output %s fails: %s", self.name, text)
        self.delivery.attempts += 1
        self.delivery.last_error = text

    def _succeeded(self) -> None:
        if self._failures:
            log.info("The output %s works again after %d failed attempts.", self.name, self._failures)
        self._failures = 0
        self.delivery.attempts, self.delivery.last_error = 0, None
        self.delivery.last_success_at = datetime.now(UTC)
        self._wait = self.output.config.first_wait_seconds
        self._metrics.output_delivered.labels(*self._labels).inc()
        self._metrics.output_last_success.labels(*self._labels).set_to_current_time()

    async def _pause(self) -> None:
        """Wait after a failure, at most until the server stops."""
        seconds = self._wait * random.uniform(0.5, 1)
        self._wait = min(2 * self._wait, self.output.config.longest_wait_seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stopping.wait()

    async def _beat(self) -> None:
        """Send heartbeats while the server can inspect and this output delivers."""
        while True:
            ok = self._readiness() is None and self.delivery.attempts == 0
            await self._limited(self.output.config.timeout_seconds, self.output.heartbeat(ok), "heartbeat")
            await asyncio.sleep(self.output.config.heartbeat_seconds)

    async def _deliver_all(self) -> None:
        """Deliver until the server stops and nothing is left."""
        if await self._next() is None:
            self.delivery.attempts, self.delivery.last_error = 0, None  # connected, and nothing to deliver
        while True:
            self.news.clear()
            if self.has_letters:
                await self._deliver_again()
            while (item := await self._next()) is not None:
                if not await self._deliver(item):
                    if self.stopping.is_set():
                        return
                    await self._pause()
            if self.stopping.is_set():
                return
            await self.news.wait()

    async def _next(self) -> Item | None:
        """Return the oldest record that is not delivered, or None. A part is closed after its images have arrived."""
        for subject, waiting in self._waiting.items():
            if not waiting:
                last_id = self.delivery.last_ids[subject]
                waiting.extend(await asyncio.to_thread(self.store.after, subject, last_id, limit=CHUNK))
        return min((waiting[0] for waiting in self._waiting.values() if waiting), key=_order, default=None)

    async def _deliver(self, item: Item) -> bool:
        """Deliver a record, or set it aside if it is refused; return False if it must be sent again."""
        message = await asyncio.to_thread(self.store.message, item)
        try:
            await self._limited(self.output.deliver_seconds, self.output.deliver(message), "deliver")
            self._succeeded()
        except DeliveryError as error:
            self._failed(error)
            self._refusals += isinstance(error, RefusedError)
            if self._refusals < self.output.attempts:
                return False
            content = message.model_dump(mode="json")
            await asyncio.to_thread(self.store.add_dead_letter, self.name, reason=str(error), message=content)
            self.delivery.attempts = 0
        self._refusals = 0
        self._waiting[item.subject].popleft()
        self.delivery.advance(item)
        return True

    async def _deliver_again(self) -> None:
        """Deliver the dead letters that a person wants to be sent again, each once."""
        while letters := await asyncio.to_thread(self.store.dead_letters, self.name, limit=CHUNK, again=True):
            for letter in letters:
                message = MESSAGES.validate_python(letter.message)
                try:
                    await self._limited(self.output.deliver_seconds, self.output.deliver(message), "deliver")
                except Exception as error:
                    # Also after a lost connection: else this letter would come first after each new one.
                    await asyncio.to_thread(self.store.keep_dead_letter, letter.id, reason=str(error))
                    if isinstance(error, DeliveryError):
                        continue
                    raise
                self._succeeded()
                await asyncio.to_thread(self.store.remove_dead_letter, letter.id)
        self.has_letters = False


def _order(item: Item) -> tuple[datetime, bool]:
    """Return a key that is lower for what is delivered first."""
    return item.time, item.subject != "inspections"


def _state(output: Output, delivery: Delivery, store: DeliveryStore, *, connected: bool) -> OutputState:
    behind, letters = store.behind(delivery.last_ids), store.count_dead_letters(delivery.name)
    removed = store.removed(delivery.name)
    status: Status = "working"
    if delivery.attempts or not connected:
        status = "failing"
    elif behind >= FAR_BEHIND or letters or removed:
        status = "behind"
    return OutputState(
        name=delivery.name,
        type=output.config.type,
        status=status,
        behind=behind,
        attempts=delivery.attempts,
        last_error=delivery.last_error,
        last_success_at=delivery.last_success_at,
        dead_letters=letters,
        removed=removed,
    )
