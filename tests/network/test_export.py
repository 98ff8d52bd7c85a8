"""Every head gives the same scores as an ONNX graph, and the parity check finds a graph that does not."""

from typing import get_args

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import nn

from builders import InMemory, Small, TinyPair, head_config
from normweave.config import CNCConfig, Config, HeadConfig, MemoryBankConfig, PrepareConfig, TimmConfig
from normweave.errors import CheckError
from normweave.features.frozen import Backbone, FrozenFeatures
from normweave.features.standardize import ChannelStandardizer
from normweave.heads import build
from normweave.network import export, open_graph
from normweave.network.export import check_equal, check_parity, to_onnx
from normweave.network.torch import TorchModule, named_outputs
from normweave.outcome.operating_point import Calibration
from normweave.scoring import TileScores
from normweave.training import train
from normweave.types import FitData, PatchScores, RawOutput, Routing

SIZE = (28, 36)  # of the input; the grid of 7 x 9 is a multiple of nothing
SHAPE = (12, 7, 9)
K = 3


def make_images(count, *, seed, size=SIZE):
    """Return images of K subclasses that differ in colour, (count, 3, H, W) uint8, and their subclasses."""
    generator = torch.Generator().manual_seed(seed)
    subclasses = torch.arange(count) % K
    colour = torch.tensor([[60.0, 90, 200], [180, 90, 60], [90, 200, 90]])[subclasses][:, :, None, None]
    noise = torch.randn(count, 3, *size, generator=generator)
    return (colour + 20 * noise).clamp(0, 255).to(torch.uint8), subclasses.numpy()


def network(config, *, extractor=None, size=SIZE):
    """Return a network fitted on images."""
    pixels, subclasses = make_images(24, seed=1, size=size)
    extractor = extractor or Small()
    features = InMemory(extractor(pixels).detach())
    shape = tuple(features.features.shape[1:])
    standard = ChannelStandardizer(channels=shape[0])
    standard.fit(features)
    data = FitData(
        features=InMemory(standard(features.features)),
        subclasses=subclasses,
        names=("a", "b", "c"),
        groups=np.arange(24) // 2,
        holdout=np.arange(24) < 6,
        seed=0,
        pair=TinyPair(shape[:1]) if isinstance(config, CNCConfig) else None,
    )
    head = build(config, shape=shape)
    head.begin(data)
    for stage in head.stages(data):
        train(stage, data, device="cpu")
    head.finish(data)
    return TorchModule(extractor=extractor, standard=standard, head=head).eval()


def loaded(content, *, size=SIZE):
    return open_graph(content, where="graph", size=size, threads=1, device="cpu")


CONFIG = Config(features=TimmConfig(batch_images=4), prepare=PrepareConfig(height=32, width=36))
HEAD = head_config(expert="gaussian")
SMALL = {
    "discriminator": {"hidden": 8, "patches": 64, "training.epochs": 1},
    "memory": {"max_pool": 400},
    "network": {"embedding": 4, "training.epochs": 1},
}
SMALL_CNC = {"training.epochs": 1, "prompts.training.epochs": 1, "width": 8, "heads": 2}
EXPERTS = ("layout", "gaussian", "subspace", "memory", "discriminator")
ADAPTIONS = ("off", "full", "paper", "guarded")
ROUTINGS = ("statistics", "likelihood", "network")


def moe(*, expert, fast=False, routing="statistics", calibrated=None, **values):
    name = " ".join(str(value) for value in (expert, *values.values(), routing))
    parts = {"kind": expert} | SMALL.get(expert, {}) | ({} if calibrated is None else {"calibrated": calibrated})
    config = head_config(expert=parts, routing={"method": routing} | SMALL.get(routing, {}), **values)
    return pytest.param(config, id=name, marks=[] if fast else [pytest.mark.slow])


HEADS = [
    *(pytest.param(kind(), id=kind().kind) for kind in get_args(HeadConfig)),
    # Every pair of expert, adaption and routing occurs once; the fast ones cover each expert, adaption and routing.
    *(
        moe(expert=expert, adaption=adaption, routing=ROUTINGS[(n + a) % 3], fast=n % 4 == a)
        for n, expert in enumerate(EXPERTS)
        for a, adaption in enumerate(ADAPTIONS)
    ),
    moe(expert="gaussian", aggregation="min"),
    moe(expert="gaussian", aggregation="mean"),
    moe(expert="gaussian", moe=False),
    moe(expert="gaussian", top_k=1),
    moe(expert="gaussian", top_k=4),
    moe(expert="gaussian", border=0),
    moe(expert="memory", calibrated=False),
    moe(expert="layout", discover="always"),
    pytest.param(head_config("cnc", **SMALL_CNC, guide={"tokens": "text", "residual": 0.5}), id="cnc guide"),
    pytest.param(
        head_config("cnc", **SMALL_CNC, moe=False, bottleneck=4, **{"prompts.text": "free"}),
        id="cnc plain free",
    ),
]


@pytest.mark.parametrize("config", HEADS)
def test_the_graph_gives_the_scores_of_torch(config):
    module = network(config)
    graph = loaded(to_onnx(module, height=SIZE[0], width=SIZE[1]))
    pixels, _ = make_images(7, seed=2)
    own = torch.tensor([0, 1, 2, -1, 2, 0, 1])

    for count in (1, 2, 7):
        batch = pixels[:count]
        compare(module.outputs(batch), graph(batch.numpy()))
        if module.can_exclude:
            compare(module.outputs(batch, own[:count]), graph(batch.numpy(), own[:count].numpy()))
    assert module.can_exclude == (config.kind.startswith("adapted_moe") and getattr(config, "moe", True))


@pytest.mark.parametrize(
    ("name", "patch", "config"),
    [
        ("vit_small_patch14_reg4_dinov2", 14, MemoryBankConfig(share=0.2)),
        ("vit_small_patch16_dinov3", 16, HEAD),
    ],
)
def test_averaged_blocks_of_a_transformer_give_the_scores_of_torch(name, patch, config):
    """Position embeddings of another size, register tokens and rotary embeddings, in a batch of any size."""
    torch.manual_seed(0)
    size = (3 * patch, 4 * patch)
    backbone = Backbone(
        model=timm.create_model(name, depth=2, embed_dim=48, num_heads=3, init_values=1.0),
        name=name,
        indices=[0, 1],
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        grid_stride=patch,
        neighbourhood=1,
        average=True,
    )
    extractor = FrozenFeatures(backbone, height=size[0], width=size[1], batch_images=2)
    module = network(config, extractor=extractor, size=size)
    graph = loaded(to_onnx(module, height=size[0], width=size[1]), size=size)
    for count in (1, 3):
        pixels, _ = make_images(count, seed=2, size=size)
        compare(module.outputs(pixels), graph(pixels.numpy()))


def compare(ours, theirs):
    assert ours.keys() == {name for name, value in theirs._asdict().items() if value is not None}
    for name, value in ours.items():
        other = getattr(theirs, name)
        assert (value.numpy().dtype, tuple(value.shape)) == (other.dtype, other.shape)
        if name == "nearest":  # rounding may decide between two
            assert (other == value.numpy()).mean() > 0.95
            continue
        np.testing.assert_allclose(other, value.detach().numpy(), rtol=1e-3, atol=1e-3, err_msg=name)


def test_a_fusion_without_one_of_its_experts_gives_the_scores_of_torch():
    whole, module = network(head_config()), network(head_config())
    number, head = len(module.head.fusion.config.use), module.head
    head.fusion.weights = torch.tensor([0.75, 0.0, 0.25]).expand(len(head.fusion.weights), number).contiguous()
    head.branches[1].remove()
    content = to_onnx(module, height=SIZE[0], width=SIZE[1])
    pixels, _ = make_images(5, seed=2)
    compare(module.outputs(pixels), loaded(content)(pixels.numpy()))
    assert len(content) < len(to_onnx(whole, height=SIZE[0], width=SIZE[1]))


def test_minus_one_leaves_an_image_all_experts():
    module = network(HEAD)
    pixels, _ = make_images(5, seed=2)
    compare(module.outputs(pixels), raw(module, pixels, torch.full((5,), -1)))


def raw(module, pixels, excluded=None):
    with torch.inference_mode():
        outputs = module.outputs(pixels, excluded)
    return RawOutput(**{name: value.numpy() for name, value in outputs.items()})


def test_outputs_are_the_fields_that_a_head_gives():
    one = torch.ones(1)
    routing = Routing(weights=one, subclass=one, distance=one, adapted=one)
    assert list(named_outputs(PatchScores(scores=one, image_scores=None, routing=None))) == ["scores"]
    assert list(named_outputs(PatchScores(one, one, routing, one, one))) == [
        "scores",
        "image_scores",
        "reconstruction",
        "nearest",
        "weights",
        "subclass",
        "distance",
        "adapted",
    ]


# ── the graph as a file ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def module():
    return network(HEAD)


@pytest.fixture(scope="module")
def content(module):
    return to_onnx(module, height=SIZE[0], width=SIZE[1])


def test_the_same_network_gives_the_same_bytes(module, content):
    assert to_onnx(module, height=SIZE[0], width=SIZE[1]) == content


def test_the_graph_holds_no_path_and_no_source(content):
    model = onnx.load_from_string(content)
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert b".py" not in content
    assert [opset.domain for opset in model.opset_import] == [""]


@pytest.mark.parametrize(("activation", "opset"), [(nn.ReLU6(inplace=True), 18), (nn.GELU(), 20)])
def test_the_opset_is_the_one_that_onnx_runtime_computes_fastest(module, activation, opset):
    class Activated(nn.Module):
        def forward(self, pixels):
            return module.extractor(activation(pixels.float()).to(torch.uint8))

    other = TorchModule(extractor=Activated(), standard=module.standard, head=module.head)
    model = onnx.load_from_string(to_onnx(other, height=SIZE[0], width=SIZE[1]))
    assert [each.version for each in model.opset_import] == [opset]
    assert any(node.op_type == "Gelu" for node in model.graph.node) == (opset == 20)


def test_an_operator_that_onnx_lacks_is_refused(module):
    class Odd(nn.Module):
        def forward(self, pixels):
            odd = torch.linalg.eigvals(pixels[:, 0, :28, :28].float()).real.mean(dim=1)
            return module.extractor(pixels) + odd[:, None, None, None]

    odd = TorchModule(extractor=Odd(), standard=module.standard, head=module.head)
    with pytest.raises(CheckError, match="cannot be written as an ONNX graph, so no bundle is written"):
        to_onnx(odd, height=SIZE[0], width=SIZE[1])


# ── the parity check ─────────────────────────────────────────────────────────────────────────────────────────────────


def images(count=12):
    return [one[None] for one in make_images(count, seed=3)[0].numpy()]


def altered(content, change):
    """The graph with one constant, the whitener of the Gaussian experts, changed."""
    model = onnx.load_from_string(content)
    changed = 0
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 3 and array.shape[0] == K and array.shape[1] == array.shape[2]:
            tensor.CopyFrom(numpy_helper.from_array(change(array.copy()), tensor.name))
            changed += 1
    assert changed == 1
    return loaded(model.SerializeToString())


def test_a_faithful_graph_passes(module, content):
    check_parity(module, [loaded(content)], images(), CONFIG, None)


def test_an_altered_constant_is_noticed(module, content):
    with pytest.raises(
        CheckError, match=r"returns other scores than torch for \d+ of 12 calibration images, the first "
    ):
        check_parity(module, [loaded(content), altered(content, lambda array: 1.01 * array)], images(), CONFIG, None)


@pytest.mark.parametrize(("apart", "passes"), [(0.9e-3, True), (1.1e-3, False), (5e-3, False)])
def test_a_thousandth_of_a_score_is_the_tolerance(apart, passes):
    ours, theirs = (
        TileScores.of(RawOutput(np.full((8, 4, 4), score, dtype=np.float32)), CONFIG) for score in (1, 1 + apart)
    )
    if passes:
        check_equal(ours, theirs, "", "ONNX Runtime")
    else:
        with pytest.raises(CheckError, match="ONNX Runtime returns other scores than torch for 8 of 8"):
            check_equal(ours, theirs, "", "ONNX Runtime")


def test_an_altered_constant_that_only_excluding_reaches_is_noticed():
    """With top 1, an expert scores an image of another subclass only if that image's own expert is left out."""
    pixels, subclasses = make_images(12, seed=3)
    theirs = pixels[torch.from_numpy(subclasses == 1)].numpy()
    strict = network(head_config(expert="gaussian", top_k=1))
    graph = to_onnx(strict, height=SIZE[0], width=SIZE[1])
    second = raw(strict, torch.from_numpy(theirs), torch.ones(len(theirs), dtype=torch.int64)).subclass

    def change(array):
        array[second[0]] *= 1.01
        return array

    with pytest.raises(CheckError, match=r"returns other scores for unseen subclasses than torch"):
        check_parity(strict, [altered(graph, change)], [one[None] for one in theirs], CONFIG, None)


def test_a_missing_output_is_noticed(module):
    dfm = network(next(kind() for kind in get_args(HeadConfig) if kind().kind == "dfm"))
    other = loaded(to_onnx(dfm, height=SIZE[0], width=SIZE[1]))
    with pytest.raises(CheckError, match="do not both return"):
        check_parity(module, [other], images(), CONFIG, None)


@pytest.mark.parametrize(("apart", "passes"), [(1e-5, True), (1e-2, False)])
def test_verdicts_are_equal_except_where_rounding_decides(module, content, apart, passes, monkeypatch):
    """The threshold is between the two scores, near both or farther away."""
    monkeypatch.setattr(export, "check_equal", lambda *_: None)
    pixels = images(4)
    raw_output = raw(module, torch.from_numpy(np.concatenate(pixels)))
    threshold = float(TileScores.of(raw_output, CONFIG).scores[0]) * (1 + apart / 2)
    normals = np.append(np.full(30, threshold - 10), np.full(30, threshold))
    calibration = Calibration(scores=normals, subclass_names=("a", "b", "c"), false_alarm_rate=0.5, unknown_rate=0.5)
    theirs = altered(content, lambda array: (1 + apart) * array)
    if passes:
        check_parity(module, [theirs], pixels, CONFIG, calibration)
    else:
        with pytest.raises(CheckError, match=r"on calibration image \d+ is anomalous, that of torch normal"):
            check_parity(module, [theirs], pixels, CONFIG, calibration)
