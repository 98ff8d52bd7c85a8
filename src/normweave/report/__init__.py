"""Metrics of anomaly detection and the report that shows them."""
