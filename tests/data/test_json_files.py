"""Rows never vanish from a file: every value in it is read or refused, whoever reads it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetuner.data.json_values import MessageLists
from finetuner.data.raw_records import READ_BYTES
from finetuner.data.row_files import RowFile, local_file
from finetuner.data.sources import SourceRow, load_source
from finetuner.data.streaming_source import DEFAULT_RETRY, START, StreamingSource
from finetuner.errors import DataError, RowFileError
from finetuner.recipe.sections import DatasetEntry

BOM = "\ufeff"


def entry_of(path: object, **keys: Any) -> DatasetEntry:
    return DatasetEntry.model_validate({"path": str(path), "type": "completion", "field": "id"} | keys)


def loaded(entry: DatasetEntry, folder: Path) -> list[Any]:
    source = load_source(entry, folder)
    rows = [placed.row for batch in source.batches(3) for placed in batch]
    assert len(rows) == len(source)
    return rows


def streamed(entry: DatasetEntry, folder: Path, count: int, start: int = 0) -> list[Any]:
    """The rows of one pass from row `start` on, of `count` in all."""
    stream = StreamingSource(entry, [0, 0, start] if start else START, folder, DEFAULT_RETRY)
    rows: list[SourceRow] = []
    while len(rows) < count - start:
        rows += [row for row, _ in stream.take(16)]
    assert [row.number for row in rows][: count - start] == list(range(start, count))
    return [row.row for row in rows][: count - start]


def seen(rows: list[Any]) -> list[Any]:
    return [str(row) if isinstance(row, DataError) else row for row in rows]


def read_everywhere(path: Path, **keys: Any) -> list[Any]:
    """The rows of a file by every reader, which must agree: loaded, counted, streamed from any row, at an address."""
    rows = seen(loaded(entry_of(path, **keys), path.parent / "f"))
    name = f"memory://json-files/{path.name}"
    with fsspec.open(name, "wb") as file:
        file.write(path.read_bytes())
    assert seen(loaded(entry_of(name, **keys), path.parent / "f")) == rows
    for place in (path, name):
        for start in range(0, len(rows), max(1, len(rows) // 3)):
            assert seen(streamed(entry_of(place, **keys), path.parent / "f", len(rows), start)) == rows[start:]
    return rows


def error_everywhere(path: Path, **keys: Any) -> str:
    """The message of the error that every reader raises."""
    messages = []
    for read in (loaded, lambda entry, folder: streamed(entry, folder, 10_000)):
        with pytest.raises(DataError) as caught:
            read(entry_of(path, **keys), path.parent / "f")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert path.name in messages[0]
    return messages[0]


def ids(*numbers: int) -> list[dict[str, str]]:
    return [{"id": f"n{i}"} for i in numbers]


def lines(*numbers: int) -> str:
    return "".join(json.dumps(row) + "\n" for row in ids(*numbers))


def pretty(*numbers: int) -> str:
    return "".join(json.dumps(row, indent=2) + "\n" for row in ids(*numbers))


WAYS_OF_SIX = {
    "two lists": json.dumps(ids(0, 1, 2), indent=2) + "\n" + json.dumps(ids(3, 4, 5), indent=2),
    "two lists without a line break": json.dumps(ids(0, 1)) + json.dumps(ids(2, 3, 4, 5)),
    "lists one a line": "\n".join(json.dumps(ids(2 * i, 2 * i + 1)) for i in range(3)),
    "lines behind a list": json.dumps(ids(0, 1)) + "\n" + lines(2, 3, 4, 5),
    "a list behind lines": lines(0, 1) + json.dumps(ids(2, 3, 4, 5), indent=1),
    "a list of one line behind lines": lines(0, 1) + json.dumps(ids(2, 3, 4, 5)) + "\n",
    "empty lists between": "[]" + json.dumps(ids(0, 1, 2)) + "\n[\n]\n" + json.dumps(ids(3, 4, 5)) + "[]",
    "objects without line breaks": lines(0, 1, 2, 3, 4, 5).replace("\n", ""),
    "objects and blanks in one line": lines(0, 1, 2, 3, 4, 5).replace("\n", " \t"),
    "objects over several lines": pretty(0, 1, 2, 3, 4, 5),
    "lines, then objects over several": lines(0, 1, 2) + pretty(3, 4, 5),
    "objects over several lines, then lines": pretty(0, 1) + lines(2, 3, 4, 5),
    "a comma behind each line": lines(0, 1, 2, 3, 4, 5).replace("\n", ",\n"),
    "a comma behind each object": pretty(0, 1, 2, 3, 4, 5).replace("}\n", "},\n"),
    "a comma behind the last element": json.dumps(ids(0, 1, 2, 3, 4, 5)).replace("]", ",]"),
    "marks inside lines": BOM + lines(0, 1, 2) + BOM + lines(3, 4) + BOM + lines(5),
    "marks between lists": BOM + json.dumps(ids(0, 1)) + BOM + json.dumps(ids(2, 3)) + "\n" + BOM + lines(4, 5),
    "ends of lines of old Macs": lines(0, 1, 2, 3, 4, 5).replace("\n", "\r"),
    "ends of lines of Windows": lines(0, 1, 2, 3, 4, 5).replace("\n", "\r\n"),
    "a list with ends of lines of old Macs": json.dumps(ids(0, 1, 2, 3, 4, 5), indent=1).replace("\n", "\r"),
    "blank lines": "\n \n" + lines(0, 1) + "\n\n\t\n" + lines(2, 3, 4, 5) + "\n \n",
    "line separators and form feeds in texts": lines(0, 1, 2, 3, 4, 5),
}


@pytest.mark.parametrize("way", WAYS_OF_SIX)
def test_six_rows_are_six_rows_in_whichever_way_they_are_written(tmp_path: Path, way: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(WAYS_OF_SIX[way].encode())
    assert read_everywhere(path) == ids(*range(6))


def test_separators_of_unicode_and_zero_bytes_in_a_text_are_text(tmp_path: Path) -> None:
    texts = ["a\u2028b", "a\x85b", "a\x0cb\x0bc", "a\x00b", "a\u2029\x1c\x1db"]
    rows = [{"id": text} for text in texts]
    path = tmp_path / "rows.jsonl"
    for text in (
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        json.dumps(rows, ensure_ascii=False),
        "\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in rows),
    ):
        path.write_bytes(text.encode())
        assert read_everywhere(path) == rows


# (content, what the error says)
REFUSED = {
    "rows joined in the middle": (lines(0, 1, 2)[:-1] + lines(3, 4), "line 3 holds more than one value"),
    "a comma between rows of a line": (lines(0) + lines(1, 2)[:-1].replace("\n", ",") + "\n", "line 2 holds more than"),
    "a mark between rows of a line": (lines(0) + lines(1)[:-1] + BOM + lines(2), "line 2 holds more than one value"),
    "words behind a list": (
        json.dumps(ids(0, 1)) + "\nthe end",
        "behind the list of row 1, line 2 goes on with 'the end'",
    ),
    "a bracket too many": (json.dumps(ids(0, 1)) + "]", "goes on with ']', which is no row"),
    "zero bytes behind a list": (
        json.dumps(ids(0)) + "\n" + "\0" * 50,
        "line 2 goes on with .*zero bytes: the file was",
    ),
    "a list that is cut off": (
        json.dumps(ids(0, 1))[:-1],
        r"row 1 is broken JSON: .*where the file ends: was it cut off\?",
    ),
    "a list that ends with a comma": (
        json.dumps(ids(0, 1))[:-1] + ", \n",
        r"its list ends without a closing '\]', behind row 1",
    ),
    "a list that is cut off in a row": (
        json.dumps(ids(0, 1), indent=1)[:-9],
        r"row 1 is broken JSON: .*\(line \d, where the file ends",
    ),
    "a broken row behind a list": (json.dumps(ids(0)) + '\n{"id": oh}\n', r"row 1 is broken JSON: .*\(line 2\)"),
    "two commas": (json.dumps(ids(0, 1)).replace(", ", ",,"), "row 1 is broken JSON: expecting value"),
    "no comma": (json.dumps(ids(0, 1)).replace(", ", " "), "row 1 is broken JSON|row 0 is broken JSON"),
    "a number between lists": (json.dumps(ids(0)) + "\n7\n" + json.dumps(ids(1)), "line 2 goes on with '7"),
    "a huge number in a list": ('[{"id": ' + "1" * 5000 + "}]", "row 0 is broken JSON: Exceeds the limit"),
    "Python's quotes": ("{'id': 'n0'}\n" * 3, "double quotes in JSON; this looks like a dict that Python printed"),
    "a page of a server": ("<!DOCTYPE html>\n<html>no</html>", "it is an HTML page"),
    "a pointer of Git LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "plain words": ("one\ntwo\nthree\n", r"row 0: line 1 is broken JSON: .*\nSo are all of the first 3 rows"),
    "texts": ('"one"\n"two"\n', "row 0: line 1 holds str 'one', but must be an object"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_a_file_whose_rows_cannot_be_told_apart_is_one_error_that_names_the_place(tmp_path: Path, way: str) -> None:
    content, expected = REFUSED[way]
    path = tmp_path / "rows.json"
    path.write_bytes(content.encode())
    message = error_everywhere(path)
    assert re.search(f"(?s){expected}", message), message
    assert "on_bad_row" not in message


def test_a_broken_line_is_one_refused_row_and_the_next_line_is_read(tmp_path: Path) -> None:
    broken = [
        '{"id": "see [1] [2] and }{ [", "more',
        '{"id": "n1',
        '{"id":',
        '{"id": [1,',
        '{"id": 1} x',
        "[ERROR] no answer",
        "\0\0\0\0",
        '{"id": ' + "1" * 5000 + "}",
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(0) + "".join(f"{one}\n{lines(i)}" for i, one in enumerate(broken, 1)))
    rows = read_everywhere(path)
    assert rows[0::2] == ids(*range(len(broken) + 1))
    assert all("is broken JSON" in row for row in rows[1::2])
    assert "bytes that are zero: the file was cut off by a crash" in rows[13]
    path.write_text(lines(0) + '{"id": 1,\n' * 3000 + lines(1))
    assert len(loaded(entry_of(path), tmp_path)) == 3002, "as many as one likes"


def test_a_key_that_stands_twice_is_never_silently_the_last(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(0) + '{"id": "n1", "deep": [{"a": 1, "b": 2, "a": 3}]}\n' + lines(2))
    rows = read_everywhere(path)
    assert rows == [ids(0)[0], "line 2 has the key 'a' twice in one object", ids(2)[0]]
    path.write_text('[{"id": "n0"}, {"id": "n1", "id": "n2"}]')
    assert "row 1 has the key 'id' twice in one object" in error_everywhere(path)


def test_a_last_line_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = '{"id": "n1", "more": [1, {"a": "b"}]}'
    for stop in range(1, len(text)):
        path.write_text(lines(0) + text[:stop])
        first, last = loaded(entry_of(path), tmp_path)
        assert first == {"id": "n0"}
        assert isinstance(last, DataError) and not isinstance(last, RowFileError)


# --- lists that are conversations ---

CHAT = {"type": "chat_template", "field": "text"}


def talk(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(json.dumps(talk(i)) for i in range(3)),
        "".join(json.dumps(talk(i)) for i in range(3)),
        "\n".join(json.dumps(talk(i), indent=2) for i in range(3)),
        json.dumps([talk(i) for i in range(3)]),
        json.dumps([talk(0), talk(1)]) + "\n" + json.dumps(talk(2)),
        json.dumps({"messages": talk(0)}) + "\n" + json.dumps(talk(1)) + "\n" + json.dumps({"messages": talk(2)}),
    ],
)
def test_a_list_of_messages_is_one_conversation(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert read_everywhere(path, **CHAT) == [{"messages": talk(i)} for i in range(3)]
    renamed = [{"chat": talk(i)} for i in range(3)]
    if "messages" not in text:
        assert read_everywhere(path, **CHAT, field_messages="chat") == renamed


def test_a_list_of_conversations_is_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": talk(i)} for i in range(4)]
    path.write_text(json.dumps(rows[:2]) + "\n" + json.dumps(rows[2:]))
    assert read_everywhere(path, **CHAT) == rows


def test_an_empty_list_among_conversations_is_a_refused_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(talk(0)), "[]", json.dumps(talk(1))]))
    rows = read_everywhere(path, **CHAT)
    assert (rows[0], rows[2]) == ({"messages": talk(0)}, {"messages": talk(1)})
    assert "holds an empty list" in rows[1]
    path.write_text("[]")
    with pytest.raises(DataError, match="has no rows"):
        loaded(entry_of(path, **CHAT), tmp_path)


def test_other_types_say_what_takes_lists_of_messages(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(talk(i)) for i in range(3)))
    assert "look like messages" in error_everywhere(path, type="alpaca", field="text")
    assert "`type: chat_template`" in error_everywhere(path, type="alpaca", field="text")


# --- tables that are no rows ---

TABLE = {"instruction": ["a", "b"], "output": ["c", "d"]}
NUMBERED = {name: {str(i): cell for i, cell in enumerate(cells)} for name, cells in TABLE.items()}
RECORDS = [{"instruction": "a", "output": "c"}, {"instruction": "b", "output": "d"}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (NUMBERED, "one table, written column by column.*orient='records', lines=True"),
        (TABLE, "one table, written column by column"),
        ({"columns": ["instruction", "output"], "index": [0], "data": [["a", "c"]]}, "orient='split'"),
        ({"0": RECORDS[0], "1": RECORDS[1]}, "under numbers"),
        ({"data": RECORDS}, r"key 'data' holds a list of 2 objects.*jq -c '\.\[\"data\"\]\[\]'"),
        (
            {"version": "1", "train": RECORDS},
            "key 'train' holds a list of 2 objects, with the keys instruction, output",
        ),
        ({"a": RECORDS[0], "b": RECORDS[1]}, r"keys \(a, b\) hold objects"),
        ([["a", "c"], ["b", "d"]], "holds list .*but must be an object"),
    ],
)
def test_a_table_or_a_wrapped_list_is_named_and_not_taken_for_a_row(
    tmp_path: Path, value: Any, expected: str, indent: int | None
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(value, indent=indent))
    message = error_everywhere(path, type="alpaca", field="text")
    assert re.search(f"(?s){expected}", message), message
    assert "on_bad_row" not in message


def test_one_row_of_lists_is_a_row_where_lists_are_expected(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"messages": talk(0)}
    path.write_text(json.dumps(row))
    assert read_everywhere(path, **CHAT) == [row]
    row = {"segments": [{"text": "a", "label": True}]}
    path.write_text(json.dumps(row))
    assert read_everywhere(path, type="input_output", field="text") == [row]
    path.write_text(json.dumps({"messages": [talk(0), talk(1)]}))
    assert "one table, written column by column" in error_everywhere(path, **CHAT)


# --- any values in any layout ---

WORDS = st.text(st.sampled_from('ab{}[]",:\\\n\r\ufeff é🦊0'), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.fixed_dictionaries({"id": st.just("x"), "more": VALUES}), max_size=4)
BETWEEN = st.sampled_from(["", "\n", "\r\n", "\n\n", " ", BOM, "\n" + BOM, "\n \n" + BOM])


def _one_list(rows: list[Any]) -> str:
    return json.dumps(rows)


def _wide_list(rows: list[Any]) -> str:
    return json.dumps(rows, indent=1, ensure_ascii=False)


def _list_with_comma(rows: list[Any]) -> str:
    return json.dumps(rows)[:-1] + (",]" if rows else "]")


def _some_lines(rows: list[Any]) -> str:
    return "\n".join(map(json.dumps, rows))


def _lines_with_commas(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + ",\n" for row in rows)


def _wide_objects(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row, indent=2) for row in rows)


def _joined_objects(rows: list[Any]) -> str:
    return "".join(map(json.dumps, rows))


LAYOUTS = st.sampled_from(
    [_one_list, _wide_list, _list_with_comma, _some_lines, _lines_with_commas, _wide_objects, _joined_objects]
)
Piece = tuple[list[Any], Callable[[list[Any]], str], str]


@settings(deadline=None, max_examples=200, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(ROWS, LAYOUTS, BETWEEN), max_size=5), st.booleans())
@example([([{"id": "x", "more": 1}], _some_lines, ""), ([{"id": "x", "more": 2}], _one_list, "")], False)
def test_rows_read_and_refused_are_the_rows_there_or_it_is_one_error(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[Piece], as_chat: bool
) -> None:
    expected = [row for rows, _, _ in pieces for row in rows]
    data = "".join(layout(rows) + between for rows, layout, between in pieces).encode()
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    messages = MessageLists("messages", frozenset({"role"})) if as_chat else None
    file = local_file(path, "json", messages)
    try:
        rows = [file.parse(record) for record in file.records() if record.value != []]
    except RowFileError as error:
        assert "more than one value" in str(error), "rows joined in one line among lines, which is said"
        return
    assert rows == expected


@settings(deadline=None, max_examples=100, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(ROWS, LAYOUTS, BETWEEN), min_size=1, max_size=3), st.data())
def test_a_file_that_lost_bytes_never_gives_fewer_rows_without_a_word(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[Piece], data: st.DataObject
) -> None:
    """Whichever byte is cut out, each row that is missing stands beside one that is refused, or it is an error."""
    expected = [row for rows, _, _ in pieces for row in rows]
    text = "".join(layout(rows) + between for rows, layout, between in pieces).encode()
    if not text:
        return
    at = data.draw(st.integers(0, len(text) - 1))
    path = tmp_path_factory.getbasetemp() / "cut.json"
    path.write_bytes(text[:at] + text[at + 1 :])
    file = local_file(path, "json")
    read, refused = 0, 0
    try:
        for record in file.records():
            try:
                file.parse(record)
                read += 1
            except RowFileError:
                raise
            except DataError:
                refused += 1
    except RowFileError:
        return
    assert read + refused >= len(expected)


@pytest.mark.parametrize("shift", range(6))
def test_values_are_the_same_wherever_the_reading_is_cut_into_pieces(tmp_path: Path, shift: int) -> None:
    big = [
        {"id": "x" * size, "n": [size, 1.5, None, {"a": '[{"]}'}]} for size in (1, READ_BYTES - 40, 7, 2 * READ_BYTES)
    ]
    path = tmp_path / "a.json"
    text = json.dumps(big, ensure_ascii=False) + " " * shift + json.dumps(big) + "é"[:0] + json.dumps(big[0], indent=1)
    path.write_text(" " * shift + text)
    file = local_file(path, "json")
    assert [file.parse(record) for record in file.records()] == [*big, *big, big[0]]
    assert isinstance(file, RowFile) and file.count() == 9
