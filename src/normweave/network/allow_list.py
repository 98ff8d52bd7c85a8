"""What an ONNX file is made of, read without running it: nothing but plain operators and numbers that it holds itself.

ONNX Runtime trusts a graph: tensors may lie in any file of the machine, or at an address in memory, and operators may
come from libraries. A bundle may have been made by anyone, so its graph is read here first, field by field of the
protocol buffer (onnx.proto3, https://protobuf.dev/programming-guides/encoding), and what is not known is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal

from normweave.errors import BundleError

MAX_BYTES = 2**31 - 1
"""A protocol buffer cannot be larger."""
DEEPEST = 16
"""Messages inside messages; our graphs have five."""

Kind = Literal["value", "graph", "node", "attribute", "tensor", "domain", "opset", "inside"]

# Fields of each message by number, and what they hold; "value" is not looked into. Absent on purpose, so refused:
# functions, training and device information of a model; sparse and quantized tensors; graphs in attributes (loops, and
# branches); segments of tensors; data of tensors that lies elsewhere.
MESSAGES: Mapping[str, Mapping[int, Kind]] = MappingProxyType(
    {
        "model": {1: "value", 2: "value", 3: "value", 5: "value", 7: "graph", 8: "opset"},
        "opset": {1: "domain", 2: "value"},
        "graph": {1: "node", 2: "value", 5: "tensor", 11: "value", 12: "value", 13: "value"},
        "node": {1: "value", 2: "value", 3: "value", 4: "value", 5: "attribute", 7: "domain"},
        "attribute": {
            **dict.fromkeys((1, 2, 3, 4, 7, 8, 9, 20), "value"),
            5: "tensor",
            10: "tensor",
        },
        "tensor": {**dict.fromkeys((1, 2, 4, 5, 6, 7, 8, 9, 10, 11), "value"), 14: "inside"},
    }
)
NAMES = {
    ("model", 14): "metadata",
    ("model", 20): "training information",
    ("model", 25): "functions",
    ("graph", 15): "sparse tensors",
    ("attribute", 6): "a graph inside an operator",
    ("attribute", 11): "a graph inside an operator",
    ("tensor", 13): "a tensor that lies in another file",
    ("tensor", 14): "a tensor that lies in another file",
}
"""What the fields are called that somebody might miss."""
LONGEST_NAME = 60  # that is shown
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def check(content: bytes, *, where: str) -> None:
    """Refuse a graph that is not self-contained, or asks for more than ONNX's own operators.

    Raises:
        BundleError: it does, or is no ONNX graph at all.
    """
    if len(content) > MAX_BYTES:
        raise BundleError(f"{where} has {len(content)} bytes; a graph can have {MAX_BYTES}.")
    try:
        _check(memoryview(content), "model", 0)
    except _MalformedError as error:
        raise BundleError(
            f"{where} is not an ONNX graph: {error}. Copy the bundle again, or train it again."
        ) from error
    except _RefusedError as error:
        raise BundleError(f"{where} holds {error}, which no bundle needs. Do not use this bundle.") from error


class _MalformedError(ValueError):
    pass


class _RefusedError(ValueError):
    pass


def _check(message: memoryview, kind: Kind | Literal["model"], depth: int) -> None:
    if depth > DEEPEST:
        raise _MalformedError(f"messages lie more than {DEEPEST} deep in each other")
    for number, wire, content in _fields(message):
        match MESSAGES[kind].get(number):
            case None:
                raise _RefusedError(NAMES.get((kind, number), f"field {number} of a {kind}"))
            case "value":
                continue
            case "inside":
                if content != 0:
                    raise _RefusedError(NAMES[kind, number])
            case "domain":
                if (name := bytes(_bytes(content, wire)[:LONGEST_NAME])) not in (b"", b"ai.onnx"):
                    raise _RefusedError(f"operators of {name.decode(errors='replace')!r}")
            case inner:
                _check(_bytes(content, wire), inner, depth + 1)


def _bytes(content: memoryview | int, wire: int) -> memoryview:
    if isinstance(content, int):
        raise _MalformedError(f"a message of wire type {wire}")
    return content


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview | int]]:
    """(number, wire type, content) of each field of a message."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, wire = key >> 3, key & 7
        content: memoryview | int
        if wire == VARINT:
            content, place = _varint(message, place)
        else:
            if wire == BYTES:
                length, place = _varint(message, place)
            elif wire in (FIXED64, FIXED32):
                length = 8 if wire == FIXED64 else 4
            else:
                raise _MalformedError(f"wire type {wire}")
            if place + length > len(message):
                raise _MalformedError("it is cut short")
            content, place = message[place : place + length], place + length
        yield number, wire, content


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """A number of up to ten bytes, seven bits each, lowest first; and the place behind it."""
    number = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise _MalformedError("it is cut short")
        byte = message[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise _MalformedError("a number of more than ten bytes")
