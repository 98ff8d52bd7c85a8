"""Answers of the REST interface about models."""

from normweave.serve.model_schemas import reviewed, summed
from normweave.serve.model_store import Pair


def test_counts_over_all_decisions_and_who_was_right():
    pairs = [
        Pair("cloth", "a", "normal", "anomalous", None, 5),
        Pair("cloth", "a", "normal", "anomalous", "accept", 3),  # the active one is right
        Pair("cloth", "a", "normal", "unknown", "reject", 2),  # the candidate is right
        Pair("cloth", "a", "normal", None, "accept", 1),  # the candidate could not score it
        Pair("cloth", "b", "anomalous", "anomalous", "reject", 4),  # both
    ]
    counts = {(one.subclass, one.active, one.candidate): one.n for one in summed(pairs)}
    assert counts == {
        ("a", "normal", "anomalous"): 8,
        ("a", "normal", "unknown"): 2,
        ("a", "normal", None): 1,
        ("b", "anomalous", "anomalous"): 4,
    }
    found = reviewed(pairs)
    assert (found.n, found.active_right, found.candidate_right) == (10, 8, 6)
