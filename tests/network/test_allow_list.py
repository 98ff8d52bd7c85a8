"""A graph that is not self-contained is refused before ONNX Runtime sees it."""

import re

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from normweave.errors import BundleError
from normweave.network.allow_list import check


def plain():
    """y = x + constant, nothing else."""
    constant = helper.make_tensor("c", TensorProto.FLOAT, [2], [1.0, 2.0])
    node = helper.make_node("Add", ["x", "c"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph([node], "g", [x], [y], [constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def refused(model, what):
    with pytest.raises(BundleError, match=re.escape(what) + r".*Do not use this bundle"):
        check(model.SerializeToString(), where="b/model.onnx")


def test_a_plain_graph_passes():
    model = plain()
    check(model.SerializeToString(), where="b")
    model.opset_import[0].domain = "ai.onnx"  # the same by its other name
    check(model.SerializeToString(), where="b")


@pytest.mark.parametrize("place", ["../../etc/passwd", "weights.bin", "*/_ORT_MEM_ADDR_/*"])
def test_a_tensor_in_another_file(place):
    model = plain()
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", place
    refused(model, "a tensor that is stored in another file")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("external_data")
    refused(model, "a tensor that is stored in another file")


def test_a_tensor_that_lies_elsewhere_inside_an_attribute():
    model = plain()
    tensor = helper.make_tensor("value", TensorProto.FLOAT, [1], [1.0])
    tensor.data_location = TensorProto.EXTERNAL
    model.graph.node.append(helper.make_node("Constant", [], ["z"], value=tensor))
    refused(model, "a tensor that is stored in another file")


def test_a_tensor_that_claims_to_be_inside():
    model = plain()
    model.graph.initializer[0].data_location = TensorProto.DEFAULT
    check(model.SerializeToString(), where="b")


@pytest.mark.parametrize("domain", ["com.microsoft", "ai.onnx.ml", "mine", "ai.onnx" + "x" * 1000])
def test_operators_from_elsewhere(domain):
    model = plain()
    model.opset_import.append(helper.make_opsetid(domain, 1))
    refused(model, "operators of '")
    model = plain()
    model.graph.node[0].domain = domain
    refused(model, "operators of '")


def test_a_loop():
    model = plain()
    model.graph.node.append(helper.make_node("Loop", ["", "", "x"], ["z"], body=model.graph))
    refused(model, "a graph inside an operator")


def test_a_list_of_graphs():
    """No operator of ONNX takes a list of graphs, but an attribute can hold one."""
    model = plain()
    model.graph.node[0].attribute.append(helper.make_attribute("branches", [plain().graph]))
    refused(model, "a graph inside an operator")


def test_functions_metadata_sparse_tensors_and_training():
    model = plain()
    model.functions.add().name = "f"
    refused(model, "functions")
    model = plain()
    model.metadata_props.add().key = "ort_config"
    refused(model, "metadata")
    model = plain()
    model.graph.sparse_initializer.add()
    refused(model, "sparse tensors")
    model = plain()
    model.training_info.add()
    refused(model, "training information")


def test_an_unknown_field():
    with pytest.raises(BundleError, match="holds field 99 of a model"):
        check(plain().SerializeToString() + b"\x98\x06\x01", where="b")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x3a", "it is cut short"),
        (b"\x3a\x05ab", "it is cut short"),
        (b"\x3b", "wire type 3"),
        (b"\x38\x01", "a message of wire type 0"),
        (b"\xff" * 11, "a number of more than ten bytes"),
        (b"ORTM" * 4, "wire type 7"),
    ],
)
def test_what_is_no_graph(content, why):
    with pytest.raises(BundleError, match=why):
        check(content, where="b")


def test_a_graph_that_is_cut_short_is_refused_or_whole_up_to_there():
    content = plain().SerializeToString()
    refusals = 0
    for end in range(1, len(content)):
        try:
            check(content[:end], where="b")
        except BundleError:
            refusals += 1
    assert refusals > 0.9 * len(content)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_checked_or_refused(content):
    try:
        check(content, where="b")
    except BundleError:
        return
    onnx.ModelProto().ParseFromString(content)  # what passes is at least a message
