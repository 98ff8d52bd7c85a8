"""Prepared pixels to raw outputs: torch while fitting, ONNX Runtime or OpenVINO from a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normweave.network.base import GraphNetwork

OPENVINO = "openvino"


def open_graph(
    content: bytes, *, where: str, size: tuple[int, int], threads: int | None = None, device: str = "auto"
) -> GraphNetwork:
    """Load an ONNX graph.

    Args:
        content: the ONNX file.
        where: its name in messages.
        size: (height, width) of the prepared pixels.
        threads: number of threads of one pass; None: the number of processors.
        device: auto, cpu, cuda[:N] or tensorrt[:N] of ONNX Runtime; openvino (on the processor) or openvino:GPU.

    Raises:
        BundleError: the graph is not self-contained, is not from normweave, or has an operator that the library lacks.
        ConfigError, MissingError: there is no such device, or it is not available.
    """
    library, _, plugin = device.partition(":")
    if library == OPENVINO:
        from normweave.network.openvino import OpenVinoNetwork

        return OpenVinoNetwork(content, where=where, size=size, threads=threads, plugin=plugin or "CPU")
    from normweave.network.onnx import OnnxNetwork, providers

    return OnnxNetwork(content, where=where, size=size, threads=threads, providers=providers(device), device=device)
