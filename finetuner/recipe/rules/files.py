"""Names that mean this disk, and are not there."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetuner.recipe.rules.base import Finding

# What a data file's name ends with; json, csv and text may be packed with gzip besides.
DATA_SUFFIXES = (
    ".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt", ".json.gz", ".jsonl.gz", ".csv.gz", ".txt.gz",
)  # fmt: skip


def looks_local(path: str) -> bool:
    """Whether `path` means a place on this disk rather than a hub id (`name` or `owner/name`)."""
    if "://" in path:
        return False
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1 or path.endswith(DATA_SUFFIXES)


def file_findings(raw: Mapping[str, Any]) -> Iterator[Finding]:
    """Names that mean this disk, and are not there.

    Takes the values as they were written, so that a mistake beside a name does not hide that the name is wrong too.
    """
    for key in ("base_model", "tokenizer"):
        name = raw.get(key)
        if isinstance(name, str) and name and looks_local(name) and not _on_disk(name, Path.is_dir):
            yield Finding(
                (key,), f"there is no model folder '{name}' (seen from {Path.cwd()}). Give a folder or a hub id."
            )
    learns = raw["tokenizer"].get("train") if isinstance(raw.get("tokenizer"), dict) else None
    files = learns.get("files") if isinstance(learns, dict) else None
    for i, name in enumerate(files if isinstance(files, list) else ()):
        if isinstance(name, str) and looks_local(name) and not _on_disk(name, Path.exists):
            yield Finding(("tokenizer", "train", "files", i), f"there is no file '{name}' (seen from {Path.cwd()}).")
    for key in ("datasets", "test_datasets"):
        entries = raw.get(key)
        for i, entry in enumerate(entries if isinstance(entries, list) else ()):
            path = entry.get("path") if isinstance(entry, dict) else None
            if isinstance(path, str) and looks_local(path) and not _on_disk(path, Path.exists):
                yield Finding((key, i, "path"), f"there is no file '{path}' (seen from {Path.cwd()}).")
    output = raw.get("output_dir")
    for key in ("base_model", "tokenizer"):
        name = raw.get(key)
        if isinstance(output, str) and isinstance(name, str) and _same_folder(output, name):
            yield Finding(
                ("output_dir",), f"output_dir is the folder of {key}: the run would write over it. Name another."
            )
    resume = raw.get("resume_from_checkpoint")
    if isinstance(resume, str) and not _on_disk(resume, Path.is_dir):
        yield Finding(
            ("resume_from_checkpoint",),
            f"there is no checkpoint folder '{resume}'. Write true for the newest one in output_dir.",
        )


def _same_folder(one: str, other: str) -> bool:
    return _on_disk(other, Path.is_dir) and _on_disk(
        one, lambda path: path.resolve() == Path(other).expanduser().resolve()
    )


def _on_disk(name: str, is_there: Callable[[Path], bool]) -> bool:
    try:
        return is_there(Path(name).expanduser())
    except (OSError, RuntimeError):  # a name too long for any file, or the home of an unknown user
        return False
