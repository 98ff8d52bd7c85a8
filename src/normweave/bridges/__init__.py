"""Adapters: anomalib's models in our benchmark, and our detectors in anomalib. Imported only when used."""
