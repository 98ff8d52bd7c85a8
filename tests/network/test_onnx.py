"""Graphs that are not ours are refused with the reason; devices are checked."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from normweave.errors import BundleError, ConfigError, MissingError
from normweave.network import open_graph
from normweave.network.onnx import PROVIDERS, providers

SIZE = (4, 6)


def graph(*, operator="ReduceMax", size=SIZE, name="scores", inputs=("pixels",)):
    """The largest colour of each pixel, as a grid."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["real"], to=TensorProto.FLOAT),
        helper.make_node(operator, ["real", "axis"], [name], keepdims=0),
    ]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    given = [helper.make_tensor_value_info(each, TensorProto.UINT8, ["batch", 3, *size]) for each in inputs]
    scores = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *size])
    model = helper.make_model(
        helper.make_graph(nodes, "g", given, [scores], [axis]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    model.ClearField("producer_name")
    return model.SerializeToString()


def network(content, **how):
    return open_graph(content, where="b/model.onnx", size=SIZE, threads=1, **how)


def test_pixels_to_answers():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, *SIZE), np.uint8)
    outputs = network(graph())(pixels)
    assert [name for name, value in outputs._asdict().items() if value is not None] == ["scores"]
    np.testing.assert_array_equal(outputs.scores, pixels.max(axis=1))


def test_an_unknown_operator():
    with pytest.raises(BundleError, match=r"cannot load b/model\.onnx: .*Frobnicate.* Update onnxruntime"):
        network(graph(operator="Frobnicate"))


@pytest.mark.parametrize(
    "other",
    [{"size": (8, 8)}, {"name": "logits"}, {"inputs": ("pixels", "secret")}, {"name": "image_scores"}],
    ids=str,
)
def test_a_graph_that_asks_or_answers_something_else(other):
    with pytest.raises(BundleError, match="but this normweave needs"):
        network(graph(**other))


def test_a_graph_that_cannot_be_computed():
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Cast", ["pixels"], ["real"], to=TensorProto.FLOAT),
                helper.make_node("Reshape", ["real", "shape"], ["scores"]),
            ],
            "g",
            [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 3, *SIZE])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", "h", "w"])],
            [helper.make_tensor("shape", TensorProto.INT64, [3], [7, 7, 7])],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    loaded = network(model.SerializeToString())
    with pytest.raises(BundleError, match=r"b/model\.onnx cannot be computed"):
        loaded(np.zeros((1, 3, *SIZE), np.uint8))


@pytest.fixture
def every_provider(monkeypatch, tmp_path):
    """An onnxruntime that claims to have all providers, as onnxruntime-gpu does on a machine without a card."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_devices():
    assert providers("cpu") == ["CPUExecutionProvider"]
    assert providers("auto")[-1] == "CPUExecutionProvider"
    for wrong in ("gpu", "cpu:1", "cuda:first"):
        with pytest.raises(ConfigError, match=f"Unknown device '{wrong}'.*Known: auto, cpu, cuda, openvino, tensorrt"):
            providers(wrong)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tensorrt"])
def test_a_device_that_this_onnxruntime_lacks_is_refused(device):
    with pytest.raises(MissingError, match=rf"Device '{device}' was requested, but this onnxruntime has only .*CPU"):
        network(graph(), device=device)


def test_providers_and_their_options(every_provider, tmp_path):
    cuda = ("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"})
    assert providers("cuda:1") == [cuda, "CPUExecutionProvider"]
    (name, options), second, last = providers("tensorrt:1")
    assert (name, second, last) == ("TensorrtExecutionProvider", cuda, "CPUExecutionProvider")
    assert options["trt_fp16_enable"] == "0"
    assert options["trt_engine_cache_path"] == str(tmp_path / "normweave" / "tensorrt")
    assert (tmp_path / "normweave" / "tensorrt").is_dir()
    assert providers("auto")[0][0] == "CUDAExecutionProvider"


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_cannot_start_is_refused_and_not_replaced_by_the_processor(every_provider, device):
    with pytest.raises(MissingError, match=rf"Device '{device}' was requested, but ONNX Runtime .* could not start it"):
        network(graph(), device=device)
    assert network(graph(), device="cpu")(np.zeros((1, 3, *SIZE), np.uint8)).scores.shape == (1, *SIZE)
