from types import SimpleNamespace

import numpy as np

from normweave.outcome.operating_point import Calibration
from normweave.serve.pages.review import ACTIONS, queue
from normweave.serve.records import Filter


def test_the_queue_has_defective_unknown_unreadable_and_borderline_parts():
    calibration = Calibration(scores=np.arange(60.0), false_alarm_rate=0.05, unknown_rate=0.05)
    service = SimpleNamespace(detector=SimpleNamespace(calibration=calibration))
    assert queue(service) == (
        Filter(verdicts=("anomalous", "unknown"), reviewed=False),
        Filter(unreadable=True, reviewed=False),
        Filter(verdicts=("normal",), reviewed=False, p_value_below=0.1),
    )


def test_every_action_has_its_own_key_which_begins_its_word():
    assert len({key for _, key, _, _ in ACTIONS}) == len(ACTIONS)
    for _, key, word, _ in ACTIONS:
        assert word.startswith(key)
