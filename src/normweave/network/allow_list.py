"""Check an ONNX file without running it: it may hold only ONNX's own operators and its own tensors.

ONNX Runtime trusts a graph: its tensors may be in any file of the machine or at an address in memory, and its operators
may come from libraries. Anyone can make a bundle, so this module reads the graph first, field by field of the protocol
buffer (onnx.proto3, https://protobuf.dev/programming-guides/encoding), and refuses every field that is not listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal

from normweave.errors import BundleError

MAX_BYTES = 2**31 - 1
"""Largest size of a protocol buffer."""
MAX_DEPTH = 16
"""Maximum number of levels of nested messages; our graphs have five."""

Field = Literal["value", "graph", "node", "attribute", "tensor", "domain", "opset", "inside"]

# The allowed fields of each message by number, and what they hold; "value" is not read further. Not listed, therefore
# refused: functions, training and device information of a model; sparse and quantized tensors; graphs in attributes
# (loops and branches); segments of tensors; tensor data outside the file.
MESSAGES: Mapping[str, Mapping[int, Field]] = MappingProxyType(
    {
        "model": {1: "value", 2: "value", 3: "value", 5: "value", 7: "graph", 8: "opset"},
        "opset": {1: "domain", 2: "value"},
        "graph": {1: "node", 2: "value", 5: "tensor", 11: "value", 12: "value", 13: "value"},
        "node": {1: "value", 2: "value", 3: "value", 4: "value", 5: "attribute", 7: "domain"},
        "attribute": {**dict.fromkeys((1, 2, 3, 4, 7, 8, 9, 20), "value"), 5: "tensor", 10: "tensor"},
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
    ("tensor", 13): "a tensor that is stored in another file",
    ("tensor", 14): "a tensor that is stored in another file",
}
"""Names of the most common refused fields, for messages."""
MAX_NAME = 60  # characters shown
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def check(content: bytes, *, where: str) -> None:
    """Check that a graph is self-contained and uses only ONNX's own operators.

    Raises:
        BundleError: it is not, or the file is not an ONNX graph.
    """
    if len(content) > MAX_BYTES:
        raise BundleError(f"{where} has {len(content)} bytes; a graph has at most {MAX_BYTES}. Copy the bundle again.")
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


def _check(message: memoryview, message_type: Field | Literal["model"], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _MalformedError(f"messages are nested more than {MAX_DEPTH} deep")
    for number, wire, content in _fields(message):
        match MESSAGES[message_type].get(number):
            case None:
                raise _RefusedError(NAMES.get((message_type, number), f"field {number} of a {message_type}"))
            case "value":
                continue
            case "inside":
                if content != 0:
                    raise _RefusedError(NAMES[message_type, number])
            case "domain":
                if (name := bytes(_bytes(content, wire)[:MAX_NAME])) not in (b"", b"ai.onnx"):
                    raise _RefusedError(f"operators of {name.decode(errors='replace')!r}")
            case inner:
                _check(_bytes(content, wire), inner, depth + 1)


def _bytes(content: memoryview | int, wire: int) -> memoryview:
    if isinstance(content, int):
        raise _MalformedError(f"a message of wire type {wire}")
    return content


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview | int]]:
    """Yield number, wire type and content of each field of a message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        content: memoryview | int
        if wire == VARINT:
            content, position = _varint(message, position)
        else:
            if wire == BYTES:
                length, position = _varint(message, position)
            elif wire in (FIXED64, FIXED32):
                length = 8 if wire == FIXED64 else 4
            else:
                raise _MalformedError(f"wire type {wire}")
            if position + length > len(message):
                raise _MalformedError("it is cut short")
            content, position = message[position : position + length], position + length
        yield number, wire, content


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return a number of up to ten bytes, seven bits each, lowest first, and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise _MalformedError("it is cut short")
        byte = message[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise _MalformedError("a number of more than ten bytes")
