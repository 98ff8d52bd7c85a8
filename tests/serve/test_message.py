"""The message is that of the inspection, and its schema is the documented one."""

import json
import re
from pathlib import Path

from inspections import inspection, unreadable
from normweave.serve.message import MESSAGES, InspectionMessage, slug

SCHEMA = Path(__file__).parents[2] / "docs" / "reference" / "message.schema.json"


def test_a_message_has_the_result():
    made = inspection(id=7, line="Press 5", part_id="p1", view="front")
    read = InspectionMessage.model_validate_json(InspectionMessage.of(made).model_dump_json())
    assert read == InspectionMessage.of(made)
    data = read.data
    assert (read.type, read.timestamp) == ("inspection.stored", made.received_at)
    assert (data.id, data.time, data.line, data.name, data.part_id) == (7, made.received_at, "Press 5", made.name, "p1")
    outcome = made.outcome
    assert data.view == "front"
    assert (data.verdict, data.category, data.subclass) == (outcome.verdict, outcome.category, outcome.subclass)
    assert (data.score, data.threshold, data.p_value) == (outcome.pred_score, outcome.threshold, outcome.p_value)
    assert (data.false_alarm_rate, data.bundle_hash, data.error) == (0.01, outcome.bundle_hash, None)
    assert [(box.x, box.y, box.width, box.height, box.peak) for box in data.boxes] == [
        (box.x, box.y, box.width, box.height, box.peak) for box in outcome.boxes
    ]


def test_an_unreadable_image_has_no_verdict():
    data = InspectionMessage.of(unreadable(id=1)).data
    assert (data.verdict, data.error) == (None, "The file ends in the middle.")


def test_the_id_is_that_of_the_inspection_of_this_server():
    one = InspectionMessage.of(inspection(1, id=7, line="Press 5"))
    assert one.id == InspectionMessage.of(inspection(1, id=7, line="Press 5")).id
    others = [
        inspection(1, id=8, line="Press 5"),
        inspection(1, id=7, line="Press 6"),
        inspection(2, id=7, line="Press 5"),
    ]
    assert one.id not in {InspectionMessage.of(other).id for other in others}
    assert re.fullmatch("[A-Za-z0-9_-]+", one.id)  # a signature has dots between its parts


def test_a_name_becomes_a_level_of_a_topic():
    assert [slug(name) for name in ("Press 5", "", "a/+#b", "Straße")] == ["Press_5", "line", "a_b", "Stra_e"]


def test_the_documented_messages_are_valid_and_complete():
    text = (SCHEMA.parent / "line.md").read_text("utf-8")
    examples = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)
    messages = [MESSAGES.validate_json(example) for example in examples]
    assert [one.type for one in messages] == ["inspection.stored", "part.corrected", "drift.alarm"]
    for message in messages:
        assert message.data.model_fields_set == set(type(message.data).model_fields)


def test_the_documented_schema_is_this_one():
    """Written by: json.dumps(MESSAGES.json_schema(), indent=2)."""
    assert json.loads(SCHEMA.read_text("utf-8")) == MESSAGES.json_schema()
