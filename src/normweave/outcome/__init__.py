"""Anomaly maps to one score an image, an operating point, and a verdict. numpy only."""
