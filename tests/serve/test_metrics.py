"""Metrics for Prometheus."""

import json

from inspections import inspect_files
from normweave.serve.metrics import Metrics


def test_the_line_is_named():
    assert 'normweave_line_info{line="Press 4"} 1.0' in Metrics(line="Press 4").text().decode()


def test_metrics_of_inspections(service, photos):
    inspect_files(service, *photos[:2])
    text = service.metrics.text().decode()
    assert json.dumps("api") in text
    assert "normweave_inspection_seconds_count 2.0" in text
    assert "normweave_waiting_images 0.0" in text
