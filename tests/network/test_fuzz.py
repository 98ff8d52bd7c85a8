"""Corrupt and forged graphs with a correct hash: each is refused or runs, and none ends the process."""

import subprocess
import sys

import pytest

from normweave.errors import BundleError
from normweave.network import open_graph

GRAPHS = 400

# In a process of its own, which may take some gigabytes and no more; it ends with how many ran and were refused.
WORKER = '''
import random, resource, sys
from pathlib import Path

import numpy as np
import onnx

from normweave.errors import BundleError
from normweave.network import open_graph

resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
content = Path(sys.argv[1]).read_bytes()


def bytes_changed(draw):
    """Draw positions mostly near both ends, since the weights are between them."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        near = draw.randrange(4000)
        at = draw.choice([draw.randrange(len(changed)), near, len(changed) - 1 - near])
        match draw.randrange(4):
            case 0:
                changed[at] = draw.choice([0, 1, 127, 128, 225, 255])
            case 1:
                changed[at] ^= 1 << draw.randrange(8)
            case 2:
                del changed[at : at + draw.randint(1, 8)]
            case 3:
                changed[at:at] = changed[at : at + draw.randint(1, 30)]
    return bytes(changed)


def meaning_changed(draw):
    """A graph that can be parsed, but means something else."""
    model = onnx.load_from_string(content)
    graph = model.graph
    for _ in range(draw.randint(1, 3)):
        node = draw.choice(graph.node)
        tensor = draw.choice(graph.initializer)
        match draw.randrange(6):
            case 0 if node.attribute:
                attribute = draw.choice(node.attribute)
                if attribute.ints:
                    attribute.ints[0] = draw.choice([-1, 0, 2**31, -(2**63), 2**40, 7])
                elif attribute.type == onnx.AttributeProto.INT:
                    attribute.i = draw.choice([-1, 0, 1, 2**31, -(2**63), 99])
            case 1 if node.input:
                names = [one.name for one in graph.initializer] + [name for one in graph.node for name in one.output]
                node.input[draw.randrange(len(node.input))] = draw.choice(names)
            case 2:
                graph.node.remove(node)
            case 3 if tensor.dims:
                tensor.dims[0] = draw.choice([0, 1, -1, 2**31, 2**62, 5])
            case 4:
                tensor.data_type = draw.choice([0, 1, 2, 6, 7, 8, 9, 10, 11, 16, 22, 99])
            case 5:
                node.op_type = draw.choice(["Reshape", "Expand", "ConstantOfShape", "Range", "GatherElements", "Loop"])
    return model.SerializeToString()


ran = refused = 0
for number in range(int(sys.argv[2])):
    draw = random.Random(number)
    try:
        change = bytes_changed if number % 2 else meaning_changed
        network = open_graph(change(draw), where="graph", size=(64, 64), threads=1)
        network(np.zeros((2, 3, 64, 64), np.uint8))
        ran += 1
    except BundleError:
        refused += 1
print(ran, refused)
'''


@pytest.mark.slow
def test_damaged_and_forged_graphs(bundle):
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(bundle / "model.onnx"), str(GRAPHS)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ran, refused = map(int, done.stdout.splitlines()[-1].split())
    assert ran + refused == GRAPHS
    assert min(ran, refused) > GRAPHS // 20  # it was neither all refused, nor harmless


def test_names_that_are_no_text(bundle):
    """Names of outputs that are not UTF-8, which ONNX Runtime loads all the same."""
    content = (bundle / "model.onnx").read_bytes()
    spoiled = content.replace(b"distance", b"dist\xe1nce")
    assert spoiled != content
    with pytest.raises(BundleError, match="are not text"):
        open_graph(spoiled, where="graph", size=(64, 64))
