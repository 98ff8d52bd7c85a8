"""Scores do not depend on the number of threads.

Closed-form experts agree to 1e-4 of the range of the scores. Those trained by gradient, where rounding errors grow from
step to step, agree to 1e-2.
"""

import numpy as np
import pytest
import torch

from builders import head_config
from normweave.config import Config, DataConfig, OutcomeConfig, PrepareConfig, TimmConfig
from normweave.detector import Detector

CLOSED_FORM, GRADIENT = 1e-4, 1e-2
QUICK = {"epochs": 3, "batch_images": 4}


@pytest.mark.parametrize(
    ("head", "tolerance"),
    [
        pytest.param(head_config(expert="fusion"), CLOSED_FORM, id="fusion"),
        pytest.param(head_config(expert="subspace"), CLOSED_FORM, id="subspace"),
        pytest.param(head_config(kind="memory_bank"), CLOSED_FORM, id="memory_bank"),
        pytest.param(head_config(expert={"kind": "discriminator", "training": QUICK}), GRADIENT, id="discriminator"),
        pytest.param(head_config(kind="simplenet", training=QUICK), GRADIENT, id="simplenet"),
    ],
)
def test_one_and_two_threads_give_the_same_scores(head, tolerance, cloth, photos):
    config = Config(
        data=DataConfig(subclass_from="column", calibration="split"),
        prepare=PrepareConfig(height=64, width=64),
        features=TimmConfig(weights="random", strides=(8,), batch_images=4),
        head=head,
        outcome=OutcomeConfig(false_alarm_rate=0.1, unknown_rate=0.1),
    )
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        detector = Detector.fit(cloth, config=config, use_cache=False, device="cpu")
        outcomes = detector.score(photos[:8])
        results.append((detector.calibration.scores, [outcome.pred_score for outcome in outcomes]))
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=tolerance * np.ptp(one))
