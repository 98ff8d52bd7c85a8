from normweave.serve.pages.review import ACTIONS, QUEUE
from normweave.serve.records import Filter


def test_the_queue_has_defective_unknown_unreadable_and_borderline_parts():
    assert (
        Filter(verdicts=("anomalous", "unknown"), reviewed=False),
        Filter(unreadable=True, reviewed=False),
        Filter(verdicts=("normal",), reviewed=False, p_value_within=2.0),
    ) == QUEUE


def test_every_action_has_its_own_key_which_begins_its_word():
    assert len({key for _, key, _, _ in ACTIONS}) == len(ACTIONS)
    for _, key, word, _ in ACTIONS:
        assert word.startswith(key)
