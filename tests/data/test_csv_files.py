"""Tables of text: whatever separates their cells, no cell is lost, and none is taken for another's."""

import re
from pathlib import Path
from typing import Any

import pytest

from finetuner.data.sources import load_source
from finetuner.errors import DataError
from finetuner.recipe.sections import DatasetEntry

ROWS = [{"instruction": "Say, once", "output": 'a "b"; c'}, {"instruction": "two\nlines", "output": "x\ty"}]


def rows_of(path: Path, **keys: Any) -> list[Any]:
    entry = DatasetEntry.model_validate({"path": str(path), "type": "alpaca"} | keys)
    return [placed.row for batch in load_source(entry, path.parent).batches(7) for placed in batch]


def error_of(path: Path, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(path, **keys)
    assert "on_bad_row" not in str(caught.value)
    return str(caught.value)


def written(rows: list[dict[str, str]], delimiter: str, end: str = "\n") -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if set(text) & set(f'{delimiter}"\n\r') else text

    lines = [list(rows[0]), *(row.values() for row in rows)]
    return "".join(delimiter.join(map(cell, line)) + end for line in lines)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.txt"])
def test_cells_are_separated_by_what_separates_the_names(tmp_path: Path, delimiter: str, end: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + written(ROWS, delimiter, end).encode())
    assert rows_of(path, ds_type="csv") == ROWS


def test_the_first_line_of_excel_names_the_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("sep=;\n" + written(ROWS, ";"))
    assert rows_of(path) == ROWS
    path.write_text("sep=;\ninstruction;output\na\n")
    assert "line 3 has 1 fields" in error_of(path)


def test_a_table_of_one_column_is_one_whatever_is_in_its_cells(tmp_path: Path) -> None:
    for name, text in (("rows.csv", "text\na;b\nc\td\n"), ("rows.tsv", "text\na;b\nc, d\n")):
        (tmp_path / name).write_text(text)
        assert [row["text"] for row in rows_of(tmp_path / name, type="completion")] == text.splitlines()[1:]


def test_a_wrong_delimiter_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('"instruction;output"\n"a;b"\n')
    assert "Its columns are: instruction;output.\nIts first line holds semicolons" in error_of(path)
    path.write_text("instruction:output\na:b\n")
    assert "Its columns are: instruction:output." in error_of(path)


def test_a_name_that_stands_twice_is_an_error_and_never_silently_the_last(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output,output\na,b,c\n")
    assert "names the column 'output' more than once (columns 2, 3)" in error_of(path)


def test_columns_without_a_name_may_be_empty_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",instruction,output\n0,a,b\n")
    assert rows_of(path) == [{"": "0", "instruction": "a", "output": "b"}], "the index of pandas"
    path.write_text("instruction,output,,\na,b,,\nc,d,, \n")
    assert rows_of(path) == [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
    path.write_text("instruction,output,,\na,b,,\nc,d,more,\n")
    assert "text in a column without a name" in str(rows_of(path)[1])


def test_a_second_heading_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"instruction,output\na,b\n\xef\xbb\xbfinstruction,output\nc,d\n")
    rows = rows_of(path)
    assert "line 3 repeats the names of the first line" in str(rows[1])
    assert rows[2] == {"instruction": "c", "output": "d"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('instruction,output\na,"b\nc,d\ne,f\n', "is no CSV: unexpected end of data"),
        ('instruction,output\n"a" b,c\n', "is no CSV: ',' expected after '\"'"),
        ("\n\n", "its first line has no name of a column"),
        ('{"instruction": "a", "output": "b"}\n', "JSON, and no CSV.\nWrite `ds_type: json`"),
        ("instruction,output\na\nb\n", "line 2 has 1 fields.*Quote the texts with commas.\nSo are all of the first 2"),
        ("instruction\toutput\na b\n", "line 2 has 1 fields, and the first line 2 names. Quote the texts with tabs"),
    ],
)
def test_a_file_whose_cells_cannot_be_told_apart_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    assert re.search(f"(?s){expected}", error_of(path))
