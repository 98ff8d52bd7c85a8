"""Metrics for Prometheus."""

import json

from inspections import inspect_files


def test_metrics_of_inspections(service, photos):
    inspect_files(service, *photos[:2])
    text = service.metrics.text().decode()
    assert json.dumps("api") in text
    assert "normweave_inspection_seconds_count 2.0" in text
    assert "normweave_waiting_images 0.0" in text
