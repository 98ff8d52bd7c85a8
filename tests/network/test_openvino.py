"""OpenVINO gives the outcomes that ONNX Runtime gives, behind the same checks."""

import sys
from threading import Thread

import numpy as np
import pytest

from normweave import fitting
from normweave.detector import Detector
from normweave.errors import BundleError, CheckError, ConfigError, MissingError
from normweave.network import open_graph
from normweave.network.openvino import OpenVinoNetwork
from normweave.network.torch import TorchNetwork
from test_detector import same

from .test_onnx import SIZE, graph

openvino = pytest.importorskip("openvino", reason='OpenVINO is not installed: pip install "normweave[openvino]"')


def network(content, device="openvino"):
    return open_graph(content, where="b/model.onnx", size=SIZE, threads=1, device=device)


@pytest.fixture(scope="module")
def there(bundle):
    return Detector.load(bundle, threads=1, device="openvino")


def test_the_outcomes_of_onnxruntime(bundle, there, photos):
    for ours, theirs in zip(
        Detector.load(bundle, threads=1, device="cpu").score(photos), there.score(photos), strict=True
    ):
        same(ours, theirs)


def test_answers_have_the_same_types_and_the_experts_are_left_out(bundle, there):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 64, 64), np.uint8)
    ours, theirs = Detector.load(bundle, threads=1, device="cpu").network, there.network
    assert (ours.library, theirs.library) == ("ONNX Runtime", "OpenVINO")
    own = ours(pixels).subclass
    for excluded in (None, own):
        outputs = theirs(pixels, excluded)
        for name, mine in ours(pixels, excluded)._asdict().items():
            other = getattr(outputs, name)
            assert (mine is None) == (other is None)
            if mine is None:
                continue
            assert (other.dtype, other.shape) == (mine.dtype, mine.shape)
            np.testing.assert_allclose(other.astype(float), mine.astype(float), rtol=1e-3, atol=1e-3, err_msg=name)
    assert (outputs.subclass.dtype, outputs.adapted.dtype) == (np.int64, np.bool_)
    assert (theirs(pixels, own).subclass != own).all()


def test_calibration_is_that_of_onnxruntime(bundle, cloth):
    ours, theirs = (Detector.load(bundle, threads=1, device=device) for device in ("cpu", "openvino"))
    held_out = sorted(cloth.parent.glob("cloth/*/test/good/*.png"))
    for each in (ours, theirs):
        each.calibrate(held_out, false_alarm_rate=0.3)
    np.testing.assert_allclose(theirs.calibration.scores, ours.calibration.scores, rtol=1e-3)
    np.testing.assert_allclose(theirs.calibration.unseen.scores, ours.calibration.unseen.scores, rtol=1e-3)


def test_answers_outlive_the_next_pass():
    loaded = network(graph())
    first, second = np.zeros((1, 3, *SIZE), np.uint8), np.full((1, 3, *SIZE), 9, np.uint8)
    scores = loaded(first).scores
    loaded(second)
    assert (scores == 0).all()


def test_several_callers_at_once_get_their_own_answers():
    loaded = network(graph())
    wrong = []

    def ask(number):
        pixels = np.full((2, 3, *SIZE), number, np.uint8)
        for _ in range(50):
            if not (loaded(pixels).scores == number).all():
                wrong.append(number)

    callers = [Thread(target=ask, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize("other", [{"size": (8, 8)}, {"name": "logits"}, {"name": "image_scores"}], ids=str)
def test_a_graph_that_asks_or_answers_something_else(other):
    with pytest.raises(BundleError, match="but this normweave needs"):
        network(graph(**other))


def test_an_unknown_operator():
    with pytest.raises(BundleError, match=r"(?s)OpenVINO .* cannot load b/model\.onnx: .*Frobnicate.*Update openvino"):
        network(graph(operator="Frobnicate"))


def test_what_is_no_onnx_graph_never_reaches_it():
    with pytest.raises(BundleError, match="is not an ONNX graph"):
        network(b"<?xml version='1.0'?><net name='IR'/>")


def test_a_device_that_is_not_there():
    with pytest.raises(MissingError, match=r"'openvino:NPU9' was requested, but OpenVINO finds only CPU"):
        network(graph(), "openvino:NPU9")


def test_without_openvino(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingError, match=r'pip install "normweave\[openvino\]", or use --device cpu'):
        network(graph())


def test_fitting_does_not_run_there(bundle):
    with pytest.raises(ConfigError, match=r"runs finished bundles .* Use --device auto, cpu or cuda"):
        fitting.load(bundle, device="openvino")


def test_the_parity_check_includes_it(detector, monkeypatch):
    plain = OpenVinoNetwork.__call__

    def altered(self, *inputs):
        outputs = plain(self, *inputs)
        return outputs._replace(scores=1.01 * outputs.scores)

    monkeypatch.setattr(OpenVinoNetwork, "__call__", altered)
    fitted = detector.network
    parts = (fitted.extractor, fitted.standard, fitted.head)
    unexported = TorchNetwork(*parts, config=fitted.config, rows=fitted.rows)
    with pytest.raises(CheckError, match="OpenVINO returns other scores than torch"):
        unexported.exported(detector.calibration)
