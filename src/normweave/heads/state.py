"""What a fitted head knows, as tensors by name: what goes into a bundle and comes back out of it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from normweave.errors import BundleError


def state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and persistent buffers, on the CPU and as safetensors wants them."""
    return {
        name: tensor.detach().cpu().contiguous().clone()  # safetensors refuses views and shared memory
        for name, tensor in module.state_dict().items()
    }


def load_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a freshly built module what `state` took from a fitted one.

    Sizes may differ from the fresh module's (how many patches a bank holds is known after fitting only);
    names, types and numbers of axes may not.

    Raises:
        BundleError: a tensor is missing, unknown, of another type or number of axes, or holds NaN. Then the
            module is as it was.
    """
    fresh = module.state_dict()
    wrong = []
    if missing := sorted(fresh.keys() - tensors.keys()):
        wrong.append(f"missing {', '.join(missing)}")
    if strange := sorted(tensors.keys() - fresh.keys()):
        wrong.append(f"unknown {', '.join(strange)}")
    for name in sorted(fresh.keys() & tensors.keys()):
        new, old = tensors[name], fresh[name]
        if new.dtype != old.dtype or new.ndim != old.ndim:
            wrong.append(f"{name} is {_kind(new)}, should be {_kind(old)}")
        elif new.is_floating_point() and bool(torch.isnan(new).any()):
            wrong.append(f"{name} holds NaN")
    if wrong:
        raise BundleError(
            f"The saved weights do not fit this {type(module).__name__}: {'; '.join(wrong)}. "
            "Load them with the settings they were saved with, or train again."
        )
    for name, old in fresh.items():
        place, _, leaf = name.rpartition(".")
        owner = module.get_submodule(place)
        new = tensors[name].to(old.device, copy=True)
        if (parameter := owner._parameters.get(leaf)) is not None:
            setattr(owner, leaf, nn.Parameter(new, requires_grad=parameter.requires_grad))
        else:
            setattr(owner, leaf, new)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} with {tensor.ndim} axes"
