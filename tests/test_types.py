"""The fields of an outcome are listed once: CSV, Parquet, REST and database columns derive from the class."""

import csv
import json
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

import pyarrow.parquet
import pytest

from normweave.outcome.table import write_csv, write_parquet
from normweave.serve.schemas import outcome_model
from normweave.serve.tables import outcome_columns
from normweave.types import DefectBox, ExpertWeight, Outcome


class Tag(NamedTuple):
    """A tag of the example."""

    name: str
    share: float


@dataclass(frozen=True, kw_only=True)
class FurtherOutcome(Outcome):
    """An outcome with further fields."""

    part_id: str | None = field(default=None, metadata={"max_length": 64})
    shift: Literal["early", "late"] | None = None
    tags: tuple[Tag, ...] = ()


OUTCOME = FurtherOutcome(image_path="part.png", part_id="A7", shift="late", tags=(Tag("oil", 0.5),))


def test_as_dict_has_all_fields_in_order():
    outcome = Outcome(
        image_path="part.png",
        experts=(ExpertWeight("cloth", 1.0),),
        boxes=(DefectBox(1, 2, 3, 4, 0.5, "good/1.png", 5, 6, 3, 4), DefectBox(1, 2, 3, 4, 0.25)),
    )
    values = outcome.as_dict()
    assert list(values) == [one.name for one in fields(Outcome)]
    assert values["experts"] == [{"name": "cloth", "weight": 1.0}]
    box = {"x": 1, "y": 2, "width": 3, "height": 4}
    reference = {"reference": "good/1.png", "reference_x": 5, "reference_y": 6, "reference_width": 3}
    assert values["boxes"] == [
        box | {"peak": 0.5} | reference | {"reference_height": 4},
        box | {"peak": 0.25} | dict.fromkeys(reference) | {"reference_height": None},
    ]
    assert values["anomaly_map"] is None
    assert json.loads(json.dumps(values)) == values


def test_as_dict_has_a_further_field():
    values = OUTCOME.as_dict()
    assert (values["part_id"], values["tags"]) == ("A7", [{"name": "oil", "share": 0.5}])


def test_csv_has_a_column_for_a_further_field(tmp_path):
    path = tmp_path / "results.csv"
    write_csv(iter([OUTCOME.as_dict()]), path, FurtherOutcome.columns())
    (row,) = csv.DictReader(path.read_text("utf-8").splitlines())
    assert (row["part_id"], json.loads(row["tags"])) == ("A7", [{"name": "oil", "share": 0.5}])


def test_parquet_has_a_column_for_a_further_field(tmp_path):
    path = tmp_path / "results.parquet"
    write_parquet(iter([OUTCOME.as_dict()]), path, FurtherOutcome.columns())
    table = pyarrow.parquet.read_table(path)
    assert table.to_pylist() == [OUTCOME.as_dict()]
    assert str(table.schema.field("tags").type) == "list<element: struct<name: string, share: double>>"


def test_the_schema_has_a_property_for_a_further_field():
    schema = outcome_model(FurtherOutcome).model_json_schema()
    assert schema["properties"]["part_id"]["anyOf"] == [{"type": "string"}, {"type": "null"}]
    assert schema["properties"]["shift"]["anyOf"][0]["enum"] == ["early", "late"]
    assert schema["$defs"]["Tag"]["properties"].keys() == {"name", "share"}


@pytest.mark.parametrize(
    ("name", "sql", "nullable"),
    [
        ("part_id", "VARCHAR(64)", True),
        ("shift", "VARCHAR(255)", True),
        ("tags", "TEXT", False),
        ("error", "VARCHAR(4000)", True),
        ("unseen", "BOOLEAN", False),
    ],
)
def test_the_table_has_a_column_for_a_further_field(name, sql, nullable):
    (column,) = [column for column in outcome_columns(FurtherOutcome) if column.name == name]
    assert (str(column.type), column.nullable) == (sql, nullable)


def test_an_array_is_in_neither_the_schema_nor_the_table():
    assert "anomaly_map" not in outcome_model(Outcome).model_fields
    assert "anomaly_map" not in {column.name for column in outcome_columns(Outcome)}
