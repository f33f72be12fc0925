"""Build a real dataset without a download: write a function's docstring, learned from Python's own standard library.

    python examples/stdlib_docstrings.py --out data/stdlib_docstrings

writes `train.jsonl` and `heldout.jsonl`. A row is a conversation of two turns: a short function without its docstring,
and the docstring's first sentence. No two rows share the function's name, its source or the answer, so a model cannot
do well on the held-out rows by remembering. The same Python gives the same bytes.
"""

import argparse
import ast
import hashlib
import json
import re
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = "Write the one-sentence docstring of this Python function."
NUM_HELDOUT_ROWS = 80
SOURCE_CHARS = range(60, 501)
ANSWER_CHARS = range(15, 101)

# Tests, what is installed on top, tools that left or will leave the library, and menus whose docstrings say little.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "idlelib", "turtledemo"}
)
# A sentence ends at a period before a space, unless the period belongs to one of these.
ABBREVIATION = re.compile(r"(\b(e\.g|eg|i\.e|ie|etc|vs|cf|resp|approx|incl|No|Dr|St)|\b[A-Z])\.$")
# Answers that another function could have as well, or that only make sense beside another docstring.
EMPTY_TALK = re.compile(
    r"internal|helper|private|see|same|just|like|similar|equivalent|alias|overrid|note|not|used|called|deprecated|"
    r"todo|xxx|undocumented|constructor|initiali[sz]er?\b|implement|subclass|default|test|usage|example|warning|error|"
    r"hook|debug|convenience|unrelated|fast|notification|method|function|return (self|none|repr|str)\b|"
    r"(the|an?|any|if|when|two|this|for|given|don't)\b",
    re.IGNORECASE,
)
# Prompts of the interpreter, arrows, roles and fields of reStructuredText, code: not plain English.
NOT_PROSE = re.compile(r">>>|->|=>|==|:\w+:|\.\.|[{}<>|\\*=@~^#]|\w\(.*,.*\)|[^\x20-\x7e]")

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Example(NamedTuple):
    """A function's name, its source without the docstring, and the sentence to answer with."""

    name: str
    source: str
    answer: str


def library_files(root: Path) -> Iterator[Path]:
    """The library's modules in an order that does not depend on the file system."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            yield path


def functions(tree: ast.Module | ast.ClassDef) -> Iterator[Function]:
    """Functions of the module and methods of its classes, but not functions inside functions."""
    for node in tree.body:
        if isinstance(node, Function):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node)


def source_without_docstring(function: Function, lines: list[str]) -> str | None:
    """The function's source, dedented; None if it does nothing else or the docstring cannot be cut out cleanly."""
    docstring, *rest = function.body
    if all(map(_does_nothing, rest)) or docstring.lineno == function.lineno or rest[0].lineno == docstring.end_lineno:
        return None
    head_start = min(node.lineno for node in (function, *function.decorator_list)) - 1
    head = "\n".join(lines[head_start : docstring.lineno - 1]).rstrip()
    body = "\n".join(lines[docstring.end_lineno : function.end_lineno]).rstrip().lstrip("\n")
    source = textwrap.dedent(f"{head}\n{body}")
    try:
        (parsed,) = ast.parse(source).body
    except (SyntaxError, ValueError):  # dedent does not know multi-line strings
        return None
    same = isinstance(parsed, Function) and len(parsed.body) == len(rest)
    return source if same else None


def _does_nothing(node: ast.stmt) -> bool:
    """Whether a body of such statements leaves the sentence to guesswork: pass, raise, a bare `...` or string."""
    return isinstance(node, ast.Pass | ast.Raise) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph on one line, ending with a period."""
    words = docstring.strip().split("\n\n")[0].split()
    for end, word in enumerate(words):
        if word.endswith(".") and not ABBREVIATION.search(word):
            return " ".join(words[: end + 1])
    return " ".join(words) + "."


def is_good_answer(answer: str, name: str) -> bool:
    """Whether `answer` is a plain English sentence that says something about the function called `name`."""
    return (
        len(answer) in ANSWER_CHARS
        and answer.count(" ") >= 2
        and re.match("[A-Z][a-z]+ ", answer) is not None
        and not answer.startswith((f"{name}(", f"{name} ", f"{name}:"))
        and (answer[-2].isalnum() or answer[-2] in "'\"`)")
        and not EMPTY_TALK.match(answer)
        and not NOT_PROSE.search(answer)
        and answer.count("(") == answer.count(")")
        and all(answer.count(quote) % 2 == 0 for quote in '"`')
    )


def examples_in(path: Path) -> Iterator[Example]:
    """The usable functions in `path`; none if this Python cannot decode or parse the file."""
    try:
        with tokenize.open(path) as stream:  # heeds the file's coding line
            text = stream.read()
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    lines = text.split("\n")  # as ast counts them; splitlines() would also split at form feeds
    for function in functions(tree):
        docstring = ast.get_docstring(function)
        if not docstring:
            continue
        answer = first_sentence(docstring)
        source = source_without_docstring(function, lines)
        if source is None or len(source) not in SOURCE_CHARS or answer[:-1] in source:
            continue
        if is_good_answer(answer, function.name):
            yield Example(function.name, source, answer)


def unique_by_hash(examples: Iterable[Example]) -> list[Example]:
    """Sort by content hash, then keep the first of each name, source and answer, layout, case and punctuation aside."""
    seen: set[str] = set()
    kept = []
    for example in sorted(examples, key=lambda example: hashlib.sha256("\0".join(example).encode()).digest()):
        name, source, answer = (re.sub(r"[\W_]", "", text).casefold() for text in example)
        keys = {f"name {name}", f"source {source}", f"answer {answer}"}
        if seen.isdisjoint(keys):
            kept.append(example)
            seen |= keys
    return kept


def as_row(example: Example) -> dict[str, list[dict[str, str]]]:
    question = f"{INSTRUCTION}\n\n```python\n{example.source}\n```"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": example.answer}]}


def write_rows(path: Path, examples: list[Example]) -> None:
    """Write aside and rename, so that `path` never holds half of the rows."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(as_row(example), ensure_ascii=False) + "\n" for example in examples)
    aside.replace(path)


def row_count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is not a number of rows; write 1 or more")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a dataset from the standard library's own functions.")
    parser.add_argument("--out", type=Path, default=Path("data/stdlib_docstrings"), help="folder (%(default)s)")
    parser.add_argument("--rows", type=row_count, default=1200, help="at most so many training rows (%(default)s)")
    arguments = parser.parse_args()

    root = Path(sysconfig.get_path("stdlib"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library's strings are not the user's concern
        examples = unique_by_hash(each for path in library_files(root) for each in examples_in(path))
    if len(examples) <= NUM_HELDOUT_ROWS:
        sys.exit(f"{root} has {len(examples)} usable functions, too few: use a Python whose library is in .py files")

    # Held-out rows first: they stay the same whatever --rows is.
    splits = {"heldout": examples[:NUM_HELDOUT_ROWS], "train": examples[NUM_HELDOUT_ROWS:][: arguments.rows]}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        path = arguments.out / f"{split}.jsonl"
        write_rows(path, rows)
        print(f"{path}: {len(rows)} rows")
    sample = splits["train"][0]
    print(f"\nthe first of {len(examples)} usable functions:\n\n{sample.source}\n\n  -> {sample.answer}")


if __name__ == "__main__":
    main()
