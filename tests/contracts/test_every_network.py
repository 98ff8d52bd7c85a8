"""Contract of every network, which also covers `normweave.network.base` and `normweave.network.torch`.

The networks are the concrete subclasses of `Network`; one without a builder here fails.
"""

import importlib
import inspect
import pkgutil

import numpy as np
import pytest

import normweave.network
from normweave import fitting
from normweave.data import layouts, rows
from normweave.detector import Detector
from normweave.errors import BundleError
from normweave.network.base import OUTPUTS, ROUTING, Network

TYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
TOLERANCE = {"rtol": 2e-3, "atol": 5e-3}
"""Cached features have half precision, and the libraries round differently."""
REFUSES_NO_IMAGE = {"normweave.network.openvino.OpenVinoNetwork"}
"""They raise BundleError for no image; the others return empty outputs."""

pytestmark = pytest.mark.filterwarnings("ignore")  # anomalib and Lightning warn of each other


def torch_network(request):
    return request.getfixturevalue("detector")


def onnx(request):
    return Detector.load(request.getfixturevalue("bundle"), threads=1, device="cpu")


def openvino(request):
    pytest.importorskip("openvino", reason='OpenVINO is not installed: pip install "normweave[openvino]"')
    return Detector.load(request.getfixturevalue("bundle"), threads=1, device="openvino")


def anomalib(request):
    pytest.importorskip("normweave.bridges.anomalib", reason="needs pip install 'normweave[bench]'")
    from normweave.bridges import peer_network, peers

    fitted = request.getfixturevalue("detector")
    settings = ["prepare.height=64", "prepare.width=64", "outcome.false_alarm_rate=0.2"]
    samples = layouts.read(request.getfixturevalue("cloth"), fitted.config.data)
    return peer_network.fit(peers.read("anomalib/padim", settings, seed=0), samples)


BUILDERS = {
    "normweave.network.torch.TorchNetwork": torch_network,
    "normweave.network.onnx.OnnxNetwork": onnx,
    "normweave.network.openvino.OpenVinoNetwork": openvino,
    "normweave.bridges.peer_network.AnomalibNetwork": anomalib,
}


def concrete(cls):
    """Return the names of all subclasses in the package that are not abstract."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    found = {name} if name.startswith("normweave.") and not inspect.isabstract(cls) else set()
    return found.union(*(concrete(each) for each in cls.__subclasses__()))


def test_every_network_has_a_builder():
    for module in pkgutil.iter_modules(normweave.network.__path__, "normweave.network."):
        importlib.import_module(module.name)
    known = set(BUILDERS)
    try:
        importlib.import_module("normweave.bridges.peer_network")
    except ImportError:
        known = {name for name in known if "bridges" not in name}
    assert concrete(Network) == known


@pytest.fixture(scope="module", params=BUILDERS, ids=lambda name: name.rpartition(".")[2])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def fitted(name, request):
    """A detector with this network."""
    return BUILDERS[name](request)


@pytest.fixture(scope="module")
def network(fitted):
    return fitted.network


@pytest.fixture(scope="module")
def images(fitted, cloth):
    """The test images as rows: normal, anomalous and of an unseen subclass."""
    samples = [each for each in layouts.read(cloth, fitted.config.data) if each.split == "test"]
    return rows.scan(samples[::3], fitted.preparation)


@pytest.fixture(scope="module")
def pixels(images):
    return np.stack([images.load(row) for row in range(len(images))])


@pytest.fixture(scope="module")
def outputs(network, pixels):
    return network(pixels)


def same(one, other, **tolerance):
    """Compare raw outputs: the same fields; numbers to the tolerance, subclasses and truth values exactly."""
    for field, expected in one._asdict().items():
        actual = getattr(other, field)
        assert (actual is None) == (expected is None), field
        if expected is None:
            continue
        if expected.dtype == np.float32:
            # Relative to the largest value, since features in half precision have an absolute error.
            scale = max(1.0, float(np.abs(expected).max(initial=0)))
            np.testing.assert_allclose(actual / scale, expected / scale, err_msg=field, **tolerance)
        else:
            np.testing.assert_array_equal(actual, expected, err_msg=field)


def rows_of(outputs, chosen):
    return type(outputs)(*(None if field is None else field[chosen] for field in outputs))


def test_outputs_have_the_documented_shapes_and_types(outputs, pixels):
    for field, array in outputs._asdict().items():
        if array is None:
            assert field != "scores"
            continue
        form, axes = OUTPUTS[field]
        assert (array.dtype, array.ndim, len(array)) == (TYPES[form], axes, len(pixels)), field
        assert np.isfinite(array).all(), field
    assert outputs.scores.shape[1] <= pixels.shape[2]
    assert outputs.scores.shape[2] <= pixels.shape[3]
    if outputs.reconstruction is not None:
        assert outputs.reconstruction.shape == outputs.scores.shape


def test_routing_is_complete_or_absent(outputs, fitted):
    given = [getattr(outputs, field) is not None for field in ROUTING]
    assert all(given) == any(given) == bool(fitted.subclass_names)
    if any(given):
        experts = len(fitted.subclass_names)
        assert outputs.weights.shape[1] == experts
        assert ((outputs.subclass >= 0) & (outputs.subclass < experts)).all()
        np.testing.assert_allclose(outputs.weights.sum(axis=1), 1, rtol=1e-5)
        assert (outputs.weights >= 0).all()
        assert (outputs.distance >= 0).all()


def test_the_images_of_the_test_differ(outputs):
    """Else the tests below would compare equal things."""
    assert len({scores.tobytes() for scores in outputs.scores}) == len(outputs.scores)
    if outputs.subclass is not None:
        assert len(set(outputs.subclass.tolist())) > 1


def test_the_outputs_of_an_image_do_not_depend_on_its_batch(network, pixels, outputs):
    for row in range(len(pixels)):
        same(rows_of(outputs, slice(row, row + 1)), network(pixels[row : row + 1]), rtol=1e-4, atol=1e-4)


def test_the_outputs_of_an_image_do_not_depend_on_the_order(network, pixels, outputs):
    order = np.random.default_rng(0).permutation(len(pixels))
    same(rows_of(outputs, order), network(pixels[order]), rtol=1e-4, atol=1e-4)


def test_later_calls_leave_earlier_outputs_as_they_are(network, pixels):
    first = network(pixels[:2])
    before = first.scores.copy()
    network(255 - pixels[:2])
    np.testing.assert_array_equal(first.scores, before)


def test_no_image(name, network, pixels):
    if name in REFUSES_NO_IMAGE:
        with pytest.raises(BundleError, match="0 images"):
            network(pixels[:0])
    else:
        empty = network(pixels[:0])
        assert all(field is None or len(field) == 0 for field in empty)
        assert empty.scores.shape == (0, *network(pixels[:1]).scores.shape[1:])


def test_an_excluded_expert_is_left_out(network, pixels, outputs):
    nothing = np.full(len(pixels), -1, dtype=np.int64)
    same(outputs, network(pixels, nothing), rtol=1e-6, atol=1e-6)
    if not network.can_exclude:
        same(outputs, network(pixels, np.zeros(len(pixels), dtype=np.int64)), rtol=0, atol=0)
        return
    left_out = np.arange(len(pixels)) % 2 == 0
    excluding = network(pixels, np.where(left_out, outputs.subclass, nothing))
    assert (excluding.subclass[left_out] != outputs.subclass[left_out]).all()
    assert (excluding.weights[left_out, outputs.subclass[left_out]] == 0).all()
    np.testing.assert_allclose(excluding.weights.sum(axis=1), 1, rtol=1e-5)
    assert (np.abs(excluding.scores - outputs.scores)[left_out].max(axis=(1, 2)) > 1e-3).all()
    same(rows_of(outputs, ~left_out), rows_of(excluding, ~left_out), rtol=1e-4, atol=1e-4)


def test_readers_give_the_scores_of_pixels(network, images, outputs, tmp_path):
    order = np.arange(len(images))[::-1]
    for cache in (None, tmp_path, tmp_path):  # the third reader takes from the cache what the second added
        reader = network.reader(images, cache=cache)
        same(rows_of(outputs, order), reader.score(reader.read(order)), **TOLERANCE)
    if network.can_exclude:
        excluding = reader.score(reader.read(order), outputs.subclass[order])
        assert (excluding.subclass != outputs.subclass[order]).all()


def test_only_networks_with_a_cache_have_stored_rows(network, images, tmp_path):
    assert list(network.stored(tmp_path, images.keys)) == [False] * len(images)
    reader = network.reader(images, cache=tmp_path)
    reader.read(np.arange(len(images)))
    stored = list(network.stored(tmp_path, [*images.keys, "0" * 64]))
    assert stored == [any(tmp_path.iterdir())] * len(images) + [False]


def test_embeddings_have_a_row_for_each_image(network, images):
    reader = network.reader(images)
    embedding = reader.embed(reader.read(np.arange(len(images))))
    if not network.embeds:
        assert embedding is None
    else:
        assert (embedding.dtype, embedding.ndim, len(embedding)) == (np.float32, 2, len(images))
        assert np.isfinite(embedding).all()


def test_a_written_bundle_gives_the_same_scores(name, fitted, pixels, outputs, tmp_path):
    target = tmp_path / "copy.bundle"
    record = fitted.record | fitted.operating_points.as_dict()

    def write(**options):
        fitted.network.write(target, record=record, calibration=fitted.calibration, **options)

    if name == "normweave.bridges.peer_network.AnomalibNetwork":
        with pytest.raises(BundleError, match="cannot be saved as a bundle"):
            write(overwrite=False)
        assert not target.exists()
        return
    write(overwrite=False)
    loaded = Detector.load(target, threads=1, device="cpu")
    same(outputs, loaded.network(pixels), rtol=1e-3, atol=1e-3)
    from_tensors = fitting.load(target, device="cpu")
    same(outputs, from_tensors.network(pixels), rtol=1e-3, atol=1e-3)
    assert loaded.calibration.as_dict() == fitted.calibration.as_dict()
    assert loaded.model == fitted.model
    with pytest.raises(BundleError, match="exists"):
        write(overwrite=False)
    write(overwrite=True)
    assert Detector.load(target, device="cpu").record == loaded.record


def test_it_is_named_and_counted(name, network):
    assert network.library
    assert (network.parameters > 0) == (name.rpartition(".")[2] in ("TorchNetwork", "AnomalibNetwork"))
