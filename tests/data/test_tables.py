"""Tables as spreadsheets save them are read, or refused with the cure."""

import pytest

from normweave.data.tables import encoding_of, read_csv
from normweave.errors import DataError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_rows_have_the_numbers_of_a_spreadsheet(tmp_path, encoding):
    path = tmp_path / "t.csv"
    path.write_text('name,group\nK\u00f6per,1\n\n"a, b"\n', encoding)
    assert read_csv(path) == (
        ["name", "group"],
        [(2, {"name": "K\u00f6per", "group": "1"}), (4, {"name": "a, b", "group": None})],
    )
    assert encoding_of(path) == ("utf-16" if encoding == "utf-16" else "utf-8-sig")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"name;group\na;1\n", r"columns are name;group\. It needs name, group, separated by commas"),
        (b"name\na\n", r"columns are name\. It needs name, group"),
        (b"", r"columns are \(none\)\. It needs name, group"),
        (b"name,group,name\na,1,b\n", "column 'name' is given more than once. Keep one of them"),
        (b"name,group\na,1,b\n", "row 2: more values than the header has columns"),
        (b"\xe9,group\n", "cannot be read as CSV .* Save it as UTF-8, separated by commas"),
        (b"\xff\xfea", "cannot be read as CSV .* Save it as UTF-8, separated by commas"),
        (b'name,group\n"a,1\n', "cannot be read as CSV"),
    ],
)
def test_other_tables_are_refused(tmp_path, content, text):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=text):
        read_csv(tmp_path / "t.csv", required=("name", "group"))


def test_a_table_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read as CSV"):
        read_csv(tmp_path / "t.csv")
