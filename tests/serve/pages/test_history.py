import csv
import io
from datetime import UTC, datetime, timedelta

import pytest

from normweave.serve.pages.history import COLUMNS, choices_of, csv_lines, filter_of, products_of, table
from normweave.serve.records import Filter, Inspection, Review
from normweave.serve.store import Store
from normweave.types import Outcome

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def store(tmp_path):
    store = Store.open(f"sqlite:///{tmp_path / 'store.sqlite'}")
    yield store
    store.close()


def inspection(name, *, seconds=0, **fields):
    outcome = Outcome(image_path=name, **({"verdict": "normal", "pred_score": -0.25, "p_value": 0.5} | fields))
    received_at = NOW + timedelta(seconds=seconds)
    return Inspection(received_at=received_at, name=name, source="api", actor="@press", outcome=outcome)


def exported(store, chosen=None):
    return list(csv.DictReader(io.StringIO("".join(csv_lines(store, chosen or Filter()))), strict=True))


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r"])
def test_no_text_is_a_formula_and_numbers_stay_numbers(store, first):
    name = f"{first}cmd|' /C calc'!A0"
    (stored,) = store.add([inspection(name, category=name, experts=((name, 1.0),))])
    store.review(stored.id, Review(at=NOW, decision="accept", reviewer=name, comment=name))
    (row,) = exported(store)
    for column in ("name", "category", "reviewer", "comment", "experts"):
        assert row[column].startswith("'" + first), column
    assert row["actor"] == "'@press"
    assert row["pred_score"] == "-0.25"


def test_every_inspection_is_exported_once_oldest_first(store):
    store.add([inspection(f"part-{number}", seconds=number) for number in range(1203)])
    rows = exported(store)
    assert [row["name"] for row in rows] == [f"part-{number}" for number in range(1203)]
    pieces = list(csv_lines(store, Filter()))
    assert len(pieces) > 5  # the table is never in memory as a whole
    assert max(map(len, pieces)) < 100_000


def test_an_empty_export_has_a_header_only(store):
    assert "".join(csv_lines(store, Filter())).strip() == ",".join(COLUMNS)


def test_the_export_has_every_field_of_an_outcome_that_fits_a_cell():
    names = {column.name for column in Outcome.columns()}
    assert names - set(COLUMNS) == {"image_path", "anomaly_map"}


def test_choices_become_a_filter():
    assert filter_of({}) == Filter()
    chosen = filter_of(
        {"product": "cloth\nred", "verdict": "unknown", "source": "folder", "review": "reject", "name": "a"}
    )
    assert chosen == Filter(
        category="cloth", subclass="red", verdicts=("unknown",), source="folder", decision="reject", name_contains="a"
    )
    assert filter_of({"verdict": "unreadable", "review": "none", "product": "cloth"}) == Filter(
        unreadable=True, reviewed=False, category="cloth"
    )
    assert filter_of({"review": "any"}).reviewed is True
    since = filter_of({"days": "7"}).since
    assert since is not None
    assert abs(datetime.now(UTC) - timedelta(days=7) - since) < timedelta(minutes=1)


@pytest.mark.parametrize("given", [{"days": "8"}, {"verdict": "good"}, {"source": "x"}, {"review": "maybe"}])
def test_a_value_that_cannot_be_chosen_is_refused(given):
    (name,) = given
    with pytest.raises(
        ValueError, match=f"{name} must be one of '.*', got '{given[name]}'. Choose on the History page"
    ):
        filter_of(given)


def test_the_products_of_all_bundles_can_be_chosen():
    known = [{"cloth": ["a"], "tile": []}, {"cloth": ["a", "b"]}]
    assert products_of(known) == {
        "": "all products",
        "cloth": "cloth",
        "cloth\na": "cloth/a",
        "tile": "tile",
        "cloth\nb": "cloth/b",
    }


def test_the_address_gives_the_choices_and_wrong_values_are_ignored():
    assert choices_of({})["days"] == "7"
    assert choices_of({"days": ""})["days"] == ""  # everything
    chosen = choices_of({"days": "8", "verdict": "unknown", "source": "x", "name": "<b>", "id": "3"})
    assert filter_of(chosen | {"days": ""}) == Filter(verdicts=("unknown",), name_contains="<b>")
    assert chosen["days"] == "7"


def test_the_table_escapes_names_and_shows_missing_numbers_as_dashes():
    text = table([inspection("<b>"), inspection("cut", verdict=None, pred_score=None, p_value=None, error="cut")])
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert text.count("–") == 4  # product of both; score and p-value of the second
    assert "No inspections found." in table([])


def test_an_inspection_without_a_name_can_be_opened():
    assert '">no name<small>' in table([inspection("")])
