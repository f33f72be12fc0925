"""Build a corpus without a download: the source of Python's own standard library, a function a row.

    python examples/stdlib_source.py --out data/stdlib_source

writes `train.jsonl` and `heldout.jsonl`, rows of {"text": source}: each function and method by itself, at the margin,
once. A row is Python by itself, so a model that ends what it writes can be asked whether that is. Which are held out
depends on the module's name alone.
"""

import argparse
import ast
import hashlib
import json
import sysconfig
import textwrap
import warnings
from pathlib import Path

from stdlib_docstrings import functions, library_files

HELD_OUT_SHARE = 0.05


def is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < HELD_OUT_SHARE * 16**8


def sources(path: Path) -> list[str]:
    """The functions of a module as they stand there, with decorators; [] for a file that is no module."""
    found = []
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):
        return []
    lines = text.splitlines(keepends=True)
    for function in functions(tree):
        first = min(node.lineno for node in (function, *function.decorator_list))
        source = textwrap.dedent("".join(lines[first - 1 : function.end_lineno])).rstrip() + "\n"
        try:
            ast.parse(source)
        except SyntaxError:  # a text in it goes on at the margin
            continue
        found.append(source)
    return found


def write_corpus(root: Path, out: Path) -> tuple[int, int]:
    """(functions to train on, functions held out)."""
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[bool, list[str]] = {False: [], True: []}
    seen: set[str] = set()
    for path in library_files(root):
        for source in sources(path):
            if source not in seen:
                seen.add(source)
                rows[is_held_out(str(path.relative_to(root)))].append(json.dumps({"text": source}))
    for held_out, file in ((False, "train.jsonl"), (True, "heldout.jsonl")):
        (out / file).write_text("\n".join(rows[held_out]) + "\n", encoding="utf-8")
    return len(rows[False]), len(rows[True])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the standard library's functions as rows of text.")
    parser.add_argument("--out", type=Path, default=Path("data/stdlib_source"))
    folder = parser.parse_args().out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in old modules
        trained, held_out = write_corpus(Path(sysconfig.get_paths()["stdlib"]), folder)
    print(f"{trained} functions to train on, {held_out} held out: {folder}")
