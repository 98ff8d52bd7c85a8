"""Ports of this machine that nothing listens on."""

import contextlib
import socket


def free_ports(count):
    """Return this many, each another one."""
    with contextlib.ExitStack() as stack:
        unused = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in unused:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in unused]


def free_port():
    (port,) = free_ports(1)
    return port
