import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from normweave.errors import BundleError
from normweave.heads.state import load_state, state


class Part(nn.Module):
    """A buffer whose size is known after fitting, a frozen parameter, and layers."""

    def __init__(self, stored):
        super().__init__()
        self.register_buffer("bank", torch.arange(stored * 3.0).view(stored, 3))
        self.register_buffer("temporary", torch.zeros(7), persistent=False)
        self.frozen = nn.Parameter(torch.full((2,), float(stored)), requires_grad=False)
        self.inside = nn.ModuleDict({"linear": nn.Linear(3, stored + 1), "norm": nn.BatchNorm1d(3)})


def test_loads_tensors_of_other_sizes():
    fitted, fresh = Part(5), Part(0)
    load_state(fresh, load(save(state(fitted))))
    assert sorted(state(fresh)) == sorted(fitted.state_dict())
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(state(fresh)[name], tensor), name
    assert {name: p.requires_grad for name, p in fresh.named_parameters()} == {
        name: p.requires_grad for name, p in fitted.named_parameters()
    }


def test_state_and_loaded_tensors_are_copies():
    fitted = Part(5)
    taken = state(fitted)
    fresh = Part(0)
    load_state(fresh, taken)
    fitted.bank.fill_(-1)
    taken["bank"].fill_(-2)
    assert fresh.bank.min() == 0


def test_views_can_be_saved():
    part = Part(4)
    part.bank = part.bank[:, :2].T
    assert torch.equal(load(save(state(part)))["bank"], part.bank)


def test_all_mistakes_are_reported_together_and_nothing_is_changed():
    fresh = Part(0)
    before = state(fresh)
    broken = state(Part(5))
    broken["extra"] = broken.pop("frozen")
    broken["bank"] = broken["bank"].double()
    broken["inside.linear.bias"] = broken["inside.linear.bias"][None]
    broken["inside.norm.running_mean"][1] = torch.nan
    with pytest.raises(BundleError) as error:
        load_state(fresh, broken)
    assert str(error.value) == (
        "The saved weights do not fit this Part: missing frozen; unknown extra; "
        "bank is float64 with 2 axes, should be float32 with 2 axes; "
        "inside.linear.bias is float32 with 2 axes, should be float32 with 1 axes; "
        "inside.norm.running_mean holds NaN. "
        "Load them with the settings they were saved with, or train again."
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(fresh).items())
