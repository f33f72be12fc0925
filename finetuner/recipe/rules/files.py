"""Rules about names that mean this disk: there must be something of that name."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetuner.recipe.problems import KeyPath
from finetuner.recipe.rules.base import Finding

# A data file's name ends with one of these. Files of text may be packed.
TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
PACKING_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
DATA_SUFFIXES = (
    *TEXT_SUFFIXES,
    ".parquet",
    ".arrow",
    *(text + packing for text in TEXT_SUFFIXES for packing in PACKING_SUFFIXES),
    ".zip",
)


def data_suffix(name: str) -> str:
    """Return what a file's name ends with, without its packing: ".jsonl" of rows.jsonl.gz, "" of rows.zip."""
    plain = name.lower()
    for packing in PACKING_SUFFIXES:
        plain = plain.removesuffix(packing)
    return Path(plain).suffix


def looks_local(path: str) -> bool:
    """Whether `path` means a place on this disk rather than a hub id (`name` or `owner/name`)."""
    if "://" in path:
        return False
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1 or path.endswith(DATA_SUFFIXES)


def file_findings(raw: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield every name that means this disk where nothing of that name is.

    Takes the values as they were written, so that a mistake in another key does not hide that the name is wrong too.
    """
    yield from _models_are_folders(raw)
    yield from _tokenizer_files_exist(raw)
    yield from _data_files_exist(raw)
    yield from _output_is_another_folder(raw)
    yield from _checkpoint_is_a_folder(raw)


def _models_are_folders(raw: Mapping[str, Any]) -> Iterator[Finding]:
    for key in ("base_model", "tokenizer"):
        name = raw.get(key)
        if isinstance(name, str) and name and looks_local(name) and not _on_disk(name, Path.is_dir):
            message = f"there is no model folder '{name}' (seen from {Path.cwd()}). Give a folder or a hub id."
            yield Finding((key,), message)


def _tokenizer_files_exist(raw: Mapping[str, Any]) -> Iterator[Finding]:
    training = raw["tokenizer"].get("train") if isinstance(raw.get("tokenizer"), dict) else None
    files = training.get("files") if isinstance(training, dict) else None
    for i, name in enumerate(files if isinstance(files, list) else ()):
        yield from _file_exists(name, ("tokenizer", "train", "files", i))


def _data_files_exist(raw: Mapping[str, Any]) -> Iterator[Finding]:
    for key in ("datasets", "test_datasets"):
        entries = raw.get(key)
        for i, entry in enumerate(entries if isinstance(entries, list) else ()):
            yield from _file_exists(entry.get("path") if isinstance(entry, dict) else None, (key, i, "path"))


def _file_exists(name: Any, where: KeyPath) -> Iterator[Finding]:
    if isinstance(name, str) and looks_local(name) and not _on_disk(name, Path.exists):
        yield Finding(where, f"there is no file '{name}' (seen from {Path.cwd()}).")


def _output_is_another_folder(raw: Mapping[str, Any]) -> Iterator[Finding]:
    output = raw.get("output_dir")
    for key in ("base_model", "tokenizer"):
        name = raw.get(key)
        if isinstance(output, str) and isinstance(name, str) and _same_folder(output, name):
            message = f"output_dir is the folder of {key}: the run would write over it. Name another."
            yield Finding(("output_dir",), message)


def _checkpoint_is_a_folder(raw: Mapping[str, Any]) -> Iterator[Finding]:
    resume = raw.get("resume_from_checkpoint")
    if isinstance(resume, str) and not _on_disk(resume, Path.is_dir):
        message = f"there is no checkpoint folder '{resume}'. Write true for the newest one in output_dir."
        yield Finding(("resume_from_checkpoint",), message)


def _same_folder(one: str, other: str) -> bool:
    return _on_disk(other, Path.is_dir) and _on_disk(
        one, lambda path: path.resolve() == Path(other).expanduser().resolve()
    )


def _on_disk(name: str, is_there: Callable[[Path], bool]) -> bool:
    try:
        return is_there(Path(name).expanduser())
    except (OSError, RuntimeError):  # a name too long for any file, or the home of an unknown user
        return False
