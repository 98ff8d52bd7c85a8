"""Call a function for each of many items, each in a Ray task with a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from normweave.bridges import ray as session
from normweave.types import Progress

Item = TypeVar("Item")

RETRIES = 3
"""How often a task is repeated whose worker or node was lost."""
WAITING = 2
"""Tasks that wait for a processor, for each processor of the cluster."""


class Failed(NamedTuple):
    """A task that gave no result."""

    item: int
    reason: str


class Messages:
    """Receives messages of the workers, as an actor of Ray."""

    def __init__(self) -> None:
        self.step: tuple[str, int, int] | None = None
        self.error: bytes | None = None

    def report(self, *step: Any) -> None:
        """Receive the progress."""
        self.step = step

    def fail(self, error: bytes) -> None:
        """Receive an error that another try would raise again."""
        self.error = error

    def read(self) -> tuple[tuple[str, int, int] | None, bytes | None]:
        """Return the progress and the error."""
        return self.step, self.error


def run(
    address: str | session.Cluster,
    function: Callable[[Item], Any],
    items: Sequence[Item],
    *,
    save: Callable[[Item, Any], None],
    processors: int = 1,
    reuse: bool = False,
    name: str = "runs",
    progress: Progress | None = None,
) -> list[Failed]:
    """Call `function` for each item on a cluster, and `save` on this machine with each result at once.

    Args:
        address: of the cluster, as of `ray.opened`, or the cluster.
        function, save: functions of a module. What `function` raises is the reason of a failure; it is not repeated.
        processors: of a task.
        reuse: whether a process takes further tasks, and keeps what it has loaded; else its memory is released.
        name: of the step, for `progress`.

    Returns:
        The items without a result, in their order.
    """
    work = partial(_run, function=function, save=save, processors=processors, reuse=reuse, name=name)
    if isinstance(address, session.Cluster):
        return address.call(work, items, os.getcwd(), progress=progress)
    return session.run(address, work, items, os.getcwd(), progress=progress)


def _run(
    progress: Progress,
    items: Sequence[Any],
    folder: str,
    *,
    function: Callable[[Any], Any],
    save: Callable[[Any, Any], None],
    processors: int,
    reuse: bool,
    name: str,
) -> list[Failed]:
    """Run in the process that is connected to the cluster."""
    import ray

    session.check_resources(session.resources(), threads=processors)
    calls = {} if reuse else {"max_calls": 1}
    task = ray.remote(num_cpus=processors, max_retries=RETRIES, **calls)(_in_folder)
    failed: list[Failed] = []
    waiting = list(enumerate(items))[::-1]
    running: dict[Any, int] = {}
    while waiting or running:
        most = WAITING * max(1, int(ray.cluster_resources().get("CPU", 1)) // processors)
        while waiting and len(running) < most:
            number, item = waiting.pop()
            running[task.remote(function, item, folder)] = number
        (ended,), _ = ray.wait(list(running), num_returns=1)
        number = running.pop(ended)
        try:
            result = ray.get(ended)
        except ray.exceptions.RayTaskError as error:
            failed.append(Failed(number, f"{type(error.cause).__name__}: {error.cause}"))
        except ray.exceptions.RayError as error:
            failed.append(Failed(number, loss(error)))
        else:
            save(items[number], result)
        progress(name, len(items) - len(waiting) - len(running), len(items))
    return sorted(failed)


def whole_batches(images: int, batch: int) -> int:
    """Return the number of images rounded up to whole batches."""
    return -(-images // batch) * batch


def loss(error: Exception) -> str:
    """Return why a task has no result that was repeated `RETRIES` times."""
    return f"the loss of its worker, {RETRIES + 1} times ({type(error).__name__})"


def in_folder(folder: str) -> None:
    """Change to the folder of the command, if this machine has it: paths may be relative to it."""
    if os.path.isdir(folder):
        os.chdir(folder)


def _in_folder(function: Callable[[Any], Any], item: Any, folder: str) -> Any:
    in_folder(folder)
    return function(item)
