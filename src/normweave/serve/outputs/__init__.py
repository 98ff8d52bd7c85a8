"""Outputs for results, one module for each `type` of `outputs` in `line.yaml`."""
