"""The process of a candidate."""

import os
import sys
from pathlib import Path

import pytest

from normweave.detector import Detector
from normweave.serve import candidate
from normweave.serve.candidate import CandidateError, CandidateProcess, judge


@pytest.fixture
def process(bundle):
    process = CandidateProcess(bundle, device="cpu")
    yield process
    process.close()


def test_it_computes_what_the_service_computes(loaded, photos):
    for path in photos[:6]:
        expected = loaded.score(path)
        header, grids = judge(loaded, Path(path).read_bytes())
        outcome = header["outcome"]
        assert (outcome["verdict"], outcome["threshold"]) == (expected.verdict, expected.threshold)
        assert outcome["pred_score"] == pytest.approx(expected.pred_score, rel=1e-5)
        assert len(outcome["boxes"]) == len(expected.boxes)
        assert grids.startswith(b"\x93NUMPY")
    header, grids = judge(loaded, b"no image")
    assert (header["outcome"]["verdict"], header["map_threshold"], grids) == (None, None, b"")
    assert header["outcome"]["error"]


def test_a_process_of_the_lowest_priority_answers_until_it_is_killed(process, bundle, photos):
    process.wait_ready()
    expected = Detector.load(bundle, threads=1).score(photos[0])
    judgement = process.judge(Path(photos[0]).read_bytes())
    assert judgement.outcome["pred_score"] == pytest.approx(expected.pred_score, rel=1e-5)
    assert judgement.seconds > 0
    if sys.platform == "linux":
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == candidate.LOWEST_PRIORITY
    process.kill()
    with pytest.raises(CandidateError, match="ended with exit code -9"):
        process.judge(b"")


def test_a_bundle_that_cannot_be_loaded_has_its_reason(tmp_path):
    process = CandidateProcess(tmp_path / "nowhere", device="cpu")
    with pytest.raises(CandidateError, match="nowhere does not exist"):
        process.wait_ready()
    process.close()


def test_a_process_that_does_not_answer_is_killed(process, monkeypatch):
    monkeypatch.setattr(candidate, "ANSWER_SECONDS", 0.01)
    with pytest.raises(CandidateError, match=r"gave no answer for 0\.01 s"):
        process.wait_ready()
