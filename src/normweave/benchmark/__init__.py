"""Benchmark: evaluate detectors over data sets, protocols and seeds, and write results tables."""
