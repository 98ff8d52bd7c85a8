"""Anomaly maps to an image score, an operating point and a verdict. Needs numpy only."""
