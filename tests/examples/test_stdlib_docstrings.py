"""The example dataset: the same bytes each time, and no held-out row that training could have remembered."""

import ast
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "stdlib_docstrings.py"
SPLITS = ("train.jsonl", "heldout.jsonl")


def build(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """(source, answer) of each row; fails on a row of any other shape."""
    pairs = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert set(row) == {"messages"}
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        source = re.fullmatch(r"[^\n]+\n\n```python\n(.+)\n```", user["content"], re.DOTALL)
        assert source, user["content"]
        pairs.append((source[1], assistant["content"]))
    return pairs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stdlib") / "not" / "there yet"
    result = build(folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def splits(dataset: Path) -> dict[str, list[tuple[str, str]]]:
    return {split: read_pairs(dataset / split) for split in SPLITS}


def test_second_run_writes_the_same_bytes_and_leaves_nothing_else(dataset: Path, tmp_path: Path) -> None:
    assert build(tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(SPLITS)
    for split in SPLITS:
        assert (tmp_path / split).read_bytes() == (dataset / split).read_bytes()


def test_heldout_rows_do_not_depend_on_the_number_of_training_rows(dataset: Path, tmp_path: Path) -> None:
    assert build(tmp_path, "--rows", "7").returncode == 0
    assert len(read_pairs(tmp_path / "train.jsonl")) == 7
    assert (tmp_path / "heldout.jsonl").read_bytes() == (dataset / "heldout.jsonl").read_bytes()


def test_no_name_source_or_answer_appears_twice(splits: dict[str, list[tuple[str, str]]]) -> None:
    pairs = [pair for rows in splits.values() for pair in rows]
    names = [re.search(r"^\s*(?:async )?def (\w+)", source, re.MULTILINE)[1] for source, _ in pairs]  # type: ignore[index]
    sources = ["".join(source.split()) for source, _ in pairs]
    answers = [answer.casefold() for _, answer in pairs]
    for values in (names, sources, answers):
        assert len(set(values)) == len(pairs)


def test_sizes_are_those_of_a_small_experiment(splits: dict[str, list[tuple[str, str]]]) -> None:
    assert 48 <= len(splits["heldout.jsonl"]) <= 128
    assert 800 <= len(splits["train.jsonl"]) <= 1200


@pytest.mark.parametrize("split", SPLITS)
def test_sources_are_short_functions_without_docstring(split: str, splits: dict[str, list[tuple[str, str]]]) -> None:
    for source, answer in splits[split]:
        assert 60 <= len(source) <= 500
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
        assert answer.rstrip(".") not in source


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_one_plain_sentence(split: str, splits: dict[str, list[tuple[str, str]]]) -> None:
    for _, answer in splits[split]:
        assert 15 <= len(answer) <= 100
        assert re.fullmatch(r"[A-Z][a-z]+ [\x20-\x7e]+\.", answer), answer
        assert ">>>" not in answer and "->" not in answer


def test_row_count_below_one_is_refused(tmp_path: Path) -> None:
    result = build(tmp_path, "--rows", "0")
    assert result.returncode == 2
    assert "write 1 or more" in result.stderr


def test_a_row_of_the_corpus_is_a_function_that_is_python_by_itself_and_comes_once(tmp_path: Path) -> None:
    script = SCRIPT.with_name("stdlib_source.py")
    for folder in ("one", "two"):
        subprocess.run([sys.executable, str(script), "--out", str(tmp_path / folder)], check=True, capture_output=True)
    texts = []
    for split in SPLITS:
        assert (tmp_path / "one" / split).read_bytes() == (tmp_path / "two" / split).read_bytes()
        lines = (tmp_path / "one" / split).read_text(encoding="utf-8").splitlines()
        texts += [json.loads(line)["text"] for line in lines]
        assert len(lines) > (5000 if split == "train.jsonl" else 100)
    assert len(set(texts)) == len(texts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in old modules
        for text in texts:
            (function,) = ast.parse(text).body
            assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
