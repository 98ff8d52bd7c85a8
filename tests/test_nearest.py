"""The largest product: brute force, the declaration of the operator, and its ONNX form."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

from normweave.logs import quiet
from normweave.nearest import BLOCK, MOST_PARTS, PATCHES, largest_product, part_size
from normweave.network.translate import translate

M, R = 2 * BLOCK, 7


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(*, images, offsets, patches=30):
    """Patches, a bank and offsets, one of which leaves out half of the bank."""
    offset = random(offsets, M, seed=2)
    offset[-1, : M // 2] = -torch.inf
    return random(images, patches, R, seed=0), random(M, R, seed=1), offset


def best(patches, bank, offset):
    return (torch.einsum("bpr,mr->bpm", patches, bank) + offset[:, None]).argmax(dim=2)


class Search(nn.Module):
    """The search in a bank as a module of patches (B, P, R) and offsets (B, M)."""

    def __init__(self, bank):
        super().__init__()
        self.register_buffer("bank", bank)

    def forward(self, patches, offset):
        return largest_product(patches, self.bank, offset)


@pytest.fixture(params=[7, 15, 64], ids=["parts, the last one smaller", "two equal parts", "one part"])
def parts(request, monkeypatch):
    monkeypatch.setattr("normweave.nearest.PATCHES", request.param)


@pytest.mark.parametrize("offsets", [1, 3], ids=["same offset for all images", "offset of each image"])
@pytest.mark.usefixtures("parts")
def test_agrees_with_brute_force(offsets):
    given = tensors(images=3, offsets=offsets)

    assert torch.equal(largest_product(*given), best(*given))


def test_operator_is_as_declared():
    torch.library.opcheck(largest_product, tensors(images=2, offsets=1), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("parts")
def test_onnx_form_agrees_with_torch_for_any_number_of_images():
    patches, bank, offset = tensors(images=2, offsets=2)
    batch = Dim("batch")
    module, shapes = Search(bank), ({0: batch}, {0: batch})
    with quiet("torch"):  # of the two names of one axis
        traced = torch.export.export(module, (patches, offset), dynamic_shapes=shapes)
        program = translate(traced, input_names=["patches", "offset"])
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())

    for images in (1, 2, 5):
        patches, _, offset = tensors(images=images, offsets=images)
        (rows,) = session.run(None, {"patches": patches.numpy(), "offset": offset.numpy()})
        assert np.array_equal(rows, best(patches, bank, offset).numpy())


def test_graph_has_a_bounded_number_of_parts():
    for patches in (1, PATCHES, PATCHES + 1, 1024, 4096, 10_000):
        assert -(-patches // part_size(patches)) <= MOST_PARTS
    assert part_size(1024) == PATCHES
