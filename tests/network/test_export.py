"""torch to ONNX: every head that can be configured gives the same, and the gate notices when one does not."""

from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from builders import InMemory, TinyPair, head_config
from normweave.config import CNCConfig, Config, HeadConfig, PrepareConfig, TimmConfig
from normweave.errors import CheckError
from normweave.features.standardize import ChannelStandardizer
from normweave.heads import build
from normweave.network import export
from normweave.network.export import Whole, answers, gate, to_onnx
from normweave.network.onnx import Network
from normweave.outcome.operating_point import Calibration
from normweave.scoring import Judge, Line
from normweave.training import train
from normweave.types import FitData, PatchScores, Routing

SIZE = (28, 36)  # of the input; the grid of 7 x 9 is a multiple of nothing
SHAPE = (12, 7, 9)
K = 3


class Small(nn.Module):
    """An extractor: pixels to a few numbers a patch of 4 x 4, without weights that anyone trained."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0)) / 500)

    def forward(self, pixels):
        return nn.functional.conv2d(pixels.float(), self.kernel, stride=4)


def pictures(count, *, seed):
    """Images of K kinds, which differ in colour: (count, 3, H, W) uint8, and the kinds."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(count) % K
    colour = torch.tensor([[60.0, 90, 200], [180, 90, 60], [90, 200, 90]])[kinds][:, :, None, None]
    noise = torch.randn(count, 3, *SIZE, generator=generator)
    return (colour + 20 * noise).clamp(0, 255).to(torch.uint8), kinds.numpy()


def network(config):
    """A whole network, fitted on pictures."""
    pixels, kinds = pictures(24, seed=1)
    extractor = Small()
    features = InMemory(extractor(pixels).detach())
    standard = ChannelStandardizer(channels=SHAPE[0])
    standard.fit(features)
    data = FitData(
        features=InMemory(standard(features.features)),
        subclasses=kinds,
        names=("a", "b", "c"),
        groups=np.arange(24) // 2,
        holdout=np.arange(24) < 6,
        seed=0,
        pair=TinyPair(SHAPE[:1]) if isinstance(config, CNCConfig) else None,
    )
    head = build(config, shape=SHAPE)
    head.begin(data)
    for stage in head.stages(data):
        train(stage, data, device="cpu")
    head.finish(data)
    return Whole(extractor=extractor, standard=standard, head=head).eval()


def loaded(content):
    return Network(content, where="graph", size=SIZE, threads=1, device="cpu")


def judge(head=None, *, whole=None, pixels=None, **line):
    config = Config(
        features=TimmConfig(batch_images=4), prepare=PrepareConfig(height=32, width=36), head=head or HEAD
    )
    return Judge(config=config, line=None, kinds={}, subclass_names=("a", "b", "c"), **line)


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
    parts = (
        {"kind": expert} | SMALL.get(expert, {}) | ({} if calibrated is None else {"calibrated": calibrated})
    )
    config = head_config(expert=parts, routing={"method": routing} | SMALL.get(routing, {}), **values)
    return pytest.param(config, id=name, marks=[] if fast else [pytest.mark.slow])


HEADS = [
    *(pytest.param(kind(), id=kind().kind) for kind in get_args(HeadConfig)),
    # Every two of expert, adaption and routing meet in one; of the fast ones, each expert, adaption and routing.
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
def test_the_graph_says_what_torch_says(config):
    whole = network(config)
    graph = loaded(to_onnx(whole, height=SIZE[0], width=SIZE[1]))
    pixels, _ = pictures(7, seed=2)
    own = torch.tensor([0, 1, 2, -1, 2, 0, 1])

    for count in (1, 2, 7):
        few = pixels[:count]
        compare(whole.says(few), graph(few.numpy()))
        if whole.knows_strangers:
            compare(whole.says(few, own[:count]), graph(few.numpy(), own[:count].numpy()))
    assert whole.knows_strangers == (config.kind == "adapted_moe" and getattr(config, "moe", False))


def compare(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        assert (value.numpy().dtype, tuple(value.shape)) == (other.dtype, other.shape)
        np.testing.assert_allclose(other, value.detach().numpy(), rtol=1e-3, atol=1e-3, err_msg=name)


def test_minus_one_leaves_an_image_all_experts():
    whole = network(HEAD)
    pixels, _ = pictures(5, seed=2)
    with torch.no_grad():
        compare(
            whole.says(pixels), {k: v.numpy() for k, v in whole.says(pixels, torch.full((5,), -1)).items()}
        )


def test_answers_are_the_fields_that_a_head_gives():
    one = torch.ones(1)
    routing = Routing(weights=one, subclass=one, distance=one, adapted=one)
    assert list(answers(PatchScores(scores=one, image_scores=None, routing=None))) == ["scores"]
    assert list(answers(PatchScores(one, one, routing, one))) == [
        "scores",
        "image_scores",
        "reconstruction",
        "weights",
        "subclass",
        "distance",
        "adapted",
    ]


# ── the graph as a file ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def whole():
    return network(HEAD)


@pytest.fixture(scope="module")
def content(whole):
    return to_onnx(whole, height=SIZE[0], width=SIZE[1])


def test_the_same_network_gives_the_same_bytes(whole, content):
    assert to_onnx(whole, height=SIZE[0], width=SIZE[1]) == content


def test_the_graph_holds_no_path_and_no_source(content):
    model = onnx.load_from_string(content)
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert b".py" not in content
    assert [opset.domain for opset in model.opset_import] == [""]


def test_what_onnx_has_no_word_for_is_a_gate(whole):
    class Odd(nn.Module):
        def forward(self, pixels):
            odd = torch.linalg.eigvals(pixels[:, 0, :28, :28].float()).real.mean(dim=1)
            return whole.extractor(pixels) + odd[:, None, None, None]

    odd = Whole(extractor=Odd(), standard=whole.standard, head=whole.head)
    with pytest.raises(CheckError, match="cannot be written as an ONNX graph, so no bundle is written"):
        to_onnx(odd, height=SIZE[0], width=SIZE[1])


# ── the gate ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def images(count=12):
    return [one[None] for one in pictures(count, seed=3)[0].numpy()]


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


def test_a_faithful_graph_passes(whole, content):
    gate(whole, loaded(content), images(), judge())


def test_an_altered_constant_is_noticed(whole, content):
    with pytest.raises(
        CheckError, match=r"gives other scores than torch for \d+ of 12 calibration images, first "
    ):
        gate(whole, altered(content, lambda array: 1.01 * array), images(), judge())


def test_an_altered_constant_that_only_strangers_meet_is_noticed(whole, content):
    """Expert 0 is asked for no image of kinds 1 and 2 unless its own expert may not be asked."""
    pixels, kinds = pictures(12, seed=3)
    theirs = pixels[torch.from_numpy(kinds == 1)].numpy()
    strict = network(head_config(expert="gaussian", top_k=1))
    graph = to_onnx(strict, height=SIZE[0], width=SIZE[1])
    second = strict.says(torch.from_numpy(theirs), torch.ones(len(theirs), dtype=torch.int64))["subclass"]

    def change(array):
        array[second[0]] *= 1.01
        return array

    with pytest.raises(CheckError, match=r"gives other scores as strangers than torch"):
        gate(strict, altered(graph, change), [one[None] for one in theirs], judge())


def test_an_answer_that_is_missing_is_noticed(whole, content):
    dfm = network(next(kind() for kind in get_args(HeadConfig) if kind().kind == "dfm"))
    other = loaded(to_onnx(dfm, height=SIZE[0], width=SIZE[1]))
    with pytest.raises(CheckError, match="do not both give"):
        gate(whole, other, images(), judge())


def lined(calibration):
    from dataclasses import replace

    return replace(judge(), line=Line(calibration, None))


@pytest.mark.parametrize(("apart", "passes"), [(1e-5, True), (1e-2, False)])
def test_verdicts_are_equal_but_where_rounding_decides(whole, content, apart, passes, monkeypatch):
    """The line lies between the scores that the two give, near or not so near."""
    monkeypatch.setattr(export, "_agree", lambda *_: None)
    pixels = images(4)
    score = float(scored(whole, pixels)[0])
    line = score * (1 + apart / 2)
    normals = np.append(np.full(30, line - 10), np.full(30, line))
    calibration = Calibration(
        scores=normals, subclass_names=("a", "b", "c"), false_alarm_rate=0.5, unknown_rate=0.5
    )
    theirs = altered(content, lambda array: (1 + apart) * array)
    if passes:
        gate(whole, theirs, pixels, lined(calibration))
    else:
        with pytest.raises(
            CheckError, match=r"calls calibration image \d+ anomalous where torch calls it normal"
        ):
            gate(whole, theirs, pixels, lined(calibration))


def scored(whole, pixels):
    from normweave.scoring import Scored

    with torch.inference_mode():
        said = whole.says(torch.from_numpy(np.concatenate(pixels)))
    return Scored.of({name: value.numpy() for name, value in said.items()}, judge().config).scores
