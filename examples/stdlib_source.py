"""Build a corpus without a download: the source of Python's own standard library, a module a row.

    python examples/stdlib_source.py --out data/stdlib_source

writes `train.jsonl` and `heldout.jsonl`, rows of {"text": source}. Which module is held out depends on its name alone.
"""

import argparse
import hashlib
import json
import sysconfig
from pathlib import Path

# Tests, what is installed on top, and data written as modules.
SKIPPED = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"})
HELD_OUT_SHARE = 0.05


def is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < HELD_OUT_SHARE * 16**8


def write_corpus(root: Path, out: Path) -> tuple[int, int]:
    """(modules to train on, modules held out)."""
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[bool, list[str]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not SKIPPED.isdisjoint(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            rows[is_held_out(str(name))].append(json.dumps({"text": text}))
    for held_out, file in ((False, "train.jsonl"), (True, "heldout.jsonl")):
        (out / file).write_text("\n".join(rows[held_out]) + "\n", encoding="utf-8")
    return len(rows[False]), len(rows[True])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the standard library's source as rows of text.")
    parser.add_argument("--out", type=Path, default=Path("data/stdlib_source"))
    folder = parser.parse_args().out
    trained, held_out = write_corpus(Path(sysconfig.get_paths()["stdlib"]), folder)
    print(f"{trained} modules to train on, {held_out} held out: {folder}")
