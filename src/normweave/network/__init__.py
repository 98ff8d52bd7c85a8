"""Prepared pixels to raw scores: torch, ONNX Runtime or OpenVINO."""
