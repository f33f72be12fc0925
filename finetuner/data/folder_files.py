"""Find the files of a folder by split: as its dataset card says, or by their names as `datasets` does.

Names are taken as they are: a folder or a file may have [ ], * or ? in its name.
"""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from finetuner.errors import DataError
from finetuner.recipe.problems import did_you_mean
from finetuner.recipe.rules import DATA_SUFFIXES
from finetuner.recipe.sections import DatasetEntry

CARD = "README.md"
Splits = dict[str, list[Path]]

_NO_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SHARDED = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATOR = "[-._ 0-9]"
_MAGIC = re.compile(r"[*?\[]")


def card_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the configurations that a dataset's card names; none if the folder has no card, or it names none."""
    card = folder / CARD
    if not card.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        configs = (metadata_load(card) or {}).get("configs") or []
        return {str(config["config_name"]): dict(config) for config in configs}
    except Exception as error:  # YAML that is none, or of another shape
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"the head of '{card}' cannot be read: {reason}.\nMend its `configs`, or name the files with `data_files`."
        ) from None


def files_of_card(entry: DatasetEntry, folder: Path, configs: dict[str, dict[str, Any]]) -> Splits:
    """Return the files by split of the configuration that the entry names, else of the default one."""
    config = configs[_chosen_config(entry, configs)]
    base = folder / str(config.get("data_dir") or ".")
    named = config.get("data_files")
    if named is None:
        return files_by_name(entry, base, data_files_in(base))
    splits: Splits = {}
    for split, patterns in _patterns_by_split(named):
        splits.setdefault(split, []).extend(path for pattern in patterns for path in matches(base, pattern))
    empty = [split for split, paths in splits.items() if not paths]
    if empty:
        raise DataError(
            f"'{entry.path}': its {CARD} names files of the split '{empty[0]}' that are not there: {named}.\n"
            "Fetch them (git lfs pull), or name those to read with `data_files`."
        )
    return splits


def _chosen_config(entry: DatasetEntry, configs: dict[str, dict[str, Any]]) -> str:
    listed = ", ".join(configs)
    if entry.name is not None:
        if entry.name not in configs:
            hint = did_you_mean(entry.name, tuple(configs))
            raise DataError(f"'{entry.path}' has no configuration '{entry.name}'. Its {CARD} names: {listed}.{hint}")
        return entry.name
    defaults = [name for name, config in configs.items() if config.get("default")]
    for name in [*defaults, "default", *(configs if len(configs) == 1 else ())]:
        if name in configs:
            return name
    raise DataError(
        f"'{entry.path}' has several configurations, and its {CARD} makes none the default: {listed}.\n"
        f"Choose one: `name: {next(iter(configs))}`."
    )


def _patterns_by_split(named: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield (split, patterns) of a card's `data_files`: a name, names, or names by split."""
    if isinstance(named, dict):
        named = [{"split": split, "path": path} for split, path in named.items()]
    for one in named if isinstance(named, list) else [named]:
        split, path = (one["split"], one["path"]) if isinstance(one, dict) else ("train", one)
        yield str(split), [str(item) for item in (path if isinstance(path, list) else [path])]


def matches(folder: Path, pattern: str) -> list[Path]:
    """Return the sorted files of a name or a pattern, seen from the folder."""
    if (folder / pattern).is_file():
        return [folder / pattern]
    if not _MAGIC.search(pattern):
        return data_files_in(folder / pattern) if (folder / pattern).is_dir() else []
    if Path(pattern).is_absolute():
        root = Path(Path(pattern).anchor)
        return matches(root, str(Path(pattern).relative_to(root)))
    pattern = re.sub(r"\*\*$", "**/*", str(PurePosixPath(pattern)))
    asked_hidden = pattern.startswith(".") or "/." in pattern
    found = {path for path in folder.glob(pattern) if path.is_file() and path.name != CARD}
    return sorted(path for path in found if asked_hidden or not _is_hidden(path.relative_to(folder)))


def data_files_in(folder: Path) -> list[Path]:
    """Return the sorted files of a folder, at any depth, whose names end as those of data files do."""
    return [path for path in all_files_in(folder) if path.name.lower().endswith(DATA_SUFFIXES)]


def all_files_in(folder: Path) -> list[Path]:
    """Return the sorted files of a folder, at any depth, without hidden ones and those that describe a dataset."""
    found = [path for path in folder.rglob("*") if path.name not in _NO_ROWS and path.is_file()]
    shown = [path for path in found if path.name != CARD and not _is_hidden(path.relative_to(folder))]
    return sorted(shown, key=lambda path: path.relative_to(folder).as_posix())


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts) or any(
        part.startswith("__") for part in relative.parent.parts
    )


def files_by_name(entry: DatasetEntry, folder: Path, files: Sequence[Path]) -> Splits:
    """Return the files by the split that their names, or those of their folders, tell; else all as "train".

    Raises DataError if some have a split and others none: those would not be read.
    """
    names = {path: path.relative_to(folder).as_posix() for path in files}
    splits = _sharded(names) or _by_keyword(names, in_folder=True) or _by_keyword(names, in_folder=False)
    if not splits:
        return {"train": list(files)} if files else {}
    taken = {path for paths in splits.values() for path in paths}
    left = [name for path, name in names.items() if path not in taken]
    if left:
        read = [names[path] for path in next(iter(splits.values()))]
        raise DataError(
            f"'{entry.path}' has files whose names tell their split ({', '.join(read[:3])}), and others that would not "
            f"be read: {', '.join(left[:5])}{', ...' * (len(left) > 5)}.\n"
            f"Name those to read: `data_files: [{', '.join(repr(name) for name in [*read[:1], *left[:1]])}]`."
        )
    return splits


def _sharded(names: dict[Path, str]) -> Splits:
    """Files that are named data/train-00000-of-00001.parquet, by split."""
    found: Splits = {}
    for path, name in names.items():
        if match := _SHARDED.fullmatch(name):
            found.setdefault(match[1], []).append(path)
    return found


def _by_keyword(names: dict[Path, str], *, in_folder: bool) -> Splits:
    found: Splits = {}
    for split, keywords in _KEYWORDS.items():
        for path, name in names.items():
            *parents, last = name.split("/")
            if any(_has_keyword(part, keywords, is_folder=in_folder) for part in (parents if in_folder else [last])):
                found.setdefault(split, []).append(path)
    return found


def _has_keyword(name: str, keywords: tuple[str, ...], *, is_folder: bool) -> bool:
    for word in keywords:
        patterns = [f"{word}{_SEPARATOR}*", f"*{_SEPARATOR}{word}{_SEPARATOR}*"]
        if is_folder:
            patterns += [word, f"*{_SEPARATOR}{word}"]
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return True
    return False
