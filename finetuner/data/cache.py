"""The cache of prepared rows: documents on disk, in a folder whose name says all that they depend on.

    <dataset_prepared_path>/<key>/      train.* and held_out.* tokens, packs, dropped.jsonl; prepared.json
    <dataset_prepared_path>/<key>.lock  of the process that prepares
    <dataset_prepared_path>/files/      digests of data files, so that an unchanged file is not read again
    <dataset_prepared_path>/fetched/    data files from an address

The folder is complete or absent. One process of each node prepares; the others look for the folder, in no collective
that could time out.
"""

import hashlib
import json
import os
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.data.fetch import fetch, is_address
from finetuner.data.folder_files import CARD
from finetuner.data.packing import Packs
from finetuner.data.prepare import prepare_documents
from finetuner.data.prepared_data import PreparedData, SourceShare, pack_documents, require_few_dropped
from finetuner.data.row_counts import RowCounts
from finetuner.data.source_files import files_on_disk, is_saved_to_disk, split_names
from finetuner.data.sources import TableSource, load_source
from finetuner.data.token_store_writer import map_store, store_facts
from finetuner.errors import DataError
from finetuner.recipe.schema import keys_where
from finetuner.recipe.sections import DataSection, DatasetEntry, PackingSection
from finetuner.storage.atomic import staged_file
from finetuner.storage.build_once import build_once
from finetuner.storage.disk_errors import explain_disk_errors
from finetuner.storage.locks import exclusive_lock
from finetuner.storage.progress import ProgressReport, no_progress
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "prepared.json"
SETTLED_NS = 100_000_000
# Keys that change nothing about the documents, or only whether they are used.
_NO_MATTER = set(keys_where(lambda facts: not facts.prepared_rows))


def prepare_once(
    section: DataSection,
    packing: PackingSection,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    world: World,
    report: ProgressReport = no_progress,
) -> PreparedData:
    """Prepare and cache the documents of the recipe, or map those that an earlier start cached.

    The first rank of each node prepares, and the others wait for its folder. Safe for any number of processes at once.
    Raises DataError if a row is unusable, or the recipe's folder cannot be written to.
    """
    root = Path(section.dataset_prepared_path)
    stamps = _stamps(section)  # before the files are read for the key
    with explain_disk_errors(
        DataError, f"cannot write to '{root}'", "Name a folder that you may write to: dataset_prepared_path=..."
    ):
        (root / "files").mkdir(parents=True, exist_ok=True)
    folder = root / cache_key(section, packing, tokenizer, seed)

    def fill(staging: Path) -> None:
        _write(staging, section, packing, tokenizer, seed, report)
        if _stamps(section) != stamps:  # the folder's name would be that of other bytes than were prepared
            raise DataError("a data file was written to while it was being prepared. Start again when it is complete.")

    with explain_disk_errors(
        DataError,
        f"cannot write the prepared tokens to '{root}'",
        "Make room, or name a folder on another disk: dataset_prepared_path=...",
    ):
        build_once(folder, fill, is_builder=world.local_rank == 0, mark=MARK)
    prepared = read_prepared(folder)
    require_few_dropped(prepared, section)
    return prepared


def prepared_already(
    section: DataSection, packing: PackingSection, tokenizer: "PreTrainedTokenizerBase", seed: int
) -> PreparedData | None:
    """Map the documents that prepare_once cached; None if it has not prepared these."""
    root = Path(section.dataset_prepared_path)
    if not (root / "files").is_dir():
        return None
    folder = root / cache_key(section, packing, tokenizer, seed)
    return read_prepared(folder) if (folder / MARK).exists() else None


def cache_key(section: DataSection, packing: PackingSection, tokenizer: "PreTrainedTokenizerBase", seed: int) -> str:
    """Name of the folder of these documents: equal only if the same documents would be prepared."""
    facts = {
        "data": section.model_dump(mode="json", exclude=_NO_MATTER),
        "packing": [packing.sample_packing, packs_held_out(packing)],
        "seed": seed,
        "tokenizer": tokenizer_facts(tokenizer),
        "sources": [source_facts(entry, section) for entry in (*section.datasets, *section.test_datasets)],
        "code": _code_facts(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def packs_held_out(packing: PackingSection) -> bool:
    """Whether held-out documents share rows: as the recipe says, or as training documents do."""
    chosen = packing.eval_sample_packing
    return packing.sample_packing if chosen is None else chosen


def read_prepared(folder: Path) -> PreparedData:
    """Map a folder that prepare_once wrote."""
    facts = json.loads((folder / MARK).read_text(encoding="utf-8"))
    train, held_out = (map_store(folder, name, facts[name]) for name in ("train", "held_out"))

    def packs(name: str, store: Any) -> Packs | None:
        if name not in facts["packs"]:
            return None
        members, starts = (np.load(folder / f"{name}.{array}.npy", mmap_mode="r") for array in ("members", "starts"))
        capacity, sources = facts["packs"][name]
        return Packs(store, members, starts, capacity, tuple(sources))

    return PreparedData(
        train,
        held_out,
        Counter(facts["counts"]),
        facts["num_rows"],
        tuple(SourceShare(*share) for share in facts["shares"]),
        tuple(map(RowCounts.from_json, facts["row_counts"])),
        packs("train", train),
        packs("held_out", held_out),
        folder / "dropped.jsonl",
    )


def _write(
    folder: Path,
    section: DataSection,
    packing: PackingSection,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    report: ProgressReport,
) -> None:
    """Prepare the documents into `folder`, the mark last."""
    prepared = prepare_documents(section, tokenizer, seed, report, into=folder)
    prepared = pack_documents(
        prepared, section.sequence_len, train=packing.sample_packing, held_out=packs_held_out(packing)
    )
    facts: dict[str, Any] = {
        "train": store_facts(prepared.train),
        "held_out": store_facts(prepared.held_out),
        "counts": dict(prepared.counts),
        "num_rows": prepared.num_rows,
        "shares": prepared.shares,
        "row_counts": [counts.as_json() for counts in prepared.row_counts],
        "packs": {},
    }
    for name, packs in (("train", prepared.train_packs), ("held_out", prepared.held_out_packs)):
        if packs is not None:
            np.save(folder / f"{name}.members.npy", packs.members)
            np.save(folder / f"{name}.starts.npy", packs.starts)
            facts["packs"][name] = [packs.capacity, packs.packs_per_group]
    (folder / MARK).write_text(json.dumps(facts), encoding="utf-8")


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 of all that decides into which tokens a text is cut."""
    return hashlib.sha256(json.dumps(tokenizer_facts(tokenizer), sort_keys=True).encode()).hexdigest()


def tokenizer_facts(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """All that decides into which tokens a text or a conversation is cut, as JSON."""
    backend: Any = tokenizer.backend_tokenizer
    return [
        hashlib.sha256(backend.to_str().encode()).hexdigest(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]


def _code_facts(folder: Path = Path(__file__).parent) -> list[str]:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    # not by importing `datasets`, which is most of what a start costs that finds its rows prepared
    return [digest.hexdigest(), *(_version(name) for name in ("datasets", "fastokens", "tokenizers", "transformers"))]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def source_facts(entry: DatasetEntry, section: DataSection) -> Any:
    """Facts that change when the rows of an entry do, as JSON: digests of its files, or for a hub dataset names and
    sizes of the files in its library's cache."""
    memo = Path(section.dataset_prepared_path) / "files"
    path = Path(entry.path).expanduser()
    if path.is_file():
        return _file_digest(path, memo)
    files = _files_on_disk(entry)
    if files:
        return [[str(p.relative_to(path) if path.is_dir() else p), _file_digest(p, memo)] for p in files]
    if is_address(entry.path):
        return [_file_digest(file, memo) for file in fetch(entry.path, memo.with_name("fetched"))]
    source = load_source(entry, memo.with_name("fetched"))
    assert isinstance(source, TableSource), "a hub dataset"
    files = [Path(file["filename"]) for file in source.rows.cache_files]
    return [[file.name, file.stat().st_size] for file in files] + [str(file.parent) for file in files]


def _files_on_disk(entry: DatasetEntry) -> list[Path]:
    """Return the files of an entry on this disk: those that it is read from, and the card that chooses them."""
    path = Path(entry.path).expanduser()
    if is_saved_to_disk(path):
        return sorted(p for p in path.rglob("*") if p.is_file())
    found = files_on_disk(entry)
    if found is None:
        return []
    files = [file for name in split_names(entry) for file in found.splits.get(name, ())]
    return [*files, *(card for card in [path / CARD] if card.is_file())]


def _stamps(section: DataSection) -> list[Any]:
    """Stamps of all data files on this disk, which change with every write to one of them."""
    entries = (*section.datasets, *section.test_datasets)
    return [_stamp(file) for entry in entries for file in _files_on_disk(entry)]


def _stamp(path: Path) -> list[Any]:
    """Path, size, times and inode of a file. A copy may keep the time of the last edit, but not that of the copying."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _file_digest(path: Path, memo: Path) -> str:
    """sha256 of the file, remembered in the folder `memo` under its stamp. Not remembered if it was written to only
    now: the clock of files ticks in hundredths of a second, so the next write might leave the same stamp."""
    stamp = _stamp(path)
    note = memo / hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:32]
    digest = _read_digest(note)
    if digest is not None:
        return digest
    with exclusive_lock(note.with_name(f"{note.name}.lock")):  # ranks of a node need not all read it
        digest = _read_digest(note)
        if digest is not None:
            return digest
        is_settled = time.time_ns() - max(path.stat().st_ctime_ns, path.stat().st_mtime_ns) > SETTLED_NS
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if is_settled and _stamp(path) == stamp:
            staging = note.with_name(f"{note.name}.{os.getpid()}.tmp")
            with staged_file(note, staging=staging, flushes=False):  # one for each data file, which may be thousands
                staging.write_text(digest, encoding="ascii")
        return digest


def _read_digest(note: Path) -> str | None:
    """Return the digest in a note; None if there is no note, or a power cut left it empty."""
    if not note.exists():
        return None
    return note.read_text(encoding="ascii") or None
