"""The fitted state of a head as tensors by name, as it is written to and read from a bundle."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from normweave.errors import BundleError


def state(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and persistent buffers on the CPU, as safetensors stores them."""
    return {
        name: tensor.detach().cpu().contiguous().clone()  # safetensors refuses views and shared memory
        for name, tensor in module.state_dict().items()
    }


def load_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what `state` returned for a fitted module into a new one.

    Sizes may differ from those of the new module (how many patches a bank holds is known only after fitting).
    Names, types and numbers of axes may not.

    Raises:
        BundleError: a tensor is missing, unknown, of another type or number of axes, or holds NaN. The module is
            then unchanged.
    """
    current = module.state_dict()
    problems = []
    if missing := sorted(current.keys() - tensors.keys()):
        problems.append(f"missing {', '.join(missing)}")
    if unknown := sorted(tensors.keys() - current.keys()):
        problems.append(f"unknown {', '.join(unknown)}")
    for name in sorted(current.keys() & tensors.keys()):
        new, old = tensors[name], current[name]
        if new.dtype != old.dtype or new.ndim != old.ndim:
            problems.append(f"{name} is {_describe(new)}, should be {_describe(old)}")
        elif new.is_floating_point() and bool(torch.isnan(new).any()):
            problems.append(f"{name} holds NaN")
    if problems:
        raise BundleError(
            f"The saved weights do not fit this {type(module).__name__}: {'; '.join(problems)}. "
            "Load them with the settings they were saved with, or train again."
        )
    for name, old in current.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        new = tensors[name].to(old.device, copy=True)
        if (parameter := owner._parameters.get(leaf)) is not None:
            setattr(owner, leaf, nn.Parameter(new, requires_grad=parameter.requires_grad))
        else:
            setattr(owner, leaf, new)


def drop_row(module: nn.Module, number: int) -> None:
    """Remove a row from each buffer of a module and of those in it that `by_subclass` names; empty ones stay."""
    for part in module.modules():
        for name in getattr(part, "by_subclass", ()):
            tensor = getattr(part, name)
            if len(tensor):
                setattr(part, name, torch.from_numpy(np.delete(tensor.numpy(), number, axis=0)))


def growing(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the buffers that `by_subclass` and `grows` of a module and of those in it name."""
    return tuple(
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in (*getattr(part, "by_subclass", ()), *getattr(part, "grows", ()))
        if part._buffers.get(name) is not None
    )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} with {tensor.ndim} axes"
