"""Run work on a Ray cluster, from a process of its own, which calls functions one after another.

The process that asks imports nothing of Ray and keeps its stdout. Ray ends a process whose cluster is lost; here this
is an error with a cure. Nothing is sent to Ray's makers: a cluster that is started here has usage statistics off.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import secrets
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from normweave.errors import ConfigError, MissingError, NormweaveError
from normweave.types import Progress

T = TypeVar("T")

LOCAL = "local"
"""In place of an address: a cluster of this machine alone, which ends with the work."""
AUTO = "auto"
"""In place of an address: the cluster that this machine belongs to."""
STORE_MIB = 256
"""Memory of a local cluster for what the tasks are given. Images and results do not pass through it."""
CONNECT_S = 5.0
LOST_S = 15
"""After this time without the head node the cluster is lost, unless RAY_gcs_rpc_server_reconnect_timeout_s is set."""


class Cluster:
    """A process that is connected to a cluster, and calls functions one after another; see `opened`."""

    def __init__(self, address: str, process: BaseProcess, connection: Connection) -> None:
        self.address = address
        self._process = process
        self._connection = connection
        self._connected = False

    def call(self, work: Callable[..., T], *arguments: Any, progress: Progress | None = None) -> T:
        """Return `work(progress, *arguments)`, called in the connected process.

        Args:
            work: a function of a module.

        Raises:
            MissingError: no cluster answers.
            NormweaveError: raised by `work`, or the cluster was lost.
        """
        try:
            with suppress(BrokenPipeError):  # its error is still to be received
                self._connection.send((work, arguments))
            while True:
                what, *values = self._connection.recv()
                if what == "connected":
                    self._connected = True
                elif what == "progress":
                    if progress is not None:
                        progress(*values)
                elif what == "error":
                    raise values[0]
                else:
                    result: T = values[0]
                    return result
        except (EOFError, ConnectionResetError):
            self._process.join()
            if not self._connected and self.address != LOCAL:  # Ray ends the process
                raise MissingError(_no_answer(self.address, "its answer is not that of this version of Ray")) from None
            raise NormweaveError(
                f"The connection to the Ray cluster {self.address} was lost: its process ended with code "
                f"{self._process.exitcode}. What was finished is kept. Check that the head node runs, then run the "
                "command again (predict: with --resume)."
            ) from None


def run(address: str, work: Callable[..., T], *arguments: Any, progress: Progress | None = None) -> T:
    """Return `work(progress, *arguments)`, called in a new process that is connected to a cluster.

    Args and raises: as `opened` and `Cluster.call`.
    """
    with opened(address) as cluster:
        return cluster.call(work, *arguments, progress=progress)


@contextmanager
def opened(address: str) -> Iterator[Cluster]:
    """Start a process that connects to a cluster.

    Args:
        address: host:port of the head node, `auto` or `local`.

    Raises:
        ConfigError: the address is none.
        MissingError: Ray is not installed, or nothing listens at the address.
    """
    check_address(address)
    if importlib.util.find_spec("ray") is None:
        raise MissingError("--ray needs Ray, which is not installed: pip install 'normweave[scale]'")
    if address not in (LOCAL, AUTO):
        _check_answer(address)  # before the process, which imports Ray
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    verbose = logging.getLogger().isEnabledFor(logging.INFO)
    process = context.Process(target=_session, args=(other, address, verbose))
    process.start()
    other.close()
    try:
        yield Cluster(address, process, own)
    finally:
        own.close()
        process.join(CONNECT_S)  # it disconnects
        if process.is_alive():
            process.terminate()
            process.join()


def check_address(address: str) -> None:
    """Check an address without a connection.

    Raises:
        ConfigError: it is none.
    """
    host, _, port = address.rpartition(":")
    if address not in (LOCAL, AUTO) and not (host and "/" not in host and port.isdecimal() and int(port) < 2**16):
        raise ConfigError(
            f"--ray must be local, auto or the host:port of a head node, such as 10.0.0.5:6379, got {address!r}."
        )


def _session(connection: Connection, address: str, verbose: bool) -> None:
    """Connect, and send what each function that is received returns or raises, until no more come."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)
    _silence(sys.stdout)  # Ray prints the messages of its nodes there
    if not verbose:
        _silence(sys.stderr)

    def report(task: str, done: int, total: int) -> None:
        connection.send(("progress", task, done, total))

    try:
        with connected(address):
            connection.send(("connected",))
            while True:
                try:
                    work, arguments = connection.recv()
                except (EOFError, ConnectionResetError):  # with progress that was not read
                    return
                connection.send(("result", work(report, *arguments)))
    except NormweaveError as error:
        connection.send(("error", error))
    except KeyboardInterrupt:  # the process that asked ends, too
        return
    except Exception as error:
        import ray

        if isinstance(error, ray.exceptions.RayError):
            cause = getattr(error, "cause", None) or error
            connection.send(
                (
                    "error",
                    NormweaveError(
                        f"The Ray cluster {address} ended the work ({type(cause).__name__}: {str(cause)[:500]}). What "
                        "was finished is kept. Run the command again (predict: with --resume)."
                    ),
                )
            )
        else:
            sent = error if isinstance(error, OSError) else RuntimeError(traceback.format_exc())
            connection.send(("error", sent))


def _silence(stream: Any) -> None:
    stream.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _exit_with_parent() -> None:
    """End this process, and a local cluster, when the process that asked has ended."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        if (ray := sys.modules.get("ray")) is not None:
            ray.shutdown()
        os._exit(1)


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect this process to a cluster.

    Raises:
        MissingError: no cluster answers.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # tasks without a graphics processor see none
    if address == LOCAL:  # it listens on every address: refuse whoever has not this token
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(LOST_S))
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options |= {
            "num_cpus": processors(),
            "include_dashboard": False,
            "object_store_memory": STORE_MIB * 2**20,
        }
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        raise MissingError(_no_answer(address, _reason(error))) from error
    except RuntimeError as error:  # such as another version of Python or Ray
        raise MissingError(f"The Ray cluster {address} cannot be used: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def resources() -> list[dict[str, float]]:
    """Return the resources of each machine of the cluster that this process is connected to."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_resources(machines: Sequence[dict[str, float]], *, threads: int, device: str = "cpu") -> None:
    """Check that a machine of the cluster can run a task: Ray would wait for one for ever.

    While no machine with processors has joined, any may come.

    Args:
        machines: as `resources` returns them.

    Raises:
        ConfigError: none has as many processors.
        MissingError: none has a graphics processor, and the device is one.
    """
    most = int(max((each.get("CPU", 0) for each in machines), default=0))
    if most and threads > most:
        raise ConfigError(
            f"--threads must be at most the number of processors of a machine of the cluster, {most}, got {threads}."
        )
    if most and device.startswith("cuda") and not any(each.get("GPU") for each in machines):
        raise MissingError(
            f"--device {device} was requested, but no machine of the cluster has a graphics processor. Add one, or use "
            "--device cpu."
        )


def _check_answer(address: str) -> None:
    """Raise MissingError if nothing listens: Ray would try for a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise MissingError(_no_answer(address, _reason(error))) from error


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _no_answer(address: str, reason: str) -> str:
    return (
        f"No Ray cluster answers at {address} ({reason}). Start one with `ray start --head --disable-usage-stats`, or "
        "use --ray local for this machine alone. If one runs there, RAY_AUTH_MODE, the token and the version of Ray "
        "must be the same on all machines."
    )
